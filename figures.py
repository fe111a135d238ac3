"""The figures a run leaves: learning curves, and what a learned pooling weighs, in colours for all eyes."""

import io
import textwrap
import warnings
from pathlib import Path

from matplotlib import cm
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from runs import write_bytes

BLUE, ORANGE = "#0072b2", "#d55e00"
COLUMNS = 78  # characters a line, of a text that is drawn


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


def draw_attention(path: Path, examples: list[tuple[str, list[tuple[str, float]]]], title: str) -> None:
    """For each example, a heading and its (token, weight) pairs: the text, darker where the pooling looks.

    A weight is shown as a multiple of what it would be if all tokens of the text counted alike.
    """
    scale = cm.ScalarMappable(Normalize(0, max(weight for _, tokens in examples for _, weight in tokens)), "Blues")
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
                      color="white" if weight > 0.55 * scale.norm.vmax else "black",
                      bbox={"facecolor": scale.to_rgba(weight), "edgecolor": "none", "pad": 1})  # fmt: skip
    figure.colorbar(scale, ax=panels.tolist(), shrink=0.8).set_label("weight, times uniform", fontsize=8)
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
