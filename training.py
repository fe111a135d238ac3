"""The training loop of both tasks: epochs, dev evaluation, best model, early stopping, resuming."""

import contextlib
import math
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import nn
from tqdm import tqdm

import distributed
from cli import from_options
from config import InputError, Interrupted, LoRAConfig, TrainConfig
from files import atomic_folder, write_csv
from lora import cast_frozen_weights
from models.gpt2 import to_device
from runs import peak_memory_gb

STEP_COLUMNS = ("epoch", "step", "loss", "learning_rate", "gradient_norm")
LOG_INTERVALS = {"cpu": 1, "cuda": 10}  # steps between two reads of the losses: the host waits
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_SKIPPED = 30  # float16 steps in succession without a finite gradient; each halves the scale


@dataclass(frozen=True)
class Task:
    """What the training loop needs to know about a task."""

    batches: Callable  # epoch -> list of batches, each a list of indices
    collate: Callable  # indices -> dict of the tensors that the loss needs
    loss: Callable  # model, tensors -> mean over the targets
    num_targets: Callable  # indices -> int
    num_tokens: Callable  # indices -> int, without padding
    evaluate: Callable  # model -> dict of dev metrics, with dev_loss
    save: Callable  # model, folder
    metric: str = "dev_loss"  # chooses the best model
    larger_is_better: bool = False


@dataclass
class Progress:
    """Resumable training state besides tensors."""

    epoch: int = 0  # completed epochs
    step: int = 0  # completed steps of the current epoch
    best_epoch: int = 0
    epochs: list = field(default_factory=list)  # the records of metrics.csv
    steps: list = field(default_factory=list)  # the records of steps.csv, as tuples
    sums: Counter = field(default_factory=Counter)  # over the current epoch


