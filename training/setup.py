"""What both scripts do before and after training."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from config import InputError, LoRAConfig
from datasets import TextDataset
from evaluation.metrics import Results, metrics_table
from evaluation.plots import draw_curves
from lora import apply_lora, backbone, lora_layers, merge_lora
from models.adapters import base_sha256
from speed.training import speed_up
from training import distributed
from training.loop import best_epoch
from training.options import Hardware, from_options
from training.runs import FILE_OPTIONS, Run, file_sha256, write_csv, write_json, write_text

Measure = Callable[[nn.Module, TextDataset], Results]
Outputs = dict[str, tuple[str, str]]  # name in predictions/ -> path of a copy, and the text


def check_outputs(options: Namespace, *names: str) -> None:
    """Raise InputError for an output that cannot be written or would replace another file."""
    values = vars(options)
    used = {Path(values[name]).resolve() for name in FILE_OPTIONS if values.get(name)}
    for name in names:
        path = Path(values[name]).resolve()
        parent = next(parent for parent in path.parents if parent.exists())
        if path in used or path.is_dir() or not parent.is_dir():
            problem = "is an input, another output, a folder, or inside of a file"
            raise InputError(f"--{name} {path} {problem}")
        used.add(path)


def prepare(model: nn.Module, options: Namespace, hardware: Hardware) -> None:
    """Choose what is trained and how; an adapter that the GPT-2 has is trained further."""
    gpt = backbone(model)
    if not options.use_lora:
        merge_lora(gpt).requires_grad_(options.method == "full")
    elif not lora_layers(gpt):
        apply_lora(gpt, from_options(LoRAConfig, options, prefix="lora_"))
    if options.dropout is not None:
        gpt.dropout.p = options.dropout
        for layer in gpt.layers:
            layer.dropout.p = layer.attention.attend.dropout = options.dropout
    gpt.gradient_checkpointing = options.gradient_checkpointing
    model.to(hardware.device)
    if options.compile:  # in place, so that the names of parameters stay
        gpt.compile(dynamic=True)
    elif not options.plain:
        speed_up(model)


def open_run(
    task: str, variant: tuple[str, ...], model: nn.Module, options: Namespace, hardware: Hardware
) -> Run:
    """Open the run's folder in the main process and print what will be trained."""
    values, method = vars(options), options.method
    inputs = {
        "task": task,
        "data_sha256": {name: file_sha256(values[name]) for name in FILE_OPTIONS if name in values},
        "model_sha256": base_sha256(model),
        "model_config": vars(backbone(model).config),
        "dtype": str(hardware.dtype).removeprefix("torch."),
        "device_type": hardware.device.type,
        "processes": distributed.world_size(),
    }
    name = "-".join([Path(options.model_size).name, *variant, method, f"seed{options.seed}"])
    run = distributed.from_main(lambda: Run(task, name, values | inputs))
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.summary = {"task": task, "model": options.model_size, "method": method}
    run.summary |= {"seed": options.seed, "trainable_parameters": trainable}
    run.summary |= {"total_parameters": total}
    run.title = ", ".join([options.model_size, *variant, method])
    print(
        f"{task}: {run.title}\n{trainable:,} of {total:,} parameters are trained with learning "
        f"rate {options.lr:g}\nprecision {inputs['dtype']} on {hardware.device}, in {run.folder}"
    )
    return run


def evaluate(
    measure: Measure, hardware: Hardware, model: nn.Module, datasets: dict[str, TextDataset]
) -> Results:
    """The metrics of all splits, and the results of their texts with the column `split`."""
    metrics, frames = {}, []
    for split, dataset in datasets.items():
        with hardware.autocast():
            values, texts = measure(model, dataset)
        metrics |= {f"{split}_{name}": value for name, value in values.items()}
        frames.append(texts.assign(split=split))
    return metrics, pd.concat(frames)


def finish_run(
    run: Run, metrics: dict[str, Any], per_text: pd.DataFrame, outputs: Outputs, usage: str
) -> None:
    """Write results, summary.json, plots and the README of the best model, and print metrics.

    `usage` is the command that uses the model.
    """
    summary = run.summary | metrics
    for name, (_, text) in outputs.items():
        write_text(run.folder / "predictions" / name, text)
    write_csv(run.folder / "per_text.csv", per_text)
    write_json(run.folder / "summary.json", summary)
    for path, text in outputs.values():
        write_text(path, text)
    if summary["epochs"]:
        table = pd.Series(summary, name="value").rename_axis("metric").to_markdown()
        title = f"# {run.title}\n\nThe best epoch of a run of this project."
        write_text(run.best / "README.md", f"{title}\n\n    {usage}\n\n{table}\n")
        draw_curves(run.folder, run.title, summary.get("base_dev_loss"))
        print(f"\nnext: {usage}")
    paths = ", ".join(path for path, _ in outputs.values())
    print(f"\n{metrics_table(metrics)}\n\npredictions: {paths}")
    print(f"metrics, plots and best model: {run.folder}")


def summarize(epochs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The training part of summary.json; times are of training without evaluation."""
    if not epochs:
        return {"epochs": 0, "best_epoch": 0, "peak_memory_gb": None}
    table = pd.DataFrame(epochs)
    best, seconds = best_epoch(epochs, metric), table["seconds"].sum()
    speed = np.average(table["tokens_per_second"], weights=table["seconds"])
    return {
        "epochs": len(table),
        "best_epoch": best,
        "peak_memory_gb": epochs[-1]["peak_memory_gb"],
        "first_train_loss": epochs[0]["train_loss"],
        "final_train_loss": epochs[-1]["train_loss"],
        "best_dev_loss": epochs[best - 1]["dev_loss"],
        "train_seconds": round(seconds, 3),
        "seconds_per_epoch": round(seconds / len(table), 3),
        "tokens_per_second": round(speed, 1),
        "skipped_steps": int(table["skipped_steps"].sum()),
    }
