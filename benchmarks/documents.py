"""Make the tables, the plot and the outputs that README.md shows, and copy tables into documents.

python benchmarks/documents.py        # from the committed results
python benchmarks/documents.py --run  # first run README.md's commands in a fresh clone

In a document, the lines between <!-- FILE --> and <!-- end --> are those of FILE, and between
<!-- FILE N --> and <!-- end --> its Nth paragraph.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import ROOT
from datasets import read_pairs
from evaluation import bootstrap_interval, mean_interval
from experiments import combine, format_values, markdown, stored_run
from files import write_text
from plots import draw_parameters, draw_token_weights, save
from pooling import POOLINGS

MARKED = re.compile(r"<!-- (\S+)( \d+)? -->\n.*?<!-- end -->", re.DOTALL)
OVERVIEW = ROOT / "results" / "overview"
DISAGREEMENTS = ROOT / "results" / "disagreements.md"
OUTPUTS = ROOT / "results" / "outputs"
TOKEN_WEIGHTS = OUTPUTS / "attention.csv"
HELD_OUT = {"base model": None, "full fine-tuning": "ours, full", "LoRA": "ours, LoRA"}
# Paragraphs of an output in README.md: the command, the training, a sonnet (but not the metrics).
SHOWN = {"sonnets": 3, "prompt": 2, "pairs": 2, "pair": 2}
COMMANDS = {  # README.md's, by the name of the file with their output
    "sonnets": ["sonnet_generation.py", "--use_lora"],
    "prompt": [
        *("sonnet_generation.py", "--generate_only"),
        *("--adapter", "runs/sonnets/tiny-lora-seed11711/best"),
        *("--prompt", "Shall I compare my laptop to the sun?"),
    ],
    "pairs": ["paraphrase_detection.py", "--pooling", "generalized"],
    "pair": [
        *("paraphrase_detection.py", "--predict_only"),
        *("--model", "runs/paraphrases/tiny-generalized-separate-full-seed11711/best"),
        *("--pair", "And he went up into the mountain.", "Then he climbed the hill."),
    ],
}


def run_commands():
    """Run COMMANDS in a fresh clone; keep what they print, and the token weights."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        for name, command in COMMANDS.items():
            run = [sys.executable, *command]
            text = subprocess.run(run, cwd=folder, check=True, stdout=subprocess.PIPE).stdout
            words = [f'"{word}"' if " " in word else word for word in command]
            block = f"python {' '.join(words)}\n\n{text.decode().strip()}\n"
            write_text(OUTPUTS / f"{name}.txt", block.replace(f"{folder}/", ""))
        [weights] = Path(folder, "runs").glob("paraphrases/*/attention.csv")
        shutil.copy(weights, TOKEN_WEIGHTS)


def write_overview():
    """The tables and the plot of README.md's first screen."""
    runs = pd.read_csv(ROOT / "results" / "cross_validation.csv")
    runs["parameters"] = runs["trainable_parameters"].where(runs["epochs"] > 0, 0)
    steps = pd.read_csv(ROOT / "benchmarks" / "results" / "sonnets.csv")
    steps = steps[steps["dtype"] == "float32"].set_index("case")
    table = {}
    for row, case in HELD_OUT.items():
        # All folds of a seed together are the loss of all sonnets.
        by_seed = runs[runs["row"] == row].groupby("seed")[["test_loss", "parameters"]].mean()
        table[row] = {
            "trainable parameters": f"{by_seed['parameters'].mean():,.0f}",
            "loss of held-out sonnets": format_values(by_seed["test_loss"]),
            "seconds per step (124M)": f"{steps['step_s'][case]:.1f}" if case else "",
            "memory, GB (124M)": f"{steps['peak_gb'][case]:.1f}" if case else "",
        }
    methods = pd.DataFrame(table.values(), index=pd.Index(table, name="method"))
    runs = pd.read_csv(ROOT / "results" / "poolings.csv")
    runs = runs[runs["row"].str.startswith("separate: ")]
    runs["pooling"] = runs["row"].str.removeprefix("separate: ")
    pairs = runs.groupby("pooling", sort=False)[["test_accuracy", "test_loss"]].agg(format_values)
    write_text(OVERVIEW.with_suffix(".md"), f"{markdown(methods)}\n\n{markdown(pairs)}\n")

    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2)
    runs = pd.read_csv(ROOT / "results" / "lora_best.csv")
    draw_parameters(left, runs, ["dev_loss"])
    weights = pd.read_csv(TOKEN_WEIGHTS, keep_default_na=False)
    shortest = weights["pair"].value_counts(sort=False).idxmin()
    example = weights[weights["pair"] == shortest]
    draw_token_weights(right.subplots(), example)
    save(figure, OVERVIEW.with_suffix(".png"))


def correct_pairs(name):
    """For each pooling with separate encoding, which test pairs its runs classify correctly.

    Frames of 0 and 1 with a row per seed and the pairs sorted by id, from the table `name`.
    """
    runs = pd.read_csv(ROOT / "results" / f"{name}.csv")
    correct = {}
    for pooling in POOLINGS:
        by_seed = runs[runs["row"] == f"separate: {pooling}"].set_index("seed")["run"]
        texts = [stored_run(run)["texts"]["test_accuracy"] for run in by_seed]
        correct[pooling] = pd.DataFrame(texts, index=by_seed.index)
    return correct


