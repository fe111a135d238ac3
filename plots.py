"""Plots of a run (learning curves, weights of a learned pooling) and of an experiment."""

import warnings
from itertools import cycle

import pandas as pd
from matplotlib.figure import Figure

from evaluation import mean_interval
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


def draw_experiment(path, panels, runs):
    """The panels of an experiment, one below the other, from the summaries of its runs.

    A panel is "parameters" (dev loss against trainable parameters), or the names of metrics, which
    are drawn side by side with their 95 % intervals over seeds.
    """
    rows = list(runs.groupby("row", sort=False))
    heights = [3.2 if panel == "parameters" else 0.9 + 0.27 * len(rows) for panel in panels]
    figure = Figure((6, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(panels), height_ratios=heights, squeeze=False).flat
    for panel, part in zip(panels, parts, strict=True):
        if panel == "parameters":
            draw_parameters(part, rows)
        else:
            draw_means(part, rows, panel)
    save(figure, path)


def draw_parameters(part, rows):
    """Dev loss against trainable parameters; rows that share the text before a comma are joined."""
    axes, groups = part.subplots(), {}
    for row, runs in rows:
        if interval := metric_interval(runs, "dev_loss"):
            point = (runs["trainable_parameters"].mean(), *interval)
            groups.setdefault(row.partition(",")[0], []).append(point)
    for (group, points), color in zip(groups.items(), cycle(COLORS), strict=False):
        parameters, mean, *errors = zip(*sorted(points), strict=True)
        axes.errorbar(parameters, mean, errors, fmt="o-", color=color, capsize=3, label=group)
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=axis_label("dev_loss"))
    part.legend(loc="outside lower center", ncols=3, frameon=False)


def draw_means(part, rows, metrics):
    """A point and its 95 % interval over seeds for every row and metric."""
    panels = part.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for y, (_, runs) in enumerate(rows):
            if interval := metric_interval(runs, metric):
                mean, below, above = interval
                axes.errorbar(mean, y, xerr=[[below], [above]], fmt="o", color=BLUE, capsize=3)
        axes.set(xlabel=axis_label(metric), ylim=(len(rows) - 0.5, -0.5))
        if metric.startswith(("seconds", "peak")):
            axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row for row, _ in rows])


def metric_interval(runs, metric):
    """Mean of a metric and how far its interval reaches below and above, accuracies in percent."""
    values = runs[metric].dropna() if metric in runs else ()
    if not len(values):
        return None
    if metric.endswith("accuracy"):
        values = 100 * values
    if len(values) == 1:
        return values.iloc[0], 0, 0
    mean, low, high = mean_interval(values)
    return mean, mean - low, high - mean
