"""Make the tables, the plot and the outputs that README.md shows, and copy tables into documents.

python benchmarks/documents.py        # from the committed results
python benchmarks/documents.py --run  # first run README.md's commands in a fresh clone

In a document, the lines between <!-- FILE --> and <!-- end --> are those of FILE, and between
<!-- FILE N --> and <!-- end --> its Nth paragraph. <!-- FILE N | a, b | PATTERN --> keeps columns
a and b of this table, and the rows that contain a match of the regular expression.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
from matplotlib.figure import Figure

from config import ROOT
from evaluation.plots import axis_label, row_means
from evaluation.tables import format_values, markdown
from experiments import FIRST_SEED, SELECTION_SEEDS, choose, read_runs
from training.runs import write_text

MARKED = re.compile(r"<!-- (\S+)( \d+)?(?: \| (.*?) \| (.*?))? -->\n.*?<!-- end -->", re.DOTALL)
OVERVIEW = ROOT / "results" / "overview"
OUTPUTS = ROOT / "results" / "outputs"
TRAINED = {"poolings": "GPT-2 is trained", "frozen": "GPT-2 is frozen"}  # table -> label
HELD_OUT = {  # rows, and their case in benchmarks/speed.py
    "base model": None,
    "full fine-tuning": "sonnets full ours",
    "LoRA": "sonnets lora ours",
}
# Paragraphs of an output in README.md: the command, the training, a sonnet (but not the metrics).
SHOWN = {"sonnets": 3, "prompt": 2, "pairs": 2, "pair": 2}
COMMANDS = {  # README.md's, by the name of the file with their output
    "sonnets": ["sonnet_generation.py", "--use_lora"],
    "prompt": [
        *("sonnet_generation.py", "--generate", "runs/sonnets/tiny-lora-seed11711/best"),
        *("--prompt", "Shall I compare my laptop to the sun?"),
    ],
    "pairs": ["paraphrase_detection.py", "--pooling", "generalized"],
    "pair": [
        *("paraphrase_detection.py", "--predict"),
        "runs/paraphrases/tiny-generalized-separate-full-seed11711/best",
        *("--pair", "And he went up into the mountain.", "Then he climbed the hill."),
    ],
}


def run_commands():
    """Run COMMANDS in a fresh clone, and keep what they print."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
        for name, command in COMMANDS.items():
            run = [sys.executable, *command]
            text = subprocess.run(run, cwd=folder, check=True, stdout=subprocess.PIPE).stdout
            words = [f'"{word}"' if " " in word else word for word in command]
            block = f"python {' '.join(words)}\n\n{text.decode().strip()}\n"
            write_text(OUTPUTS / f"{name}.txt", block.replace(f"{folder}/", ""))


def write_overview():
    """A table and the plot of README.md's first screen."""
    runs = pd.read_csv(ROOT / "results" / "cross_validation.csv")
    runs["parameters"] = runs["trainable_parameters"].where(runs["epochs"] > 0, 0)
    steps = pd.read_csv(ROOT / "benchmarks" / "results" / "speed-main.csv")
    steps = steps[steps["dtype"] == "float32"].set_index("case")
    table = {}
    for row, case in HELD_OUT.items():
        # All folds of a seed together are the loss of all sonnets.
        by_seed = runs[runs["row"] == row].groupby("seed")[["test_loss", "parameters"]].mean()
        table[row] = {
            "trainable parameters": f"{by_seed['parameters'].mean():,.0f}",
            "loss of held-out sonnets": format_values(by_seed["test_loss"]),
            "seconds per step (124M)": f"{steps['seconds'][case]:.1f}" if case else "",
            "memory, GB (124M)": f"{steps['memory'][case]:.1f}" if case else "",
        }
    methods = pd.DataFrame(table.values(), index=pd.Index(table, name="method"))
    write_text(OVERVIEW.with_suffix(".md"), f"{markdown(methods)}\n")

    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw_parameters(left, chosen_runs("lora_best"))
    draw_poolings(right)
    figure.savefig(OVERVIEW.with_suffix(".png"), dpi=150)


def chosen_runs(name):
    """The runs of a table without those of rejected candidates."""
    runs = read_runs(ROOT / "results" / f"{name}.csv")
    return runs.merge(choose(runs, range(FIRST_SEED, FIRST_SEED + SELECTION_SEEDS)))


def draw_parameters(part, runs):
    """Dev loss by trainable parameters; rows that share the text before a comma are joined."""
    axes = part.subplots()
    means = row_means(runs, "dev_loss")
    means["x"] = runs.groupby("row")["trainable_parameters"].mean()
    means = means.sort_values("x")
    for name, rows in means.groupby(means.index.str.replace(",.*", "", regex=True)):
        axes.errorbar("x", "mean", "error", data=rows, fmt="o-", capsize=3, label=name)
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=axis_label("dev_loss"))
    part.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)


def draw_poolings(part):
    """Test accuracy of each pooling of texts that are encoded alone, and of counting characters."""
    axes, metric = part.subplots(), "test_accuracy"
    for name, label in TRAINED.items():
        runs = chosen_runs(name)
        runs = runs[runs["row"].str.startswith("separate: ")]
        means = row_means(runs, metric).rename(lambda row: row.removeprefix("separate: "))
        points = {"data": means.reset_index(), "fmt": "o", "capsize": 3}
        axes.errorbar("mean", "row", xerr="error", **points, label=label)
    counted = pd.read_csv(ROOT / "results" / "baselines-verses.csv")[metric].iloc[-1]
    axes.axvline(counted, color="0.5", linestyle=":", label="regression on character n-grams")
    axes.set_xlabel(axis_label(metric))
    axes.invert_yaxis()
    part.legend(*axes.get_legend_handles_labels(), loc="outside lower center")


def write_excerpts():
    """The beginning of each output, as README.md shows it."""
    for name in COMMANDS:
        text = (OUTPUTS / f"{name}.txt").read_text(encoding="utf-8")
        paragraphs = re.split("\n{2,}", text.strip())
        shown = "\n\n".join(paragraphs[: SHOWN[name]])
        write_text(OUTPUTS / f"{name}.md", f"```\n{shown}\n```\n")


def select(table, columns, pattern):
    """These columns of a table in markdown, and the rows that contain a match of the pattern."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    frame = pd.DataFrame(rows, columns=header)[columns]
    kept = [bool(re.search(pattern, line)) for line in lines[2:]]
    return markdown(frame[kept].set_index(columns[0]))


def include_tables(document):
    """Replace the marked lines of a document whose source files exist."""

    def fresh(match):
        source, number = ROOT / match[1], match[2]
        text = source.read_text(encoding="utf-8").strip() if source.is_file() else None
        if number and text:
            parts = text.split("\n\n")
            text = parts[int(number) - 1] if int(number) <= len(parts) else None
        if not text:
            return match[0]
        if match[3]:
            text = select(text, match[3].split(", "), match[4])
        mark = match[0].partition("\n")[0]
        return f"{mark}\n{text}\n<!-- end -->"

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
    for document in ROOT.glob("*.md"):
        include_tables(document)
