"""Plots of a run (learning curves, weights of a learned pooling) and of an experiment."""

import math
import warnings
from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure

from evaluation import bootstrap_interval, mean_interval
from files import atomic_write

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe-Ito
BLUE, ORANGE = COLORS[:2]
UNITS = {"loss": " (nats)", "accuracy": " (%)"}


def axis_label(metric):
    """The name of a metric with its unit."""
    return metric.replace("_gb", "_(GB)").replace("_", " ") + UNITS.get(
        metric.rpartition("_")[2], ""
    )


def save(figure, path):
    with warnings.catch_warnings(), atomic_write(path) as file:
        warnings.filterwarnings("ignore", "Glyph ")  # not in the font: a box is drawn
        figure.savefig(file, format="png", dpi=150)


def draw_curves(folder, title, base_loss):
    """curves.png of a run: loss, learning rate, gradient norm and dev accuracy over steps."""
    steps = pd.read_csv(folder / "steps.csv")
    epochs = pd.read_csv(folder / "metrics.csv")
    per_epoch = steps["step"].max()
    steps.index = (steps["epoch"] - 1) * per_epoch + steps["step"]
    epochs.index = epochs["epoch"] * per_epoch
    names = ["loss", "learning_rate", "gradient_norm"]
    if "dev_accuracy" in epochs:
        names.append("dev_accuracy")
        epochs["dev_accuracy"] *= 100
    figure = Figure((3.4 * len(names), 3.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(1, len(names))
    for axes, name in zip(panels, names, strict=True):
        axes.set(xlabel="step", ylabel=axis_label(name))
        if name in steps:
            axes.plot(steps[name], color=BLUE, linewidth=0.8, alpha=0.5)
        else:
            axes.plot(epochs[name], color=ORANGE, marker="o")
    smooth = steps["loss"].rolling(max(1, len(steps) // 20), min_periods=1).mean()
    panels[0].plot(smooth, color=BLUE, label="train")
    panels[0].plot(epochs["dev_loss"], color=ORANGE, marker="o", label="dev")
    if base_loss is not None:
        panels[0].axhline(base_loss, color="0.5", linestyle=":", label="dev, base model")
    panels[0].legend(frameon=False)
    save(figure, folder / "curves.png")


def draw_attention(path, weights, title):
    """Bars of token weights, one panel per pair; `weights` has the columns pair, token, weight."""
    pairs = list(weights.groupby("pair", sort=False))
    longest = max(len(tokens) for _, tokens in pairs)
    figure = Figure((max(6, 0.16 * longest), 2.3 * len(pairs)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(len(pairs), squeeze=False, sharey=True).flat
    for axes, (pair, tokens) in zip(panels, pairs, strict=True):
        draw_token_weights(axes, tokens)
        axes.set_title(pair, fontsize=8, loc="left", parse_math=False)
        axes.set_xlim(-1, longest)
    save(figure, path)


def draw_token_weights(axes, weights):
    """Bars of the weights of one pair's tokens, as multiples of the mean."""
    axes.bar(range(len(weights)), weights["weight"], color=BLUE)
    axes.axhline(1, color="0.5", linestyle=":")
    tokens = weights["token"].str.replace("\n", "\u21b5")
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7, parse_math=False)
    axes.set_ylabel("weight / mean")


def draw_experiment(path, panels, runs, differences):
    """The panels of an experiment, one below the other, from the summaries of its runs.

    A panel is "parameters" (losses against trainable parameters), "differences" (of single texts),
    or the names of metrics, which are drawn side by side with their 95 % intervals over seeds.
    """
    panels = [panel for panel in panels if isinstance(panel, str) or set(panel) & set(runs)]
    heights = [4 if isinstance(p, str) else 0.9 + 0.27 * runs["row"].nunique() for p in panels]
    figure = Figure((7, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), height_ratios=heights, squeeze=False).flat
    for panel, part in zip(panels, parts, strict=True):
        if panel == "parameters":
            draw_parameters(part, runs)
        elif panel == "differences":
            draw_differences(part, differences)
        else:
            draw_means(part, runs, panel)
    save(figure, path)


def draw_parameters(part, runs, metrics=("dev_loss", "test_loss")):
    """Losses against trainable parameters; rows that share the text before a comma are joined.

    A row without a comma is a horizontal line.
    """
    parameters = runs.groupby("row")["trainable_parameters"].mean()
    panels = part.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        means = row_means(runs, metric).assign(x=parameters).sort_values("x")
        groups = means.groupby(means.index.str.replace(",.*", "", regex=True))
        for (name, rows), color in zip(groups, cycle(COLORS), strict=False):
            settings = {"color": color, "label": name}
            if name in rows.index:
                axes.axhline(rows["mean"].item(), linestyle=":", **settings)
            else:
                axes.errorbar("x", "mean", "error", data=rows, fmt="o-", capsize=3, **settings)
        axes.set(xscale="log", xlabel="trainable parameters", ylabel=axis_label(metric))
    labels = axes.get_legend_handles_labels()
    part.legend(*labels, loc="outside lower center", ncols=2, frameon=False)


def draw_differences(part, differences):
    """Sorted differences of the loss of single texts, with their mean and its interval."""
    axes = part.subplots()
    for (row, baseline, frame), color in zip(differences, cycle(COLORS), strict=False):
        values = frame.mean()  # over seeds
        low, high = bootstrap_interval(values)
        label = f"{row} minus {baseline}: {values.mean():+.3f} ({low:+.3f} to {high:+.3f})"
        axes.plot(sorted(values), ".", color=color, label=label)
        axes.axhline(values.mean(), color=color, linewidth=0.8)
        axes.axhspan(low, high, color=color, alpha=0.2)
    axes.axhline(0, color="0.5", linestyle=":")
    axes.set(xlabel="texts, sorted", ylabel=f"difference of {axis_label('test_loss')}")
    part.legend(loc="outside lower center", frameon=False)


def draw_means(part, runs, metrics):
    """A point and its 95 % interval over seeds for every row and metric."""
    panels = part.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        means = row_means(runs, metric)
        axes.errorbar(
            means["mean"], means.index, xerr=means["error"], fmt="o", color=BLUE, capsize=3
        )
        axes.set(xlabel=axis_label(metric), ylim=(len(means) - 0.5, -0.5))
        if metric.startswith(("seconds", "peak")):
            axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)


def row_means(runs, metric):
    """`mean` of a metric for each row and half the width of its interval over seeds as `error`."""
    values = runs.reindex(columns=[metric])[metric] * (100 if metric.endswith("accuracy") else 1)
    return values.groupby(runs["row"], sort=False).agg(mean="mean", error=half_width)


def half_width(values):
    values = values.dropna()
    return mean_interval(values)[2] - values.mean() if len(values) > 1 else math.nan
