"""Plots of a run: learning curves, and the weights of a learned pooling."""

import warnings
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE = "C0", "C1"


def axis_label(metric: str) -> str:
    """The name of a metric with its unit."""
    return metric.replace("_gb", " (GB)").replace("_", " ").replace("loss", "loss (nats)")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; the canvas is explicit, because MPLBACKEND may name one that is not there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # not in the font: a box is drawn
        FigureCanvasAgg(figure).figure.savefig(path, format="png", dpi=150)


def draw_curves(folder: Path, title: str, base_loss: float | None = None) -> None:
    """curves.png of a run: loss, learning rate, gradient norm and dev accuracy over steps."""
    steps = pd.read_csv(folder / "steps.csv")
    epochs = pd.read_csv(folder / "metrics.csv")
    per_epoch = steps["step"].max()
    steps.index = (steps["epoch"] - 1) * per_epoch + steps["step"]
    epochs.index = epochs["epoch"] * per_epoch
    names = ["loss", "learning_rate", "gradient_norm", *epochs.filter(["dev_accuracy"])]
    figure = Figure((3.4 * len(names), 3.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(1, len(names))
    for axes, name in zip(panels, names, strict=True):
        axes.set(xlabel="step", ylabel=axis_label(name))
        axes.plot(steps.get(name, epochs.get(name)), ".-", color=BLUE, markersize=3, alpha=0.5)
    smooth = steps["loss"].rolling(max(1, len(steps) // 20), min_periods=1).mean()
    panels[0].plot(smooth, color=BLUE, label="train")
    panels[0].plot(epochs["dev_loss"], color=ORANGE, marker="o", label="dev")
    if base_loss is not None:
        panels[0].axhline(base_loss, color="0.5", linestyle=":", label="dev, base model")
    panels[0].legend(frameon=False)
    save(figure, folder / "curves.png")


def draw_attention(path: Path, weights: pd.DataFrame, title: str) -> None:
    """Bars of token weights, one panel per pair; `weights` has the columns pair, token, weight."""
    pairs = list(weights.groupby("pair", sort=False))
    width = max(6, 0.16 * weights["pair"].value_counts().max())
    figure = Figure((width, 2.3 * len(pairs)), layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(len(pairs), squeeze=False, sharey=True).flat
    for axes, (pair, tokens) in zip(panels, pairs, strict=True):
        draw_token_weights(axes, tokens)
        axes.set_title(pair, fontsize=8, loc="left", parse_math=False)
    save(figure, path)


def draw_token_weights(axes: Axes, weights: pd.DataFrame) -> None:
    """Bars of the weights of one pair's tokens, as multiples of the mean."""
    axes.bar(range(len(weights)), weights["weight"], color=BLUE)
    axes.axhline(1, color="0.5", linestyle=":")
    tokens = weights["token"].str.replace("\n", "\u21b5")
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7, parse_math=False)
    axes.set_ylabel("weight / mean")