class Trainer:
    """Trains all parameters that require a gradient."""

    def __init__(self, model, task, config, run, device, dtype):
        self.model, self.task, self.config, self.run = model, task, config, run
        self.device, self.dtype = device, dtype
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # Creates the scale, also in a process without data in its first batch.
        self.scaler.scale(torch.zeros((), device=device))
        self.gradients = distributed.flat_gradients(self.parameters)
        self.steps_per_epoch = len(task.batches(0))
        self.unread = []  # steps whose loss and gradient norm are only on the device
        self.progress = self.restore()

    def train(self):
        """Train and return the Progress; the run's folder has metrics.csv, best/ and resume/.

        Only the main process returns; the others exit. Raises Interrupted after a signal, and
        FloatingPointError if a loss or gradient is not finite.
        """
        config, progress = self.config, self.progress
        total = config.epochs * self.steps_per_epoch
        bar = tqdm(total=total, unit="step", disable=distributed.no_bar(), leave=False)
        with bar, catch_signals() as self.signals:
            bar.update(len(progress.steps))
            while progress.epoch < config.epochs and not self.out_of_patience():
                bar.set_description(f"epoch {progress.epoch + 1}/{config.epochs}")
                self.model.train()
                if self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(self.device)
                for indices in self.task.batches(progress.epoch)[progress.step :]:
                    started = time.perf_counter()
                    number = progress.epoch * self.steps_per_epoch + progress.step
                    self.step(indices, learning_rate(number, total, config))
                    due = (number + 1) % (config.checkpoint_every or math.inf) == 0
                    received = self.log() if due or self.is_log_step() else 0
                    progress.sums["seconds"] += time.perf_counter() - started
                    bar.update()
                    if not self.unread:
                        bar.set_postfix(loss=f"{progress.steps[-1][2]:.3f}", refresh=False)
                    if due or received:
                        self.save()
                    self.raise_if_stopped(received)
                self.end_epoch()
                tqdm.write(self.describe_epoch())
                self.save()
                self.raise_if_stopped(self.log())
        if progress.epoch < config.epochs:
            metric = self.task.metric.replace("_", " ")
            print(f"stopped early: {config.patience} epochs without a better {metric}")
        distributed.shutdown()
        return progress

    def step(self, indices, lr):
        """One optimizer step on a batch. The host only starts it: nothing waits for the device."""
        progress, task, scaler = self.progress, self.task, self.scaler
        num_targets = task.num_targets(indices)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad(set_to_none=self.gradients is None)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for share in distributed.micro_batches(indices, self.config.grad_accumulation):
            batch = {k: to_device(v, self.device) for k, v in task.collate(share).items()}
            with autocast(self.device, self.dtype):
                loss = task.loss(self.model, batch)
            count = task.num_targets(share)
            # Weighted so that micro-batches and processes add up to the mean over the batch.
            scaler.scale(loss * (count / num_targets)).backward()
            loss_sum += loss.detach().double() * count
        distributed.all_reduce(self.gradients)
        scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        scaler.step(self.optimizer)
        scaler.update()
        progress.step += 1
        progress.sums.update(num_targets=num_targets, tokens=task.num_tokens(indices))
        # Summed over processes, the first is the batch's and the second the norm.
        numbers = torch.stack([loss_sum, norm.double() / distributed.world_size()])
        self.unread.append((progress.step, indices, num_targets, lr, numbers))

    def is_log_step(self):
        """Whether `log` follows the last step, the same in all processes."""
        step, interval = self.progress.step, LOG_INTERVALS[self.device.type]
        if self.signals and distributed.world_size() == 1:
            return True
        return step % interval == 0 or step == self.steps_per_epoch

    def log(self):
        """Read and check the steps since the last call, all at once.

        Returns a signal that any process has received, the same in all of them, or 0. Raises
        FloatingPointError if a loss or gradient is not finite.
        """
        progress, steps, self.unread = self.progress, self.unread, []
        received = torch.tensor([number in self.signals for number in SIGNALS])
        rows = [received.double().to(self.device), *(numbers for *_, numbers in steps)]
        counts, *rows = distributed.all_reduce(torch.stack(rows)).tolist()
        for (step, indices, num_targets, lr, _), (loss_sum, norm) in zip(steps, rows, strict=True):
            loss = loss_sum / num_targets
            self.check_finite(step, loss, norm, indices)
            progress.steps.append((progress.epoch + 1, step, loss, lr, norm))
            progress.sums.update(loss=loss_sum, skipped=int(not math.isfinite(norm)))
        return next((n for n, count in zip(SIGNALS, counts, strict=True) if count), 0)

    def check_finite(self, step, loss, norm, indices):
        """Raise FloatingPointError unless the step was valid, or float16 scaling skipped it."""
        progress = self.progress
        skipped = sum(not math.isfinite(step[-1]) for step in progress.steps[-MAX_SKIPPED:])
        skippable = self.scaler.is_enabled() and skipped < MAX_SKIPPED
        if not math.isfinite(loss) or not (math.isfinite(norm) or skippable):
            raise FloatingPointError(
                f"loss {loss}, gradient norm {norm} at epoch {progress.epoch + 1}, step {step} "
                f"(examples {indices}); try a smaller --lr, --max_grad_norm 1 or --dtype float32"
            )

    @torch.no_grad()
    def end_epoch(self):
        """Evaluate, save the model if it is the best so far, and record the epoch."""
        progress, task = self.progress, self.task
        memory = peak_memory_gb(self.device)  # before evaluation and saving
        self.model.eval()
        metrics = task.evaluate(self.model)
        progress.epoch += 1
        progress.step = 0
        for name, value in metrics.items():
            if not math.isfinite(value):
                problem = f"{name} is {value} after epoch {progress.epoch}"
                raise FloatingPointError(f"{problem}; try a smaller --lr")
        sums, progress.sums = progress.sums, Counter()
        record = {
            "epoch": progress.epoch,
            "train_loss": sums["loss"] / sums["num_targets"],
            **metrics,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(sums["seconds"], 3),
            "tokens_per_second": round(sums["tokens"] / sums["seconds"], 1),
            "peak_memory_gb": memory,
            "skipped_steps": sums["skipped"],
        }
        progress.epochs.append(record)
        best = max if task.larger_is_better else min
        progress.best_epoch = best(progress.epochs, key=itemgetter(task.metric))["epoch"]
        if progress.best_epoch == progress.epoch and distributed.is_main_process():
            with atomic_folder(self.run.best) as folder:
                task.save(self.model, folder)

    def out_of_patience(self):
        return 0 < self.config.patience <= self.progress.epoch - self.progress.best_epoch

    def describe_epoch(self):
        """One line per epoch for the screen."""
        record = self.progress.epochs[-1]
        line = f"epoch {record['epoch']:>2}/{self.config.epochs}"
        for name, value in record.items():
            if name.endswith(("loss", "accuracy", "f1")):
                line += f"  {name.replace('_', ' ')} {value:.3f}"
        line += f"  {record['seconds']:.1f} s  {record['tokens_per_second']:,.0f} tokens/s"
        if record["skipped_steps"]:
            line += f"  {record['skipped_steps']} steps skipped (float16 overflow)"
        return line + ("  *best*" if self.progress.best_epoch == record["epoch"] else "")

    def raise_if_stopped(self, number):
        if number:
            name = signal.Signals(number).name
            raise Interrupted(f"stopped by {name}, saved in {self.run.folder}", number)

    def save(self):
        """Write steps.csv, metrics.csv and the resume state."""
        rng = [torch.get_rng_state()]
        if self.device.type == "cuda":
            rng.append(torch.cuda.get_rng_state(self.device))
        state = {
            "progress": vars(self.progress),
            "parameters": self.parameters,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": distributed.all_gather(rng),
        }
        if distributed.is_main_process():
            write_csv(self.run.folder / "steps.csv", self.progress.steps, STEP_COLUMNS)
            write_csv(self.run.folder / "metrics.csv", self.progress.epochs)
            self.run.save_state(state)

    def restore(self):
        """The Progress of the run's resume state if it has one, with parameters and random state.

        Raises InputError for a state that does not fit the model.
        """
        state, rank = self.run.load_state(), distributed.rank()
        if state is None:
            if rank > 0:  # other dropout than in the main process
                torch.manual_seed(torch.initial_seed() + rank)
            return Progress()
        try:
            with torch.no_grad():
                for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                    parameter.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["rng"][rank][0])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"][rank][1], self.device)
            progress = Progress(**state["progress"])
            if progress.epoch != len(progress.epochs):
                raise ValueError("its epochs do not agree")
            return progress
        except Exception as error:  # a state of anything else raises almost anything
            path = self.run.state_path
            raise InputError(f"{path} does not fit ({error}); delete it to start over") from error


