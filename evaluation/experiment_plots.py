"""The plot of an experiment: means of rows, and what depends on parameters or on single texts."""

import math
from collections.abc import Iterable
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure, SubFigure

from evaluation.plots import BLUE, COLORS, axis_label, save
from evaluation.statistics import t_interval
from evaluation.tables import COST, Differences


def draw_experiment(
    path: Path, runs: pd.DataFrame, metrics: Iterable[str], differences: Differences
) -> None:
    """The means of the metrics, and those of the costs where they were measured.

    Above them are the losses by parameters, if rows are named by rank, or the differences of single
    texts in a cross-validation.
    """
    pooled = runs.groupby(["row", "seed"], sort=False).mean(numeric_only=True)  # over folds
    pooled = pooled.dropna(axis="columns", how="all")
    panels = []
    if any(", rank " in row for row in runs["row"]):
        panels.append((4, partial(draw_parameters, runs=pooled)))
    if runs["fold"].nunique() > 1:
        panels.append((4, partial(draw_differences, differences=differences)))
    for names in ([name for name in metrics if name not in COST], COST):
        measured = [name for name in names if name in pooled]
        if measured:
            height = 0.9 + 0.27 * runs["row"].nunique()
            panels.append((height, partial(draw_means, runs=pooled, metrics=measured)))
    heights, drawings = zip(*panels, strict=True)
    figure = Figure((7.5, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), height_ratios=heights, squeeze=False).flat
    for draw, part in zip(drawings, parts, strict=True):
        draw(part)
    save(figure, path)


def draw_means(part: SubFigure, runs: pd.DataFrame, metrics: list[str]) -> None:
    """A point and its 95 % interval over seeds for every row and metric."""
    panels = part.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        means = row_means(runs, metric)
        settings = {"xerr": means["error"], "fmt": "o", "color": BLUE, "capsize": 3}
        axes.errorbar(means["mean"], means.index, **settings)
        axes.set(xlabel=axis_label(metric), ylim=(len(means) - 0.5, -0.5))
        if metric in COST:
            axes.set_xlim(0, 1.05 * (means["mean"] + means["error"].fillna(0)).max())
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)


def draw_parameters(part: SubFigure, runs: pd.DataFrame) -> None:
    """Losses against trainable parameters; rows that share the text before a comma are joined.

    A row without a comma is a horizontal line.
    """
    parameters = runs.groupby("row")["trainable_parameters"].mean()
    panels = part.subplots(1, 2)
    for axes, metric in zip(panels, ("dev_loss", "test_loss"), strict=True):
        means = row_means(runs, metric).assign(x=parameters).sort_values("x")
        groups = means.groupby(means.index.str.replace(",.*", "", regex=True))
        for (name, rows), color in zip(groups, cycle(COLORS), strict=False):
            settings = {"color": color, "label": name}
            if name in rows.index:
                axes.axhline(rows["mean"].item(), linestyle=":", **settings)
            else:
                axes.errorbar("x", "mean", "error", data=rows, fmt="o-", capsize=3, **settings)
        axes.set(xscale="log", xlabel="trainable parameters", ylabel=axis_label(metric))
    part.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def draw_differences(part: SubFigure, differences: Differences) -> None:
    """Sorted differences in the loss of test texts, with their mean and its interval over texts."""
    axes = part.subplots()
    axes.axhline(0, color="0.5", linestyle=":", label="no difference")
    colors = cycle(COLORS)
    for (metric, baseline), members in differences.items():
        for row, difference in members.items():
            if metric == "test_loss":
                low, high = difference.over_texts()
                label = (
                    f"{row} minus {baseline}: {difference.mean:+.3f} ({low:+.3f} to {high:+.3f})"
                )
                color = next(colors)
                axes.plot(sorted(difference.by_text), ".", color=color, label=label)
                axes.axhline(difference.mean, color=color, linewidth=0.8)
                axes.axhspan(low, high, color=color, alpha=0.2)
    axes.set(xlabel="texts, sorted", ylabel=f"difference of {axis_label('test_loss')}")
    part.legend(loc="outside lower center")


def row_means(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The `mean` of a metric for each row, and half of its interval over seeds as `error`."""
    scale = 100 if metric.endswith("accuracy") else 1
    rows = (runs[metric] * scale).groupby("row", sort=False)
    means = rows.agg(mean="mean", error=lambda values: np.ptp(t_interval(values.dropna())) / 2)
    return means.replace(math.inf, math.nan)  # a single seed has no interval
