"""The training loop of both tasks: steps, dev evaluation, best model, early stopping, resuming."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from config import TrainConfig, seed_from
from datasets import TextDataset
from training import distributed
from training.options import Hardware
from training.runs import atomic_path, write_csv

LOG_STEPS = 10  # on CUDA, between two reads of the losses, for which the host waits for the device
SAVE_SECONDS = 300  # between two resume states within an epoch


@dataclass(frozen=True)
class Task:
    """What the training loop needs to know about a task."""

    dataset: TextDataset
    evaluate: Callable[[], dict[str, float]]  # dev metrics of the model, with dev_loss
    save: Callable[[Path], None]  # writes the model
    metric: str = "dev_loss"  # chooses the best epoch; the largest, unless it is a loss


class Trainer:
    """Trains all parameters of a model that require a gradient."""

    def __init__(
        self, model: nn.Module, task: Task, config: TrainConfig, run: Path, hardware: Hardware
    ) -> None:
        self.model, self.task, self.config, self.run = model, task, config, run
        self.dataset, self.hardware, self.device = task.dataset, hardware, hardware.device
        self.trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.GradScaler(self.device.type, enabled=hardware.dtype == torch.float16)
        self.epochs: list[dict[str, Any]] = []  # a record per finished epoch, as in metrics.csv
        self.steps: list[dict[str, Any]] = []  # and per step, as in steps.csv
        self.seconds = 0.0  # of training in the current epoch
        self.parts = {"weights": self.trained, "optimizer": self.optimizer, "scaler": self.scaler}
        self.restore()
        self.loss = distributed.data_parallel(model)

    def train(self) -> list[dict[str, Any]]:
        """Train until the last epoch or the end of patience; returns the records of the epochs.

        The run's folder gets metrics.csv, steps.csv, best/ and the resume state. Random numbers of
        a step depend on seed, step and process only, so that a resumed run has those of an
        uninterrupted one. Only the main process returns. Raises FloatingPointError if a loss or
        gradient is not finite.
        """
        config, metric = self.config, self.task.metric
        log_steps = LOG_STEPS if self.device.type == "cuda" else 1
        step_size = config.batch_size * config.grad_accumulation
        while len(self.epochs) < config.epochs:
            epoch = len(self.epochs)
            if 0 < config.patience <= epoch - best_epoch(self.epochs, metric):
                print(f"stopped early: {config.patience} epochs without a better model")
                break
            batches = self.dataset.batches(step_size, config.seed, epoch)
            first, total = epoch * len(batches), config.epochs * len(batches)
            done, title = len(self.steps) - first, f"epoch {epoch + 1}/{config.epochs}"
            # None: if there is no terminal, as in the processes that print nothing
            bar = tqdm(batches[done:], title, leave=False, file=sys.stdout, disable=None)
            started, saved = time.perf_counter() - self.seconds, self.seconds
            self.model.train()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)  # without evaluation
            for number, indices in enumerate(bar, len(self.steps)):
                torch.manual_seed(seed_from(config.seed, number, distributed.rank()))
                lr = learning_rate(number, total, config)
                record = {"epoch": epoch + 1, "step": number - first + 1, "learning_rate": lr}
                self.steps.append(record | self.take_step(indices, lr))
                if number % log_steps == 0 or record["step"] == len(batches):
                    self.read_losses()
                    bar.set_postfix(loss=self.steps[-1]["loss"], refresh=False)
                    self.seconds = time.perf_counter() - started
                    if self.seconds - saved > SAVE_SECONDS:
                        self.save()
                        saved = self.seconds
            self.end_epoch()
        distributed.shutdown()
        return self.epochs

    def take_step(self, indices: list[int], lr: float) -> dict[str, Any]:
        """One optimizer step on a batch; returns its numbers for steps.csv.

        Loss and gradient norm are tensors: nothing waits for the device.
        """
        num_targets = self.dataset.num_targets(indices)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        micro_batches = distributed.micro_batches(indices, self.config.grad_accumulation)
        for index, part in enumerate(micro_batches):
            # A process without data takes an example with weight zero, because others wait for it.
            batch = self.dataset.collate(part or indices[:1])
            batch = {n: tensor.to(self.device, non_blocking=True) for n, tensor in batch.items()}
            weight = self.dataset.num_targets(part) / num_targets
            # DistributedDataParallel averages gradients in the last backward pass only.
            self.loss.require_backward_grad_sync = index == len(micro_batches) - 1
            with self.hardware.autocast():
                loss = self.loss(batch)
            # Micro-batches add up, and processes average, to the mean over all targets.
            self.scaler.scale(loss * (weight * distributed.world_size())).backward()
            loss_sum += loss.detach() * weight
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(loss_sum)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        numbers = {"targets": num_targets, "tokens": self.dataset.num_tokens(indices)}
        return numbers | {"loss": loss_sum, "gradient_norm": norm}

    def read_losses(self) -> None:
        """Replace losses and gradient norms of steps, which are on the device, by numbers.

        Raises FloatingPointError if one is not finite, unless float16 scaling skipped the step and
        can still become smaller.
        """
        may_skip = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        for step in self.steps[-LOG_STEPS:]:
            loss, norm = float(step["loss"]), float(step["gradient_norm"])
            if not math.isfinite(loss) or not (math.isfinite(norm) or may_skip):
                raise FloatingPointError(f"loss {loss}, gradient norm {norm}; try a smaller --lr")
            step |= {"loss": loss, "gradient_norm": norm}

    def end_epoch(self) -> None:
        """Evaluate, record and print the epoch, and save it."""
        memory = peak_memory_gb(self.device)
        self.model.eval()
        metrics = distributed.from_main(self.task.evaluate)
        epoch = len(self.epochs) + 1
        steps = [step for step in self.steps if step["epoch"] == epoch]
        loss_sum = sum(step["loss"] * step["targets"] for step in steps)
        record = {
            "epoch": epoch,
            "train_loss": loss_sum / sum(step["targets"] for step in steps),
            **metrics,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(sum(step["tokens"] for step in steps) / self.seconds, 1),
            "peak_memory_gb": memory,
            "skipped_steps": sum(not math.isfinite(step["gradient_norm"]) for step in steps),
        }
        self.epochs.append(record)
        self.seconds = 0.0
        self.save()
        names = [name for name in record if name.endswith(("loss", "accuracy", "f1"))]
        shown = "  ".join(f"{name.replace('_', ' ')} {record[name]:.3f}" for name in names)
        mark = "  *best*" if best_epoch(self.epochs, self.task.metric) == epoch else ""
        print(f"epoch {epoch:>2}/{self.config.epochs}  {shown}  {record['seconds']:.1f} s{mark}")

    def save(self) -> None:
        """Write tables, resume state, and best/ after the best epoch, in the main process.

        The state, which knows the best epoch, comes first.
        """
        if distributed.rank() > 0:
            return
        write_csv(self.run / "steps.csv", self.steps)
        write_csv(self.run / "metrics.csv", self.epochs)
        state = {"epochs": self.epochs, "steps": self.steps, "seconds": self.seconds}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_path(self.run / "state.pt") as path:
            torch.save(state, path)
        if self.steps[-1]["epoch"] == len(self.epochs) == best_epoch(self.epochs, self.task.metric):
            with atomic_path(self.run / "best") as path:
                self.task.save(path)

    def restore(self) -> None:
        """Continue from the resume state of the main process, if the run has one."""
        path = self.run / "state.pt"
        if not distributed.from_main(path.exists):
            return
        load = partial(torch.load, path, weights_only=True, map_location="cpu")
        state = distributed.from_main(load)
        self.epochs, self.steps, self.seconds = state["epochs"], state["steps"], state["seconds"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.save()  # best/ may be missing


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019). Only matrices of linear layers decay, as in minGPT."""
    matrices = {part.weight for part in model.modules() if isinstance(part, nn.Linear)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = {"weight_decay": config.weight_decay, "params": [p for p in trained if p in matrices]}
    others = {"weight_decay": 0.0, "params": [p for p in trained if p not in matrices]}
    return torch.optim.AdamW([decay, others], config.lr, fused=True)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of a step in 0 .. total - 1: linear warm-up, then the schedule."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * {"constant": 1, "linear": 1 - done, "cosine": cosine}[config.schedule]


def best_epoch(epochs: list[dict[str, Any]], metric: str) -> int:
    """The number of the first epoch with the best metric; 0 if there is none."""
    choose = min if metric.endswith("loss") else max
    return choose(epochs, key=lambda record: record[metric], default={"epoch": 0})["epoch"]


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory in GB: of training on CUDA, else of the whole process on Linux; else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform != "linux":
        return None
    import resource  # here: not on Windows

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)
