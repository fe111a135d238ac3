"""The training loop of both tasks: steps, dev evaluation, best model, early stopping, resuming."""

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
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


@dataclass
class Progress:
    """How far a run is: a record per finished epoch, and one per step."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    step: int = 0  # finished steps of the current epoch
    seconds: float = 0.0  # of these steps


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
        self.progress = self.restore()
        self.loss = distributed.data_parallel(model)  # copies the main process's parameters
        self.unread: list[tuple[dict[str, float], Tensor]] = []  # whose numbers are on the device

    def train(self) -> list[dict[str, float]]:
        """Train until the last epoch or the end of patience; returns the records of the epochs.

        The run's folder gets metrics.csv, steps.csv, best/ and the resume state. The random numbers
        of a step depend on seed, step and process only, so that a resumed run has those of an
        uninterrupted one. Only the main process returns. Raises FloatingPointError if a loss or
        gradient is not finite.
        """
        config, progress, dataset = self.config, self.progress, self.task.dataset
        step_size = config.batch_size * config.grad_accumulation
        steps_per_epoch = len(dataset.batches(step_size, config.seed, 0))
        total, every = config.epochs * steps_per_epoch, config.checkpoint_every
        no_bar = None if distributed.rank() == 0 else True  # None: if there is no terminal
        bar = tqdm(total=total, unit="step", leave=False, disable=no_bar)
        bar.update(len(progress.steps))
        while len(progress.epochs) < config.epochs and not self.is_out_of_patience():
            epoch = len(progress.epochs)
            bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
            started = time.perf_counter() - progress.seconds
            saved_after = progress.seconds
            self.model.train()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)  # without evaluation
            for indices in dataset.batches(step_size, config.seed, epoch)[progress.step :]:
                number = epoch * steps_per_epoch + progress.step
                torch.manual_seed(seed_from(config.seed, number, distributed.rank()))
                self.take_step(indices, learning_rate(number, total, config))
                by_count = every > 0 and progress.step % every == 0
                if by_count or progress.step % LOG_INTERVALS[self.device.type] == 0:
                    self.read_losses()
                    bar.set_postfix(loss=f"{progress.steps[-1]['loss']:.3f}", refresh=False)
                bar.update()
                progress.seconds = time.perf_counter() - started
                is_late = progress.seconds - saved_after > SAVE_SECONDS and not self.unread
                if by_count or (is_late and every == 0):
                    self.save_state()
                    saved_after = progress.seconds
            self.read_losses()
            progress.seconds = time.perf_counter() - started
            tqdm.write(self.end_epoch())
        bar.close()
        if len(progress.epochs) < config.epochs:
            metric = self.task.metric.replace("_", " ")
            print(f"stopped early: {config.patience} epochs without a better {metric}")
        distributed.shutdown()
        return progress.epochs

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
        self.progress.step += 1
        record = {"epoch": len(self.progress.epochs) + 1, "step": self.progress.step}
        record |= {
            "learning_rate": lr,
            "targets": num_targets,
            "tokens": dataset.num_tokens(indices),
        }
        self.unread.append((record, torch.stack([loss_sum, norm.double()])))

    def read_losses(self) -> None:
        """Read the losses and gradient norms since the last call from the device, all at once.

        Raises FloatingPointError if one is not finite, unless float16 scaling skipped the step.
        """
        steps, unread, self.unread = self.progress.steps, self.unread, []
        if not unread:
            return
        numbers = torch.stack([numbers for _, numbers in unread])
        numbers[:, 0] = distributed.all_reduce(numbers[:, 0].contiguous())
        for (record, _), (loss, norm) in zip(unread, numbers.tolist(), strict=True):
            steps.append(record | {"loss": loss, "gradient_norm": norm})
            skipped = sum(not math.isfinite(s["gradient_norm"]) for s in steps[-MAX_SKIPPED:])
            may_skip = self.scaler.is_enabled() and skipped < MAX_SKIPPED
            if not math.isfinite(loss) or not (math.isfinite(norm) or may_skip):
                raise FloatingPointError(
                    f"loss {loss}, gradient norm {norm} at epoch {record['epoch']}, step "
                    f"{record['step']}; try a smaller --lr, --max_grad_norm 1 or --dtype float32"
                )

    def end_epoch(self) -> str:
        """Evaluate, record the epoch, save state and best model; returns a line for the screen."""
        progress = self.progress
        memory = peak_memory_gb(self.device)
        self.model.eval()
        metrics = distributed.from_main(self.task.evaluate)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value}; try a smaller --lr")
        epoch = len(progress.epochs) + 1
        steps = [step for step in progress.steps if step["epoch"] == epoch]
        loss_sum = sum(step["loss"] * step["targets"] for step in steps)
        tokens = sum(step["tokens"] for step in steps)
        record = {
            "epoch": epoch,
            "train_loss": loss_sum / sum(step["targets"] for step in steps),
            **metrics,
            "learning_rate": steps[-1]["learning_rate"],
            "seconds": round(progress.seconds, 3),
            "tokens_per_second": round(tokens / progress.seconds, 1),
            "peak_memory_gb": memory,
            "skipped_steps": sum(not math.isfinite(step["gradient_norm"]) for step in steps),
        }
        progress.epochs.append(record)
        progress.step, progress.seconds = 0, 0.0
        self.save_state()
        self.save_best()
        shown = [f"epoch {epoch:>2}/{self.config.epochs}"]
        shown += [
            f"{name.replace('_', ' ')} {value:.3f}"
            for name, value in record.items()
            if name.endswith(("loss", "accuracy", "f1"))
        ]
        shown.append(f"{record['seconds']:.1f} s  {record['tokens_per_second']:,.0f} tokens/s")
        if best_epoch(progress.epochs, self.task.metric) == epoch:
            shown.append("*best*")
        return "  ".join(shown)

    def is_out_of_patience(self) -> bool:
        epochs, patience = self.progress.epochs, self.config.patience
        return 0 < patience <= len(epochs) - best_epoch(epochs, self.task.metric)

    def save_best(self) -> None:
        """Write best/ if the last epoch is the best. The state, which knows it, comes first."""
        epochs = self.progress.epochs
        if epochs and best_epoch(epochs, self.task.metric) == len(epochs):
            distributed.from_main(lambda: self.run.save_best(self.task.save))

    def save_state(self) -> None:
        """Write steps.csv, metrics.csv and the resume state, in the main process."""
        if distributed.rank() > 0:
            return
        write_csv(self.run.folder / "steps.csv", self.progress.steps)
        write_csv(self.run.folder / "metrics.csv", self.progress.epochs)
        state = {
            "progress": vars(self.progress),
            "parameters": [parameter.detach() for parameter in self.trained],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        self.run.save_state(state)

    def restore(self) -> Progress:
        """The Progress of the run's resume state, if it has one, whose parameters are loaded.

        Raises InputError for a state that does not fit the model.
        """
        state = distributed.from_main(self.run.load_state)
        if state is None:
            return Progress()
        try:
            with torch.no_grad():
                for parameter, saved in zip(self.trained, state["parameters"], strict=True):
                    parameter.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
        except Exception as error:  # a state of anything else raises almost anything
            raise InputError(f"the state in {self.run.folder} does not fit ({error})") from error
        print(f"--resume: continues after {len(self.progress.steps)} steps")
        if self.progress.step == 0:  # it may have been killed before best/ was written
            self.save_best()
        return self.progress


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019). Only the matrices of linear layers decay, as in GPT-2."""
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    matrices = {id(linear.weight) for linear in linears}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in matrices], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in matrices], "weight_decay": 0.0},
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


def best_epoch(epochs: list[dict[str, float]], metric: str) -> int:
    """The number of the first epoch with the best metric; 0 if there is none."""
    if not epochs:
        return 0
    choose = min if metric.endswith("loss") else max
    return int(choose(epochs, key=lambda record: record[metric])["epoch"])


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory in GB: of training on CUDA, else of the whole process; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # here: not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kilobytes, on macOS in bytes
    return round(peak / 1e9 * (1 if platform.system() == "Darwin" else 1024), 3)
