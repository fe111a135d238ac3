"""Figures of a run (learning curves, what a learned pooling weighs) and of an experiment, in colours for all eyes."""

import csv
import io
import textwrap
import warnings
from itertools import cycle
from pathlib import Path

from matplotlib import cm
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from config import ROOT
from evaluation import mean_interval
from runs import write_bytes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito 2008
BLUE, ORANGE = COLOURS[:2]
COLUMNS = 78  # characters a line, of a text that is drawn
LABELS = {"train_loss": "train loss (nats)", "dev_loss": "dev loss (nats)", "test_loss": "test loss (nats)",
          "dev_accuracy": "dev accuracy (%)", "test_accuracy": "test accuracy (%)",
          "seconds_per_epoch": "time per epoch (s)", "peak_memory_gb": "peak memory (GB)"}  # fmt: skip


def draw_curves(path: Path, rows: list[dict], title: str, base_loss: float | None = None) -> None:
    """Train and dev loss an epoch, beside the untrained base's dev loss; and dev accuracy where the task has one."""
    panels = 1 + ("dev_accuracy" in rows[0])
    figure = Figure(figsize=(6 if panels == 1 else 8, 3.6), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    epochs = [row["epoch"] for row in rows]
    if base_loss is not None:
        axes[0].axhline(base_loss, color="0.5", linestyle=":", label="base, dev")
    axes[0].plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker="o", label="train")
    axes[0].plot(epochs, [row["dev_loss"] for row in rows], color=ORANGE, marker="s", label="dev")
    axes[0].set(xlabel="epoch", ylabel="loss (nats a token)" if panels == 1 else "loss (nats a pair)")
    axes[0].legend(frameon=False)
    if panels == 2:
        axes[1].plot(epochs, [100 * row["dev_accuracy"] for row in rows], color=ORANGE, marker="s")
        axes[1].set(xlabel="epoch", ylabel="dev accuracy (%)")
    for each in axes:
        each.set_xlim(0.5, len(epochs) + 0.5)
        each.xaxis.get_major_locator().set_params(integer=True)
    save(figure, path)


def draw_experiment(path: Path, panels: tuple, found: dict[str, list[dict]]) -> None:
    """Panels, one below the other, of an experiment's rows and the summaries of their runs.

    A panel is "curves" (losses over epochs), "parameters" (trainable ones against dev loss) or names figures.
    """
    heights = [3.2 if isinstance(panel, str) else 0.9 + 0.27 * len(found) for panel in panels]
    figure = Figure(figsize=(5.4, sum(heights)), layout="constrained")  # at half a page's width still legible
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for panel, part in zip(panels, parts, strict=True):
        {"curves": _draw_epochs, "parameters": _draw_parameters}.get(panel, _draw_means)(part, found, panel)
    save(figure, path)


def _draw_epochs(part: SubFigure, found: dict[str, list[dict]], _) -> None:
    """Mean and range over seeds of the train and dev loss, for as many epochs as every seed has."""
    trained = {row: [run for run in runs if run.get("best_epoch")] for row, runs in found.items()}
    panels = part.subplots(1, 2)
    for row, colour, style in zip(filter(trained.get, trained), cycle(COLOURS), cycle(("-", "--", ":", "-."))):
        files = [(ROOT / run["folder"] / "metrics.csv").read_text().splitlines() for run in trained[row]]
        for axes, name in zip(panels, ("train_loss", "dev_loss"), strict=True):
            losses = list(zip(*([float(line[name]) for line in csv.DictReader(file)] for file in files), strict=False))
            epochs = range(1, len(losses) + 1)
            mean = [sum(seeds) / len(seeds) for seeds in losses]
            axes.plot(epochs, mean, style, marker="o", markersize=3, color=colour, label=row)
            axes.fill_between(epochs, [*map(min, losses)], [*map(max, losses)], color=colour, alpha=0.25, linewidth=0)
            axes.set(xlabel="epoch", ylabel=LABELS[name])
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    part.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def _draw_parameters(part: SubFigure, found: dict[str, list[dict]], _) -> None:
    """Dev loss against trainable parameters; a line joins rows that share what stands before their comma."""
    axes, groups = part.subplots(), {}
    for row in found:
        if interval := _interval(found[row], "dev_loss"):
            known = _interval(found[row], "trainable_parameters")[0]
            groups.setdefault(row.partition(",")[0], []).append((known, *interval))
    for group, colour, marker in zip(groups, cycle(COLOURS), cycle("osD^v")):
        count, mean, *errors = zip(*sorted(groups[group]), strict=True)
        axes.errorbar(count, mean, errors, fmt=f"{marker}-", color=colour, capsize=3, label=group)
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=LABELS["dev_loss"])
    part.legend(loc="outside lower center", ncols=3, frameon=False)


