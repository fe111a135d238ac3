"""The plot of an experiment: means of rows, and losses by parameters."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from evaluation.plots import axis_label, save
from evaluation.statistics import t_interval


def draw_experiment(path: Path, runs: pd.DataFrame, metrics: list[str]) -> None:
    """A point and its 95 % interval over seeds for every row and metric that was measured.

    Above them are the losses by parameters, if rows are named by rank.
    """
    runs = runs.groupby(["row", "seed"], sort=False).mean(numeric_only=True)  # over folds
    metrics = [name for name in metrics if name in runs.dropna(axis="columns", how="all")]
    height = 0.9 + 0.27 * runs.index.unique("row").size
    figure = part = Figure((9, height), layout="constrained")
    if runs.index.get_level_values("row").str.contains(", rank ").any():
        figure.set_figheight(height + 4)
        top, part = figure.subfigures(2, height_ratios=(4, height))
        draw_parameters(top, runs, ["dev_loss", "test_loss"])
    panels = part.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        means = row_means(runs, metric).reset_index()
        axes.errorbar("mean", "row", xerr="error", data=means, fmt="o", capsize=3)
        axes.set(xlabel=axis_label(metric), ylim=(len(means) - 0.5, -0.5))
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def draw_parameters(part: SubFigure, runs: pd.DataFrame, metrics: list[str]) -> None:
    """Metrics by trainable parameters; rows that share the text before a comma are joined."""
    parameters = runs.groupby("row")["trainable_parameters"].mean()
    panels = part.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        means = row_means(runs, metric).assign(x=parameters).sort_values("x")
        for name, rows in means.groupby(means.index.str.replace(",.*", "", regex=True)):
            axes.errorbar("x", "mean", "error", data=rows, fmt="o-", capsize=3, label=name)
        axes.set(xscale="log", xlabel="trainable parameters", ylabel=axis_label(metric))
    part.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def row_means(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The `mean` of a metric for each row, and half of its interval over seeds as `error`."""
    rows = runs.groupby("row", sort=False)[metric]
    means = rows.agg(mean="mean", error=lambda values: np.ptp(t_interval(values.dropna())) / 2)
    return means.replace(math.inf, math.nan)  # a single seed has no interval
