"""The training loop, once for every task: epochs, dev evaluation, the best model, early stopping, resume."""

import argparse
import contextlib
import math
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import processes
from config import InputError, Interrupted, LoRAConfig, TrainConfig, from_options
from runs import Run, facts, parameter_counts, peak_memory_gb, replacing_folder


@dataclass(frozen=True)
class Task:
    """What the loop needs to know of a task."""

    batches: Callable[[int], list]  # epoch -> its batches' rows, in order
    collate: Callable[[list], dict]  # rows -> tensors
    loss: Callable[[nn.Module, dict], Tensor]  # a mean
    items: Callable[[dict], int]  # over how many items
    evaluate: Callable[[nn.Module], dict[str, float]]  # dev figures; dev_loss among them
    save: Callable[[nn.Module, Path], None]  # weights and configuration into an empty folder
    metric: str = "dev_loss"  # which dev figure chooses the best model
    larger_is_better: bool = False


@dataclass
class Progress:
    """Where a run stands; everything that a resumed run goes on from, besides tensors."""

    epoch: int = 0  # epochs completed
    step: int = 0  # steps taken in the epoch that is under way
    loss_sum: float = 0.0
    items: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_epoch: int = 0
    rows: list[dict] = field(default_factory=list)  # of metrics.csv


def train(
    model: nn.Module, task: Task, config: TrainConfig, run: Run, device: torch.device, dtype: torch.dtype
) -> Progress:
    """Train what requires a gradient; leaves metrics.csv, best/ and resume/ in the run's folder.

    Of several processes only the writer returns, the others end here. Raises Interrupted after a signal, and
    FloatingPointError for a loss or gradient that is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scaler.scale(torch.zeros((), device=device))  # has no scale before: a process without rows in its first batch
    progress = _restore(run, parameters, optimizer, scaler, device)
    if processes.is_writer():
        run.write_metrics(progress.rows)
    steps = len(task.batches(0))
    bar = tqdm(total=config.epochs * steps, unit="step", disable=processes.no_bar(), leave=False)
    with bar, _signals() as stop:
        bar.update(progress.epoch * steps + progress.step)
        while progress.epoch < config.epochs and not _out_of_patience(progress, config):
            bar.set_description(f"epoch {progress.epoch + 1}/{config.epochs}")
            batches = task.batches(progress.epoch)
            model.train()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            while progress.step < steps:
                start = time.perf_counter()
                rows, done = batches[progress.step], progress.epoch * steps + progress.step
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(done, config.epochs * steps, config)
                parts = [task.collate(part) for part in processes.parts(rows, config.grad_accumulation)]
                [items] = processes.total(sum(map(task.items, parts)))
                optimizer.zero_grad(set_to_none=True)
                loss_sum = 0.0
                for part in parts:
                    batch = {name: value.to(device) for name, value in part.items() if isinstance(value, Tensor)}
                    with precision(device, dtype):
                        loss = task.loss(model, batch)
                    # each part's mean counts by its items: the sum over parts and processes is the batch's mean
                    scaler.scale(loss * (task.items(part) / items)).backward()
                    loss_sum += loss.item() * task.items(part)
                processes.sum_gradients(parameters)
                scaler.unscale_(optimizer)
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                tokens = sum(int(part["attention_mask"].sum()) for part in parts)
                loss_sum, tokens = processes.total(loss_sum, tokens)
                value = loss_sum / items
                if not math.isfinite(value):
                    raise _not_finite("loss", value, progress, rows)
                if not (norm.isfinite() or scaler.is_enabled()):  # float16's scaler skips such a step and goes on
                    raise _not_finite("gradient's norm", norm.item(), progress, rows)
                if config.max_grad_norm:
                    nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
                scaler.step(optimizer)
                scaler.update()
                progress.step += 1
                progress.loss_sum += loss_sum
                progress.items += items
                progress.tokens += tokens
                progress.seconds += time.perf_counter() - start
                bar.update()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                stopped = _agreed(stop)
                if stopped or (config.checkpoint_every and (done + 1) % config.checkpoint_every == 0):
                    _save(run, progress, parameters, optimizer, scaler, device)
                _raise_if_stopped(stopped, run)
            _end_epoch(model, task, run, progress, optimizer.param_groups[0]["lr"], device)
            _save(run, progress, parameters, optimizer, scaler, device)
            if processes.is_writer():
                run.write_metrics(progress.rows)
            tqdm.write(describe(progress.rows[-1], config.epochs, progress.best_epoch))
            _raise_if_stopped(_agreed(stop), run)
    if progress.epoch < config.epochs:
        print(f"stopped early: no better {task.metric.replace('_', ' ')} in {config.patience} epochs")
    processes.leave()
    return progress


def _not_finite(what: str, value: float, progress: Progress, rows: list) -> FloatingPointError:
    place = f"epoch {progress.epoch + 1}, step {progress.step + 1}, rows {rows}"
    advice = "try a smaller --lr, --max_grad_norm 1 or --dtype float32"
    return FloatingPointError(f"the {what} is {value} at {place}; {advice}")


def _agreed(stop: list[int]) -> list[int]:
    """The signals that any process has got so far, the same on all of them."""
    return [number for numbers in processes.from_all(list(stop)) for number in numbers]


def _raise_if_stopped(stop: list[int], run: Run) -> None:
    if stop:
        raise Interrupted(f"stopped by {signal.Signals(stop[0]).name}, saved in {run.folder}", stop[0])


def precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in `dtype`, sums and norms in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _end_epoch(model, task: Task, run: Run, progress: Progress, rate: float, device: torch.device) -> None:
    """Evaluate, keep the model if it is the best so far, and add the epoch's row."""
    memory = peak_memory_gb(device)  # of training; evaluation and saving come after
    model.eval()
    with torch.no_grad():
        figures = task.evaluate(model)
    progress.epoch += 1
    for name, value in figures.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} after epoch {progress.epoch}; try a smaller --lr")
    score = figures[task.metric]
    if progress.best is None or (score > progress.best if task.larger_is_better else score < progress.best):
        progress.best, progress.best_epoch = score, progress.epoch
        if processes.is_writer():
            with replacing_folder(run.best) as folder:
                task.save(model, folder)
    progress.rows.append({
        "epoch": progress.epoch, "train_loss": progress.loss_sum / progress.items, **figures, "learning_rate": rate,
        "seconds": round(progress.seconds, 3), "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "peak_memory_gb": None if memory is None else round(memory, 3),
    })  # fmt: skip
    progress.step, progress.loss_sum, progress.items, progress.tokens, progress.seconds = 0, 0.0, 0, 0, 0.0


