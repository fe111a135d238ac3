"""The training loop of both tasks: steps, dev evaluation, best model, early stopping, resuming."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from config import InputError, TrainConfig, seed_from
from datasets import TextDataset
from training import distributed
from training.options import Hardware
from training.runs import Run, write_csv

LOG_INTERVALS = {"cpu": 1, "cuda": 10}  # steps between two reads of the losses: the host waits
SAVE_SECONDS = 300  # between two resume states within an epoch
MAX_SKIPPED = 30  # float16 consecutive steps without a finite gradient; each halves the scale


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
        self, model: nn.Module, task: Task, config: TrainConfig, run: Run, hardware: Hardware
    ) -> None:
        self.model, self.task, self.config, self.run = model, task, config, run
        self.hardware, self.device = hardware, hardware.device
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=hardware.dtype == torch.float16
        )
        self.epochs: list[dict[str, Any]] = []  # a record per finished epoch, as in metrics.csv
        self.steps: list[dict[str, Any]] = []  # and per step, as in steps.csv
        self.unread: list[dict[str, Any]] = []  # steps whose loss and norm are on the device
        self.step, self.seconds = 0, 0.0  # finished steps of the current epoch, and their time
        self.restore()
        self.loss = distributed.data_parallel(model)  # copies the main process's parameters

    def train(self) -> list[dict[str, Any]]:
        """Train until the last epoch or the end of patience; returns the records of the epochs.

        The run's folder gets metrics.csv, steps.csv, best/ and the resume state. The random numbers
        of a step depend on seed, step and process only, so that a resumed run has those of an
        uninterrupted one. Only the main process returns. Raises FloatingPointError if a loss or
        gradient is not finite.
        """
        config, dataset = self.config, self.task.dataset
        step_size, every = config.batch_size * config.grad_accumulation, config.checkpoint_every
        steps_per_epoch = len(dataset.batches(step_size, config.seed, 0))
        total = config.epochs * steps_per_epoch
        no_bar = None if distributed.rank() == 0 else True  # None: if there is no terminal
        while len(self.epochs) < config.epochs:
            epoch = len(self.epochs)
            if 0 < config.patience <= epoch - best_epoch(self.epochs, self.task.metric):
                metric = self.task.metric.replace("_", " ")
                print(f"stopped early: {config.patience} epochs without a better {metric}")
                break
            batches = dataset.batches(step_size, config.seed, epoch)[self.step :]
            title = f"epoch {epoch + 1}/{config.epochs}"
            bar = tqdm(batches, title, leave=False, unit="step", disable=no_bar)
            started, saved_after = time.perf_counter() - self.seconds, self.seconds
            self.model.train()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)  # without evaluation
            for indices in bar:
                number = epoch * steps_per_epoch + self.step
                torch.manual_seed(seed_from(config.seed, number, distributed.rank()))
                self.take_step(indices, learning_rate(number, total, config))
                by_count = every > 0 and self.step % every == 0
                is_logged = self.step % LOG_INTERVALS[self.device.type] == 0
                if by_count or is_logged or self.step == steps_per_epoch:
                    self.read_losses()
                    bar.set_postfix(loss=f"{self.steps[-1]['loss']:.3f}", refresh=False)
                    self.seconds = time.perf_counter() - started
                    is_late = every == 0 and self.seconds - saved_after > SAVE_SECONDS
                    if by_count or is_late:
                        self.save_state()
                        saved_after = self.seconds
            print(self.end_epoch())
        distributed.shutdown()
        return self.epochs

    def take_step(self, indices: list[int], lr: float) -> None:
        """One optimizer step on a batch. The host only starts it: nothing waits for the device."""
        dataset, scaler = self.task.dataset, self.scaler
        num_targets = dataset.num_targets(indices)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        micro_batches = distributed.micro_batches(indices, self.config.grad_accumulation)
        for index, part in enumerate(micro_batches):
            # A process without data takes an example with weight zero, because others wait for it.
            batch = dataset.collate(part or indices[:1])
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            weight = dataset.num_targets(part) / num_targets
            # DistributedDataParallel averages gradients in the last backward pass only.
            self.loss.require_backward_grad_sync = index == len(micro_batches) - 1
            with self.hardware.autocast():
                loss = self.loss(batch)
            # Micro-batches add up, and processes average, to the mean over all targets.
            scaler.scale(loss * (weight * distributed.world_size())).backward()
            loss_sum += loss.detach() * weight
        scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.trained, self.config.max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        record = {"epoch": len(self.epochs) + 1, "step": self.step, "learning_rate": lr}
        record |= {"targets": num_targets, "tokens": dataset.num_tokens(indices)}
        self.unread.append(record | {"loss": loss_sum, "gradient_norm": norm})

    def read_losses(self) -> None:
        """Read the losses and gradient norms since the last call from the device, all at once.

        Raises FloatingPointError if one is not finite, unless float16 scaling skipped the step.
        """
        losses = torch.stack([record["loss"] for record in self.unread])
        if distributed.world_size() > 1:
            torch.distributed.all_reduce(losses)
        norms = torch.stack([record["gradient_norm"] for record in self.unread])
        numbers = torch.stack([losses, norms], dim=1).tolist()
        for record, (loss, norm) in zip(self.unread, numbers, strict=True):
            self.steps.append(record | {"loss": loss, "gradient_norm": norm})
            skipped = count_skipped(self.steps[-MAX_SKIPPED:])
            may_skip = self.scaler.is_enabled() and skipped < MAX_SKIPPED
            if not math.isfinite(loss) or not (math.isfinite(norm) or may_skip):
                raise FloatingPointError(
                    f"loss {loss}, gradient norm {norm} at epoch {record['epoch']}, step "
                    f"{record['step']}; try a smaller --lr, --max_grad_norm 1 or --dtype float32"
                )
        self.unread = []

    def end_epoch(self) -> str:
        """Evaluate, record the epoch, save state and best model; returns a line for the screen."""
        memory = peak_memory_gb(self.device)
        self.model.eval()
        metrics = distributed.from_main(self.task.evaluate)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}; try a smaller --lr")
        epoch, steps = len(self.epochs) + 1, self.steps[-self.step :]
        loss_sum = sum(step["loss"] * step["targets"] for step in steps)
        tokens = sum(step["tokens"] for step in steps)
        record = {
            "epoch": epoch,
            "train_loss": loss_sum / sum(step["targets"] for step in steps),
            **metrics,
            "learning_rate": steps[-1]["learning_rate"],
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tokens / self.seconds, 1),
            "peak_memory_gb": memory,
            "skipped_steps": count_skipped(steps),
        }
        self.epochs.append(record)
        self.step, self.seconds = 0, 0.0
        self.save_state()
        self.save_best()
        names = [name for name in record if name.endswith(("loss", "accuracy", "f1"))]
        shown = "  ".join(f"{name.replace('_', ' ')} {record[name]:.3f}" for name in names)
        speed = f"{record['seconds']:.1f} s  {record['tokens_per_second']:,.0f} tokens/s"
        mark = "  *best*" if best_epoch(self.epochs, self.task.metric) == epoch else ""
        return f"epoch {epoch:>2}/{self.config.epochs}  {shown}  {speed}{mark}"

    def save_best(self) -> None:
        """Write best/ if the last epoch is the best. The state, which knows it, comes first."""
        if best_epoch(self.epochs, self.task.metric) == len(self.epochs):
            distributed.from_main(lambda: self.run.save_best(self.task.save))

    def save_state(self) -> None:
        """Write steps.csv, metrics.csv and the resume state, in the main process."""
        if distributed.rank() > 0:
            return
        write_csv(self.run.folder / "steps.csv", self.steps)
        write_csv(self.run.folder / "metrics.csv", self.epochs)
        progress = {"epochs": self.epochs, "steps": self.steps, "step": self.step}
        state = {
            "progress": progress | {"seconds": self.seconds},
            "parameters": [parameter.detach() for parameter in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        self.run.save_state(state)

    def restore(self) -> None:
        """Continue from the run's resume state, if it has one.

        Raises InputError for a state that does not fit the model.
        """
        state = distributed.from_main(self.run.load_state)
        if state is None:
            return
        if [p.shape for p in state["parameters"]] != [p.shape for p in self.trained]:
            raise InputError(f"the state in {self.run.folder} does not fit the model; delete it")
        for parameter, saved in zip(self.trained, state["parameters"], strict=True):
            parameter.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epochs, self.steps, self.step, self.seconds = state["progress"].values()
        print(f"--resume: continues after {len(self.steps)} steps")
        if self.step == 0:  # it may have been killed before best/ was written
            self.save_best()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019). Only the matrices of linear layers decay, as in GPT-2."""
    matrices = {part.weight for part in model.modules() if isinstance(part, nn.Linear)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], config.lr, fused=True)


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


def count_skipped(steps: list[dict[str, Any]]) -> int:
    """The number of steps that float16 scaling skipped."""
    return sum(not math.isfinite(step["gradient_norm"]) for step in steps)


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory in GB: of training on CUDA, else of the whole process; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource  # here: not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # bytes or kilobytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
