"""Plots: the learning curves of a run, and the rows of an experiment."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure


def axis_label(metric: str) -> str:
    """The name of a metric with its unit."""
    return metric.replace("_gb", " (GB)").replace("_", " ").replace("loss", "loss (nats)")


def draw_curves(folder: Path, title: str, base_loss: float | None = None) -> None:
    """curves.png of a run: loss, learning rate, gradient norm and dev accuracy over steps."""
    steps = pd.read_csv(folder / "steps.csv")
    epochs = pd.read_csv(folder / "metrics.csv")
    steps.index += 1
    epochs.index = (epochs.index + 1) * steps["step"].max()
    names = ["loss", "learning_rate", "gradient_norm", *epochs.filter(["dev_accuracy"])]
    figure = Figure((3.4 * len(names), 3.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(1, len(names))
    for axes, name in zip(panels, names, strict=True):
        axes.set(xlabel="step", ylabel=axis_label(name))
        axes.plot(steps.get(name, epochs.get(name)), ".-", markersize=3, alpha=0.5, label="train")
    panels[0].plot(epochs["dev_loss"], "o-", color="C1", label="dev")
    if base_loss is not None:
        panels[0].axhline(base_loss, color="0.5", linestyle=":", label="dev, base model")
    panels[0].legend(frameon=False)
    figure.savefig(folder / "curves.png", dpi=150)


def draw_experiment(path: str, runs: pd.DataFrame, metrics: list[str]) -> None:
    """A point and its 95 % interval over seeds for every row and metric that was measured."""
    runs = runs.groupby(["row", "seed"], sort=False).mean(numeric_only=True)  # over folds
    metrics = [name for name in metrics if name in runs.dropna(axis="columns", how="all")]
    rows = runs.index.unique("row")
    figure = Figure((9, 0.9 + 0.27 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        means = row_means(runs, metric).reset_index()
        axes.errorbar("mean", "row", xerr="error", data=means, fmt="o", capsize=3)
        axes.set(xlabel=axis_label(metric), ylim=(len(rows) - 0.5, -0.5))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


def row_means(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The `mean` of a metric for each row, and half of its interval over seeds as `error`."""
    from evaluation.statistics import t_interval  # here: scipy takes a second, which scripts save

    rows = runs.groupby("row", sort=False)[metric]
    means = rows.agg(mean="mean", error=lambda values: np.ptp(t_interval(values.dropna())) / 2)
    return means.replace(np.inf, np.nan)  # a single seed has no interval