def _out_of_patience(progress: Progress, config: TrainConfig) -> bool:
    return bool(config.patience) and progress.epoch - progress.best_epoch >= config.patience


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The rate of a step in 0 .. total - 1: a linear rise over the warm-up, then constant, or down to 0."""
    warm = round(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.lr * factor[config.schedule]


def describe(row: dict, epochs: int, best_epoch: int) -> str:
    """One line an epoch, for the screen."""
    figures = [f"{name.replace('_', ' ')} {value:.3f}" for name, value in row.items()
               if name.endswith(("loss", "accuracy", "perplexity", "f1"))]  # fmt: skip
    mark = "  *best*" if best_epoch == row["epoch"] else ""
    return (f"epoch {row['epoch']:>2}/{epochs}  {'  '.join(figures)}  {row['seconds']:.1f} s  "
            f"{row['tokens_per_second']:,.0f} tokens/s{mark}")  # fmt: skip


def _save(run: Run, progress: Progress, parameters, optimizer, scaler, device) -> None:
    state = {
        "progress": vars(progress), "parameters": [parameter.detach() for parameter in parameters],
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
        "rng": processes.from_all(torch.get_rng_state()),
        "cuda_rng": processes.from_all(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }  # fmt: skip
    if processes.is_writer():
        run.save_state(state)


def _restore(run: Run, parameters, optimizer, scaler, device) -> Progress:
    """Take parameters, optimizer and random state from the run's resume state, if it has one."""
    state = run.load_state()
    if state is None:
        if processes.rank():  # dropout of its own; what is random in the model was drawn before, alike everywhere
            torch.manual_seed(torch.initial_seed() + processes.rank())
        return Progress()
    try:
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"][processes.rank() % len(state["rng"])])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state(state["cuda_rng"][processes.rank() % len(state["cuda_rng"])], device)
        return Progress(**state["progress"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{run.state_path} does not fit this model ({error}); delete it to start over") from error


@contextlib.contextmanager
def _signals():
    """Yield a list that gets a signal's number on Ctrl-C or SIGTERM; a second Ctrl-C stops at once."""
    caught: list[int] = []

    def note(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def settings(options: argparse.Namespace) -> tuple[TrainConfig, LoRAConfig, torch.device, torch.dtype]:
    """What every task script needs of its options, checked; fixes the seed of initialisation and dropout."""
    config, lora_config = from_options(TrainConfig, options), from_options(LoRAConfig, options, prefix="lora_")
    device = processes.join(choose_device(config.device, options.use_gpu))
    dtype = choose_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    return config, lora_config, device, dtype


def start(task: str, variant: tuple[str, ...], data: str, files: list[str], model: nn.Module,
          options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Run, str]:  # fmt: skip
    """Open the run's folder and print what is about to be trained; returns the run and a title for its figures."""
    name = "-".join([Path(options.model_size).name, *variant, options.method, f"seed{options.seed}"])
    run = processes.from_writer(lambda: Run(task, name, vars(options), facts(device, dtype, files)))
    model.gpt.checkpointing = options.gradient_checkpointing
    method = "full fine-tuning"
    if options.use_lora:
        method = f"LoRA rank {options.lora_rank} on {', '.join(options.lora_targets)}"
    title = ", ".join([options.model_size, *variant, method])
    counts = parameter_counts(model)
    print(f"{task}, {data}: {title}")
    print(f"{counts['trainable_parameters']:,} of {counts['total_parameters']:,} parameters train, in "
          f"{describe_dtype(dtype, device)}; learning rate {options.lr:g}")  # fmt: skip
    if options.resume:
        saved = "goes on with" if run.state_path.exists() else "finds nothing saved and starts from the beginning in"
        print(f"--resume {saved} {run.folder}")
    return run, title


def choose_device(name: str, use_gpu: bool = False) -> torch.device:
    """`auto` is CUDA where there is one; raises InputError for a device that is not there."""
    if use_gpu and name == "cpu":
        raise InputError("--use_gpu and --device cpu contradict each other; leave one out")
    if name == "auto":
        name = "cuda" if use_gpu or torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name):
        raise InputError(f"--device {name} is not supported; use auto, cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{'--use_gpu' if use_gpu else '--device ' + name}: no such CUDA device here; leave it out")
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products; emulated, they take several times as long as float32's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # torch has no public question


def describe_dtype(dtype: torch.dtype, device: torch.device) -> str:
    """Precision and place of the matrix products, for the screen."""
    has = "multiplies bfloat16" if multiplies_bfloat16(device) else "has no fast bfloat16"
    return f"{str(dtype).removeprefix('torch.')} on {device.type}, which {has}"


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it, else float16 on CUDA, else float32."""
    if name != "auto":
        if name == "float16" and device.type == "cpu":
            raise InputError("--dtype float16 needs CUDA; use auto, bfloat16 or float32")
        return getattr(torch, name)
    if multiplies_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32