def _draw_means(part: SubFigure, found: dict[str, list[dict]], names: tuple[str, ...]) -> None:
    """A dot and its 95 % interval over seeds for every row, the figures side by side; times and memory from 0 on."""
    panels = part.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        for place, runs in enumerate(found.values()):
            if interval := _interval(runs, name):
                axes.errorbar(interval[0], place, xerr=[[interval[1]], [interval[2]]], fmt="o", color=BLUE, capsize=3)
        axes.set_xlabel(LABELS.get(name, name.replace("_", " ")))
        if name.startswith(("seconds", "peak")):
            axes.set_xlim(0, 1.1 * axes.get_xlim()[1])
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set(yticks=range(len(found)), yticklabels=found, ylim=(len(found) - 0.5, -0.5))


def _interval(runs: list[dict], name: str) -> tuple[float, float, float] | None:
    """A figure's mean over the runs that have it, and how far its interval reaches down and up; a share in %."""
    values = [run[name] * (100 if name.endswith("accuracy") else 1) for run in runs if run.get(name) is not None]
    mean, low, high = mean_interval(values) if len(values) > 1 else values * 3 or (0, 0, 0)
    return (mean, mean - low, high - mean) if values else None


def draw_attention(path: Path, examples: list[tuple[str, list[tuple[str, float]]]], title: str) -> None:
    """For each example, a heading and its (token, weight) pairs: the text, on purple where the pooling looks.

    A weight is shown as a multiple of what it would be if all tokens of the text counted alike: that is white, and
    less is orange. The scale reaches 2 at least, so that a pooling that weighs nearly alike looks so.
    """
    most = max([2, *(weight for _, tokens in examples for _, weight in tokens)])
    scale = cm.ScalarMappable(Normalize(2 - most, most), "PuOr")
    texts = [_wrapped(tokens) for _, tokens in examples]
    lines = [1 + tokens[-1][1] for tokens in texts]
    figure = Figure(figsize=(8, 0.6 + 0.35 * len(lines) + 0.25 * sum(lines)), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    panels = figure.subplots(len(lines), 1, squeeze=False, height_ratios=lines)[:, 0]
    for axes, (heading, _), tokens, count in zip(panels, examples, texts, lines, strict=True):
        axes.set(xlim=(0, COLUMNS), ylim=(count, 0))
        axes.axis("off")
        axes.set_title(textwrap.shorten(heading, 100), fontsize=8, loc="left", parse_math=False)
        for column, line, shown, weight in tokens:
            axes.text(column, line + 0.5, shown, family="monospace", fontsize=8.5, va="center", parse_math=False,
                      color="white" if sum(scale.to_rgba(weight)[:3]) < 1.4 else "black",
                      bbox={"facecolor": scale.to_rgba(weight), "edgecolor": "none", "pad": 1})  # fmt: skip
    bar = figure.colorbar(scale, ax=panels.tolist(), shrink=0.8)
    bar.set_label("weight, times uniform", fontsize=8)
    bar.ax.set_ylim(0, most)
    save(figure, path)


def _wrapped(tokens: list[tuple[str, float]]) -> list[tuple[int, int, str, float]]:
    """Column, line, text and weight of each token, wrapped at COLUMNS characters."""
    placed, column, line = [], 0, 0
    for token, weight in tokens:
        shown = token.replace("\n", "\u21b5")
        if column + len(shown) > COLUMNS:
            column, line = 0, line + 1
        placed.append((column, line, shown, weight))
        column += len(shown)
    return placed


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # of a script that the font lacks: a box is drawn
        figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())
