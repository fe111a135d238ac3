"""The report of an experiment: means of rows, their differences, and verdicts, in markdown."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from config import ROOT
from evaluation.statistics import Difference, Interval, verdicts

COST = ["seconds_per_epoch", "peak_memory_gb"]
COLUMNS = """dev_loss test_loss test_bits_per_character dev_accuracy test_accuracy test_macro_f1
test_chrf test_rhymes test_14_line_rate test_copied_5grams trainable_parameters best_epoch
seconds_per_epoch peak_memory_gb""".split()  # of the first table
NOTES = """Losses are in nats per token, or per pair; a sonnet counts by its share of the tokens.
The interval over seeds (Student's t) is about other training runs and the same texts, that over
texts (bootstrap) about other texts and the same runs. A verdict uses the interval over both (over
seeds for costs) with Holm's correction for the rows of a metric and baseline, so that a 95 %
interval without zero may stay undecided. Dev metrics also chose epochs and candidates. Times are
of training alone, and memory is the peak of the process, both of runs with --jobs 1."""
SOURCES = {"Shakespeare": "gold_", "random lines": "random_"}  # of texts without a model
Comparisons = Mapping[str, Iterable[str]]  # baseline -> rows


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
    comparisons: Comparisons, margins: dict[str, float], runs: pd.DataFrame, texts: pd.DataFrame
) -> pd.DataFrame:
    """The differences of rows to their baselines over common seeds: intervals and verdicts."""
    records = []
    for metric, margin in margins.items():
        values = metric_by_seed(runs, texts, metric)
        found = set(values.index.unique("row"))
        for baseline, rows in comparisons.items():
            others = [row for row in rows if row != baseline and {row, baseline} <= found]
            frames = {row: (values.loc[row] - values.loc[baseline]).dropna() for row in others}
            members = {row: Difference(f.to_numpy()) for row, f in frames.items() if len(f)}
            intervals = [d.over_seeds if metric in COST else d.over_both for d in members.values()]
            decided = verdicts(intervals, margin)
            for (row, difference), verdict in zip(members.items(), decided, strict=True):
                record = {"row": row, "metric": metric, "baseline": baseline}
                record["difference"] = f"{difference.mean:+.3f}"
                record["95 % CI over seeds"] = format_interval(difference.over_seeds())
                record["95 % CI over texts"] = format_interval(difference.over_texts())
                record["95 % CI over both"] = format_interval(difference.over_both())
                records.append(record | {"margin": margin or "", "verdict": verdict})
    return pd.DataFrame(records)


def format_interval(interval: Interval) -> str:
    """Both ends, or nothing for a single seed or text."""
    return " to ".join(f"{end:+.3f}" for end in interval) if np.isfinite(interval).all() else ""


def format_values(values: pd.Series) -> str:
    """Mean and standard deviation in about four digits."""
    mean, deviation = values.mean(), values.std()
    if pd.isna(mean):
        return ""
    digits = max(0, 4 - len(str(int(abs(mean)))))
    text = f"{mean:,.{digits}f}"
    return f"{text} \u00b1 {deviation:,.{digits}f}" if deviation > 1e-12 else text


def markdown(table: pd.DataFrame) -> str:
    table = table.rename(columns=lambda name: name.replace("_", " "))
    return table.to_markdown(disable_numparse=True, index=table.index.name is not None)


def report(runs: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """The sections of the report."""
    tables = [markdown(table) for table in (means_table(runs), differences) if len(table)]
    commits = runs[["commit", "dtype"]].fillna("no commit").value_counts()
    shown = ", ".join(f"{count} of {' '.join(key)}" for key, count in commits.items())
    return [*tables, NOTES, f"Runs by commit (+: edited code) and precision: {shown}."]


def means_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and deviation over seeds of the main metrics; then baselines without a model."""
    pooled = runs.groupby(["row", "seed"], sort=False).mean(numeric_only=True)  # over folds
    table = pooled.filter(COLUMNS).dropna(axis="columns", how="all")
    columns = list(table)
    table = table.groupby("row", sort=False).agg(format_values)
    by_row = runs.groupby("row")
    table["seeds"] = by_row["seed"].nunique().astype(str)
    if runs["chosen"].any():
        table["chosen"] = by_row["chosen"].agg(lambda names: "; ".join(names.unique()))
    for label, source in SOURCES.items():
        names = [name for name in columns if source + name in pooled]
        if names:
            table.loc[label, names] = [format_values(pooled[source + name]) for name in names]
    if "dataset" in runs and not runs["options"].str.contains("--para_").any():
        path = ROOT / "results" / f"baselines-{runs['dataset'].iloc[0]}.csv"
        if path.exists():
            baselines = pd.read_csv(path, index_col="baseline").filter(columns)
            table = pd.concat([table, baselines.map("{:.3f}".format)]).rename_axis("row")
    return table.fillna("")
