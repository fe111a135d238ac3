"""The report of an experiment: means of rows, their differences, and verdicts, in markdown."""

import re
from itertools import product

import numpy as np
import pandas as pd

from config import ROOT
from evaluation.statistics import Difference, Interval, verdicts

COST = ["seconds_per_epoch", "peak_memory_gb"]
COLUMNS = """dev_loss test_loss test_bits_per_character dev_accuracy test_accuracy test_macro_f1
test_chrf test_rhymes test_14_line_rate test_copied_5grams trainable_parameters best_epoch
seconds_per_epoch peak_memory_gb""".split()  # of the first table
DIFFERENCE_COLUMNS = ["row", "metric", "baseline", "difference", "95 % CI over seeds"]
DIFFERENCE_COLUMNS += ["95 % CI over texts", "95 % CI over both", "margin", "verdict"]
NOTES = """Losses are in nats per token, or per pair; a sonnet counts by its share of the tokens.
A verdict uses the interval over seeds and texts (for costs, over seeds) with Holm's correction for
the rows of a metric and baseline. Times and memory are of runs with --jobs 1."""


def metric_by_seed(runs: pd.DataFrame, texts: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Values whose mean is the metric: a line per row and seed, a column per fold and text.

    The loss of a sonnet is multiplied by its number of tokens relative to the mean of its run.
    """
    if metric in COST:
        return runs.reindex(columns=["row", "seed", metric]).groupby(["row", "seed"]).mean()
    split, _, name = metric.partition("_")
    texts = texts[texts["split"] == split].copy()
    texts["value"] = texts["correct" if name == "accuracy" else "loss"]
    if "tokens" in texts:
        run = texts.groupby(["row", "seed", "fold"])
        texts["value"] *= texts["tokens"] / run["tokens"].transform("mean")
    return texts.pivot(index=["row", "seed"], columns=["fold", "id"], values="value")


def compare(
    runs: pd.DataFrame, texts: pd.DataFrame, comparisons: dict[str, str], margins: dict[str, float]
) -> pd.DataFrame:
    """The differences of rows to their baselines over common seeds: intervals and verdicts.

    `comparisons` maps a baseline to a pattern, with which the names of the other rows begin.
    """
    records = []
    for metric, (baseline, pattern) in product(margins, comparisons.items()):
        values = metric_by_seed(runs, texts, metric)
        measured = values.index.unique("row")  # not all, if test pairs have no labels
        values = values.loc[[row for row in runs["row"].unique() if row in measured]]
        subtracted = values.query("row == @baseline").droplevel("row")
        by_row = values.sub(subtracted, level="seed").dropna().groupby("row", sort=False)
        rows = [row for row, _ in by_row if row != baseline and re.match(pattern, row)]
        differences = [Difference(by_row.get_group(row).to_numpy()) for row in rows]
        intervals = [d.over_seeds if metric in COST else d.over_both for d in differences]
        decided = verdicts(intervals, margins[metric])
        for row, difference, verdict in zip(rows, differences, decided, strict=True):
            ends = (difference.over_seeds(), difference.over_texts(), difference.over_both())
            cells = [f"{difference.mean:+.3f}", *map(format_interval, ends), margins[metric] or ""]
            records.append([row, metric, baseline, *cells, verdict])
    return pd.DataFrame(records, columns=DIFFERENCE_COLUMNS)


def format_interval(interval: Interval) -> str:
    """Both ends, or nothing for a single seed or text."""
    return " to ".join(f"{end:+.3f}" for end in interval) if np.isfinite(interval).all() else ""


def format_values(values: pd.Series) -> str:
    """Mean and standard deviation in about four digits; a whole number as it is."""
    mean, deviation = values.mean(), values.std()
    if pd.isna(mean):
        return ""
    digits = 0 if (values == int(mean)).all() else max(0, 4 - len(str(int(abs(mean)))))
    text = f"{mean:,.{digits}f}"
    return f"{text} \u00b1 {deviation:,.{digits}f}" if deviation > 1e-12 else text


def markdown(table: pd.DataFrame) -> str:
    table = table.rename(columns=lambda name: name.replace("_", " "))
    return table.to_markdown(disable_numparse=True, index=table.index.name is not None)


def report(runs: pd.DataFrame, differences: pd.DataFrame) -> str:
    """The report in markdown."""
    shown = [markdown(table) for table in (means_table(runs), differences) if len(table)]
    commits = runs[["commit", "dtype"]].value_counts()
    counts = ", ".join(f"{count} of {' '.join(key)}" for key, count in commits.items())
    end = f"Runs by commit (+: edited code) and precision: {counts}.\n"
    return "\n\n".join([*shown, NOTES, end])


def read_baselines(runs: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of classifiers that count, on the bundled or Quora's pairs; else empty."""
    if "dataset" not in runs or runs["dataset"].isna().any():
        return pd.DataFrame()
    name = f"baselines-{runs['dataset'].iloc[0]}.csv"  # written by data/build/baselines.py
    return pd.read_csv(ROOT / "results" / name, index_col="baseline").map("{:.3f}".format)


def means_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation over seeds of the main metrics; then baselines without a model."""
    by_seed = runs.groupby(["row", "seed"], sort=False).mean(numeric_only=True)  # over folds
    means = by_seed.filter(COLUMNS).dropna(axis="columns", how="all")
    table = means.groupby("row", sort=False).agg(format_values)
    by_row = runs.groupby("row")
    table["seeds"] = by_row["seed"].nunique().astype(str)
    if runs["chosen"].any():
        table["chosen"] = by_row["chosen"].agg(lambda names: "; ".join(names.unique()))
    accuracies = read_baselines(runs).filter(list(means))
    return pd.concat([table, accuracies]).rename_axis("row").fillna("")
