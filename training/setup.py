"""What both scripts do before and after training."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import nn

from config import InputError, LoRAConfig
from lora import apply_lora, backbone, lora_layers, merge_lora
from models.adapters import base_sha256
from modules.attention import DotProductAttention
from speed.training import speed_up
from training import distributed
from training.loop import best_epoch
from training.options import Hardware, from_options
from training.runs import FILE_OPTIONS, Run, file_sha256, write_json, write_text


def check_outputs(options: Namespace, names: tuple[str, ...]) -> None:
    """Raise InputError for an output that cannot be written or would replace another file."""
    values = vars(options)
    used = {Path(values[name]).resolve() for name in FILE_OPTIONS if values.get(name)}
    for name in names:
        path = Path(values[name]).resolve()
        parent = next(parent for parent in path.parents if parent.exists())
        if path in used or path.is_dir() or not parent.is_dir():
            raise InputError(
                f"--{name} {path} is an input, another output, a folder, or inside of a file"
            )
        used.add(path)


def open_run(
    task: str, variant: tuple[str, ...], model: nn.Module, options: Namespace, hardware: Hardware
) -> Run:
    """Open the run's folder in the main process and print what will be trained."""
    values = vars(options)
    method = method_of(options)
    name = [Path(options.model_size).name, *variant, method, f"seed{options.seed}"]
    inputs = {
        "task": task,
        "data_sha256": {n: file_sha256(values[n]) for n in FILE_OPTIONS if values.get(n)},
        "model_sha256": base_sha256(model),
        "model_config": vars(backbone(model).config),
        "dtype": str(hardware.dtype).removeprefix("torch."),
        "device_type": hardware.device.type,
        "processes": distributed.world_size(),
    }
    run = distributed.from_main(lambda: Run(task, "-".join(name), values, inputs))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    run.summary = {"task": task, "model": options.model_size, "method": method}
    run.summary |= {"seed": options.seed, "trainable_parameters": trainable}
    run.summary |= {"total_parameters": total}
    run.title = ", ".join([options.model_size, *variant, describe_method(options)])
    print(
        f"{task}: {run.title}\n"
        f"{trainable:,} of {total:,} parameters are trained with learning rate {options.lr:g}\n"
        f"precision {inputs['dtype']} on {hardware.device}"
    )
    if options.resume:
        print(f"--resume: {run.folder}")
    return run


def method_of(options: Namespace) -> str:
    """full, lora or frozen."""
    if options.use_lora:
        return "lora"
    return "frozen" if vars(options).get("freeze_gpt") else "full"


def describe_method(options: Namespace) -> str:
    """The method of training in words."""
    if options.use_lora:
        config = from_options(LoRAConfig, options, prefix="lora_")
        return f"LoRA rank {config.rank} on {', '.join(config.targets)}"
    return {"full": "full fine-tuning", "frozen": "frozen GPT-2"}[method_of(options)]


def apply_method(model: nn.Module, options: Namespace) -> None:
    """Choose the parameters of GPT-2 that are trained; an adapter of it is trained further."""
    gpt = backbone(model)
    if not options.use_lora:
        merge_lora(gpt).requires_grad_(method_of(options) == "full")
    elif not lora_layers(gpt):
        apply_lora(gpt, from_options(LoRAConfig, options, prefix="lora_"))


def prepare(model: nn.Module, options: Namespace) -> None:
    """Apply the options that change how a model trains, and not what it computes."""
    gpt = backbone(model)
    if options.dropout is not None:
        set_dropout(gpt, options.dropout)
    gpt.gradient_checkpointing = options.gradient_checkpointing
    if options.compile:  # in place, so that the names of parameters stay
        gpt.compile(dynamic=True)
    elif not options.plain:
        speed_up(model)


def set_dropout(gpt: nn.Module, p: float) -> None:
    """Set the three dropout rates of GPT-2."""
    for part in gpt.modules():
        if isinstance(part, nn.Dropout):
            part.p = p
        if isinstance(part, DotProductAttention):
            part.dropout = p


def finish_run(run: Run, epochs: list[dict[str, Any]], metrics: dict[str, Any], usage: str) -> None:
    """Write the README of the best model and summary.json; `usage` tells how to use the model."""
    summary = run.summary | summarize(epochs) | metrics
    if epochs:
        options = run.config["options"]
        names = ("epochs", "lr", "batch_size", "grad_accumulation", "schedule", "seed")
        settings = ", ".join(f"{name} {options[name]}" for name in names)
        rows = [f"| {name} | {value} |" for name, value in summary.items()]
        table = "\n".join(["| metric | value |", "|---|---|", *rows])
        text = f"# {run.title}\n\nThe best epoch of a run with {settings}.\n\n{usage}\n\n{table}\n"
        write_text(run.best / "README.md", text)
    write_json(run.folder / "summary.json", summary)


def summarize(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The training part of summary.json; times are of training without evaluation."""
    if not epochs:
        return {"epochs": 0, "best_epoch": 0, "peak_memory_gb": None}
    metric = "dev_accuracy" if "dev_accuracy" in epochs[0] else "dev_loss"
    best = best_epoch(epochs, metric)
    seconds = sum(record["seconds"] for record in epochs)
    tokens = sum(record["tokens_per_second"] * record["seconds"] for record in epochs)
    return {
        "epochs": len(epochs),
        "best_epoch": best,
        "peak_memory_gb": max(record["peak_memory_gb"] or 0 for record in epochs) or None,
        "first_train_loss": epochs[0]["train_loss"],
        "final_train_loss": epochs[-1]["train_loss"],
        "best_dev_loss": epochs[best - 1]["dev_loss"],
        "train_seconds": round(seconds, 3),
        "seconds_per_epoch": round(seconds / len(epochs), 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "skipped_steps": sum(record["skipped_steps"] for record in epochs),
    }
