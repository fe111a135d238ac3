"""What both scripts do before and after training."""

from argparse import Namespace
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from config import LoRAConfig, TrainConfig
from datasets import TextDataset
from evaluation.metrics import Results, metrics_table
from evaluation.plots import draw_curves
from lora import apply_lora, backbone, lora_layers, merge_lora
from models.adapters import base_sha256, weights_sha256
from speed.training import speed_up
from training import distributed
from training.loop import Task, Trainer, best_epoch
from training.options import Hardware, from_options
from training.runs import FILE_OPTIONS, open_run, write_csv, write_json, write_text

Measure = Callable[[nn.Module, TextDataset], Results]
Outputs = dict[str, str]  # path of predictions -> text


def prepare(model: nn.Module, options: Namespace, hardware: Hardware) -> None:
    """Choose what is trained and how; an adapter that the GPT-2 has is trained further."""
    gpt = backbone(model)
    if options.method != "lora":
        merge_lora(gpt).requires_grad_(options.method == "full")
    elif not lora_layers(gpt):
        apply_lora(gpt, from_options(LoRAConfig, options, prefix="lora_"))
    for layer in lora_layers(gpt).values():  # config.json records what the adapter has
        vars(options).update({f"lora_{name}": value for name, value in vars(layer.config).items()})
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


def make_folder(
    variant: tuple[str, ...], model: nn.Module, options: Namespace, hardware: Hardware
) -> Path:
    """Open the run's folder in the main process; `variant` is a part of its name."""
    values = vars(options)
    words = [Path(options.model_size).name, *variant, options.method, f"seed{options.seed}"]
    data = {name: Path(values[name]).read_bytes() for name in FILE_OPTIONS if name in values}
    inputs = {
        "data_sha256": {name: sha256(content).hexdigest() for name, content in data.items()},
        "model_sha256": base_sha256(model),
        "start_sha256": weights_sha256(model.state_dict()),  # with adapter, pooling and head
        "model_config": vars(backbone(model).config),
        "dtype": str(hardware.dtype).removeprefix("torch."),
        "device_type": hardware.device.type,
        "processes": distributed.world_size(),
    }
    return distributed.from_main(lambda: open_run(options.task, "-".join(words), values | inputs))


def train(
    model: nn.Module, task: Task, options: Namespace, run: Path, hardware: Hardware
) -> dict[str, Any]:
    """Train; returns the first entries of summary.json, with times without evaluation."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trainable:,} of {total:,} parameters are trained with learning rate {options.lr:g}")
    print(f"{str(hardware.dtype).removeprefix('torch.')} on {hardware.device}, in {run}")
    epochs = Trainer(model, task, from_options(TrainConfig, options), run, hardware).train()
    best = best_epoch(epochs, task.metric)
    summary = {"task": options.task, "model": options.model_size, "method": options.method}
    summary |= {"seed": options.seed, "lr": options.lr, "trainable_parameters": trainable}
    summary |= {"total_parameters": total, "epochs": len(epochs), "best_epoch": best}
    if epochs:
        table = pd.DataFrame(epochs)
        tokens = (table["tokens_per_second"] * table["seconds"]).sum()
        summary |= {
            "first_train_loss": epochs[0]["train_loss"],
            "final_train_loss": epochs[-1]["train_loss"],
            "best_dev_loss": epochs[best - 1]["dev_loss"],
            "train_seconds": round(table["seconds"].sum(), 3),
            "seconds_per_epoch": round(table["seconds"].mean(), 3),
            "tokens_per_second": round(tokens / table["seconds"].sum(), 1),
            "peak_memory_gb": epochs[-1]["peak_memory_gb"],
        }
    return summary


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
    run: Path, summary: dict[str, Any], results: Results, outputs: Outputs, usage: str
) -> None:
    """Write results, summary.json, plots and the README of the best model, and print metrics.

    `usage` is the command that uses the model.
    """
    metrics, per_text = results
    summary = summary | metrics
    for path, text in outputs.items():
        write_text(run / "predictions" / Path(path).name, text)
    write_csv(run / "per_text.csv", per_text)
    write_json(run / "summary.json", summary)
    if summary["epochs"]:
        table = pd.Series(summary, name="value").rename_axis("metric").to_markdown()
        write_text(run / "best" / "README.md", f"# {run.name}\n\n    {usage}\n\n{table}\n")
        draw_curves(run, run.name, summary.get("base_dev_loss"))
    print(f"\n{metrics_table(metrics)}\n\nmetrics, plots and best model: {run}")
    if summary["epochs"]:
        print(f"next: {usage}")
    write_outputs(outputs)


def write_outputs(outputs: Outputs) -> None:
    """Write predictions where the options name them."""
    for path, text in outputs.items():
        write_text(path, text)
        print(f"predictions: {path}")