def autocast(device, dtype):
    """Matrix multiplications in `dtype`; sums and norms stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def learning_rate(step, total, config):
    """The learning rate of a step in 0 .. total - 1: linear warm-up, then the schedule."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * {"constant": 1, "linear": 1 - done, "cosine": cosine}[config.schedule]


@contextlib.contextmanager
def catch_signals():
    """Yield a list that receives Ctrl-C and SIGTERM; a second Ctrl-C stops at once."""
    received = []

    def receive(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handlers = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def setup(options):
    """TrainConfig, LoRAConfig, device and dtype from a script's options; sets the seed."""
    config = from_options(TrainConfig, options)
    lora_config = from_options(LoRAConfig, options, prefix="lora_")
    device = distributed.init(choose_device(config.device, options.use_gpu))
    dtype = choose_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    return config, lora_config, device, dtype


def prepare(model, options, dtype):
    """Cast frozen weights, and apply --gradient_checkpointing and --compile."""
    if options.use_lora:
        cast_frozen_weights(model, dtype)
    model.gpt.gradient_checkpointing = options.gradient_checkpointing
    if options.compile:  # the backbone in place, so that the names of parameters stay
        model.gpt.compile(dynamic=True)


def choose_device(name, use_gpu=False):
    """`auto` is CUDA if available; raises InputError for a device that is not there."""
    if use_gpu and name == "cpu":
        raise InputError("--use_gpu and --device cpu contradict each other; remove one")
    if name == "auto":
        name = "cuda" if use_gpu or torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name):
        raise InputError(f"--device {name} is not supported; use auto, cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {name} here; remove --use_gpu and --device")
    return device


def choose_dtype(name, device):
    """`auto` is bfloat16 if the hardware multiplies it, else float16 on CUDA, else float32."""
    if name == "float16" and device.type == "cpu":
        raise InputError("--dtype float16 needs CUDA; use auto, bfloat16 or float32")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    # torch has no public function for this; emulation takes several times as long
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