def differing_pairs(first, second):
    """The mean number of pairs that two runs with different seeds classify differently."""
    counts = np.abs(first.to_numpy()[:, None] - second.to_numpy()).sum(2)
    return counts[first.index.to_numpy()[:, None] != second.index.to_numpy()].mean()


def write_disagreements():
    """On how many pairs of verses the poolings differ, how accurate they are, and examples."""
    correct = correct_pairs("poolings")
    counts = {
        pooling: {
            other: f"{differing_pairs(first, second):.0f}" for other, second in correct.items()
        }
        for pooling, first in correct.items()
    }
    counts = pd.DataFrame(counts).rename_axis("pooling")
    pairs = read_pairs(ROOT / "data" / "verses-test.csv").sort_values("id")
    pairs = pairs.assign(**{name: 100 * runs.mean().to_numpy() for name, runs in correct.items()})
    kinds = kinds_of_pairs(pairs)
    tables = counts, accuracy_by_kind(pairs, kinds), advantages(correct, kinds), examples(pairs)
    write_text(DISAGREEMENTS, "\n\n".join(map(markdown, tables)) + "\n")


def kinds_of_pairs(pairs):
    """Names and boolean arrays; a half is above or below the median of all pairs.

    Words mislead if the same verse has few in common, or different verses many.
    """
    texts = pairs[["sentence1", "sentence2"]]
    words = texts.map(lambda text: set(re.findall(r"\w+", text.lower()))).to_numpy()
    overlap = np.array([len(first & second) / len(first | second) for first, second in words])
    characters = texts.map(len).sum(axis=1).to_numpy()
    same = pairs["label"].to_numpy() == 1
    similar = overlap > np.median(overlap)
    longer = characters > np.median(characters)
    return {
        "all": characters > 0,
        "the same verse": same,
        "different verses": ~same,
        "the same verse, few common words": same & ~similar,
        "different verses, many common words": ~same & similar,
        "misleading words": same != similar,
        "shorter half": ~longer,
        "longer half": longer,
    }


def accuracy_by_kind(pairs, kinds):
    """The accuracy (%) of each pooling on kinds of pairs; `pairs` has a column per pooling."""
    accuracy = {kind: pairs.loc[chosen, list(POOLINGS)].mean() for kind, chosen in kinds.items()}
    table = pd.DataFrame(accuracy).T.map("{:.1f}".format).rename_axis("pairs")
    table.insert(0, "number", [str(chosen.sum()) for chosen in kinds.values()])
    return table


def advantages(correct, kinds):
    """How much larger the gain over the last token is on a kind of pairs than on all others.

    In percentage points, with half of the 95 % interval over seeds and texts.
    """
    table = {}
    for kind in ("different verses", "misleading words", "longer half"):
        chosen = kinds[kind]
        weights = np.where(chosen, 1 / chosen.mean(), -1 / (1 - chosen.mean()))
        cells = {}
        for pooling in list(POOLINGS)[1:]:
            gains = (100 * weights * (correct[pooling] - correct["last"])).dropna()
            mean, *over_seeds = mean_interval(gains.mean(axis=1))
            low, high = combine(mean, over_seeds, bootstrap_interval(gains.mean()))
            cells[pooling] = f"{mean:+.1f} \u00b1 {(high - low) / 2:.1f}"
        table[f"{kind}, minus others"] = cells
    return pd.DataFrame(table).T.rename_axis("gain over the last token")


def examples(pairs, number=3):
    """Pairs on which generalized pooling gains most over the last token, and loses most.

    Of equal ones, the first.
    """
    gain = pairs["generalized"] - pairs["last"]
    chosen = pairs.loc[[*gain.nlargest(number).index, *gain.nsmallest(number).index]]
    chosen["label"] = chosen["label"].map({0: "no", 1: "yes"})
    for pooling in POOLINGS:
        chosen[pooling] = chosen[pooling].map("{:.0f}".format)
    return chosen[["sentence1", "sentence2", "label", *POOLINGS]]


def write_excerpts():
    """The beginning of each output, as README.md shows it."""
    for name in COMMANDS:
        text = (OUTPUTS / f"{name}.txt").read_text(encoding="utf-8")
        paragraphs = re.split("\n{2,}", text.strip())
        shown = "\n\n".join(paragraphs[: SHOWN[name]])
        write_text(OUTPUTS / f"{name}.md", f"```\n{shown}\n```\n")


def include_tables(document):
    """Replace the marked lines of a document whose source files exist."""

    def fresh(match):
        source, number = ROOT / match[1], match[2]
        text = source.read_text(encoding="utf-8").strip() if source.is_file() else None
        if number and text:
            parts = text.split("\n\n")
            text = parts[int(number) - 1] if int(number) <= len(parts) else None
        return f"<!-- {match[1]}{number or ''} -->\n{text}\n<!-- end -->" if text else match[0]

    before = document.read_text(encoding="utf-8")
    after = MARKED.sub(fresh, before)
    if after != before:
        write_text(document, after)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run README.md's commands again")
    if parser.parse_args().run:
        run_commands()
    write_excerpts()
    write_overview()
    write_disagreements()
    for document in ROOT.glob("*.md"):
        include_tables(document)
