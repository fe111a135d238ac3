"""Turn a question into a table: runs over options and seeds, in results/NAME.{csv,md,png}.

    python experiments.py sonnets                      # full fine-tuning, LoRA, the base model
    python experiments.py poolings --seeds 3 --jobs 2  # two runs at a time, so times are not shown
    python experiments.py poolings --rows last mean    # only rows with one of these words
    python experiments.py poolings --dataset quora     # other options go to the task script

A finished run is stored in results/runs under a hash of script, options, data and base model. It is
used on every machine, and repeated if the code that computes has changed: comments and plots do
not count. An interrupted table continues, and --no_new_runs shows what it has. Failed runs are
shown and repeated the next time.
"""

import hashlib
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cli import Parser, exit_cleanly
from config import BUNDLED_MODEL, ROOT, InputError
from datasets import read_sonnets
from evaluation import bootstrap_interval, mean_interval
from files import read_json, write_csv, write_text
from models.hugging_face import MODEL_PATTERNS, matching_files
from pooling import POOLINGS
from runs import OUTPUT_OPTIONS, code_sha256, file_sha256

FIRST_SEED = 11711
SELECTION_SEEDS = 2  # candidates are compared on dev with the first seeds
FOLDS = 11
RUNS = ROOT / "runs" / "experiments"
STORED = ROOT / "results" / "runs"
COST = ["seconds_per_epoch", "peak_memory_gb"]
COLUMNS = (  # of the first table, where a run has them
    "dev_loss test_loss test_bits_per_character dev_accuracy test_accuracy test_macro_f1 "
    "trainable_parameters best_epoch seconds_per_epoch peak_memory_gb"
).split()
LOSS_MARGINS = {"dev_loss": 0.02, "test_loss": 0.02}  # nats, 2 % of the perplexity
PAIR_MARGINS = {"dev_accuracy": 0.01, "test_accuracy": 0.01, "test_loss": 0.02}
LOSS_PANEL, PAIR_PANEL = ("dev_loss", "test_loss"), ("test_accuracy", "test_loss")
NOTES = (
    "Losses are in nats per token, or per pair. The interval over seeds (Student's t of the "
    "differences between runs of the same seed) is about other orders of the training data and, "
    "for LoRA and classifiers, other initializations, with the same texts. The interval over texts "
    "(bootstrap of the differences of single texts, averaged over seeds) is about other test "
    "texts, with the same models. Both are of the difference shown, in which a sonnet counts by "
    "its share of the tokens. A verdict uses the interval over both: the squares of the distances "
    "from the difference to the ends add up. Intervals are not corrected for the number of rows, "
    "and dev metrics also chose epochs and candidates. Times, where shown, are of training alone, "
    "and memory is the peak of the process, both of runs with --jobs 1."
)


@dataclass(frozen=True)
class Experiment:
    """A table: a task script, the options of each row, and what to compare and to draw.

    A row may have candidates, a dict of names and options; the lowest dev loss chooses one.
    """

    script: str
    rows: dict
    comparisons: dict  # baseline -> rows
    margins: dict  # metric -> smaller differences count as equivalent
    panels: tuple  # see plots.draw_experiment
    cross_validation: bool = False  # over all bundled sonnets


def with_rates(options, rates, name=""):
    return {f"{name}lr {rate}": f"{options} --lr {rate}" for rate in rates}


# To ask a question of your own, add an entry. Fix the margins before looking at results.
FULL, LORA = "full fine-tuning", "--use_lora"
# Learning rates of the bundled model, defaults first.
FULL_RATES, LORA_RATES = ("1e-4", "5e-5", "2e-4"), ("1e-3", "5e-4", "2e-3")
REPORT = "--preset report --model_size tiny"
TARGETS = (
    "q_proj",
    "q_proj v_proj",
    "q_proj k_proj v_proj out_proj",
    "q_proj v_proj interm_dense",
    "all",
)
BEST_ROWS = {FULL: with_rates("", FULL_RATES)} | {
    f"{targets}, rank {rank}": with_rates(
        f"{LORA} --lora_rank {rank} --lora_targets {targets}", LORA_RATES
    )
    for targets in TARGETS
    for rank in (1, 4, 16, 64)
}
RANK_16 = f"{LORA} --lora_targets all --lora_rank 16 --lora_alpha 32"
FOLD_ROWS = {
    FULL: "",
    "LoRA": LORA,
    "full, chosen on dev": with_rates("", FULL_RATES),
    "LoRA, chosen on dev": with_rates(RANK_16, LORA_RATES, "rank 16, ")
    | {"rank 4, lr 1e-3": f"{LORA} --lora_targets all --lr 1e-3"},
    "base model": f"--epochs 0 --seed {FIRST_SEED}",  # its loss is the same for all seeds
}
SOME = ("last", "mean", "generalized")
LEARNED = ("generalized", "multihead")
ENCODINGS = {"joint": SOME, "separate": POOLINGS, f"separate {LORA}": SOME}
EXPERIMENTS = {
    "sonnets": Experiment(
        "sonnet_generation",
        {
            FULL: "",
            "LoRA": LORA,
            "base model": "--epochs 0",
            "the report's settings: full": REPORT,
            "the report's settings: LoRA": f"{REPORT} {LORA}",
        },
        {
            FULL: ["LoRA", "base model"],
            "the report's settings: full": ["the report's settings: LoRA"],
        },
        LOSS_MARGINS | dict.fromkeys(COST, 0.0),
        (LOSS_PANEL, COST),
    ),
    "lora_best": Experiment(
        "sonnet_generation",
        BEST_ROWS,
        {FULL: BEST_ROWS} | {f"{targets}, rank 16": [f"{targets}, rank 64"] for targets in TARGETS},
        LOSS_MARGINS,
        ("parameters", LOSS_PANEL, COST),
    ),
    "cross_validation": Experiment(
        "sonnet_generation",
        FOLD_ROWS,
        {FULL: FOLD_ROWS, "full, chosen on dev": ["LoRA, chosen on dev"]},
        {"test_loss": 0.02},
        ("differences", ("test_loss",)),
        cross_validation=True,
    ),
    "poolings": Experiment(
        "paraphrase_detection",
        {
            f"{encoding}: {pooling}": f"--pair_encoding {encoding} --pooling {pooling}"
            for encoding, poolings in ENCODINGS.items()
            for pooling in poolings
        },
        {
            f"{encoding}: {baseline}": [f"{encoding}: {p}" for p in others if p in poolings]
            for encoding, poolings in ENCODINGS.items()
            for baseline, others in {"last": POOLINGS, "mean": LEARNED}.items()
        },
        PAIR_MARGINS,
        (PAIR_PANEL, COST),
    ),
}


def write_folds():
    """Split all bundled sonnets into folds; yields the options that name the files of each.

    Fold k is the test set, the next one is dev, and the others train. Sonnets are ordered by a
    hash, which is the same on every machine.
    """
    paths = sorted((ROOT / "data").glob("Shakespeare_Sonnets_*.csv"))
    sonnets = pd.concat(map(read_sonnets, paths))
    keys = [hashlib.sha256(f"{FIRST_SEED} {name}".encode()).digest() for name in sonnets["id"]]
    sonnets = sonnets.iloc[np.argsort(keys)]
    for fold in range(FOLDS):
        place = (np.arange(len(sonnets)) - fold) % FOLDS
        splits = {"held_out_sonnet_path": place == 0, "dev_sonnet_path": place == 1}
        splits["sonnet_path"] = place > 1
        paths = {name: RUNS / "folds" / f"{fold}-{name}.csv" for name in splits}
        for name, path in paths.items():
            write_csv(path, sonnets[splits[name]])
        yield [f"--{name}={path}" for name, path in paths.items()]


def run_name(script, arguments):
    """Script and hash of a run's options; a file that one names counts with its contents."""
    values = vars(importlib.import_module(script).parse_options(arguments))
    values = {name: values[name] for name in values if name not in OUTPUT_OPTIONS}
    base = BUNDLED_MODEL if values["model_size"] == "tiny" else Path(values["model_size"])
    if base.is_dir():
        values["model_size"] = ""  # the contents of its files identify it
    values |= {name: str(base / name) for name in matching_files(base, MODEL_PATTERNS)}
    for name, value in values.items():
        if isinstance(value, str) and Path(value).is_file():
            values[name] = file_sha256(value)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{script}-{digest[:12]}"


def stored_run(run):
    """The summary, texts and settings of a finished run; empty if there is none."""
    path = STORED / f"{run}.json"
    return read_json(path) if path.exists() else {}


def without_folders(words):
    return re.sub(r"[^\s=]*/", "", " ".join(words))


def execute(run, arguments, code, jobs):
    """Run a task script, or resume its run, and store the result; returns why it failed."""
    script = run.rpartition("-")[0]
    folder = RUNS / f"{run}-{code[:12]}-{jobs}"  # times depend on the number of jobs
    if not (folder / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)  # the working directory, for its predictions/
        command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
        command += ["--out_dir", str(folder), "--resume"]
        threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
        settings = {"capture_output": True, "encoding": "utf-8", "env": threads | os.environ}
        result = subprocess.run(command, cwd=folder, **settings)
        write_text(folder / "output.txt", result.stdout + result.stderr)
        if result.returncode:
            return (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
    config = read_json(folder / "config.json")
    if not config["code_sha256"].startswith(code[:12]):
        shutil.rmtree(folder)
        return "the code was edited while the table was computed; repeat the command"
    stored = {"options": without_folders(arguments), "jobs": jobs, "code_sha256": code}
    stored |= {name: config[name] for name in ("commit", "dtype", "device", "threads")}
    stored |= read_json(folder / "summary.json")
    if jobs > 1:
        stored |= dict.fromkeys(COST)
    stored["texts"] = values_by_text(pd.read_csv(folder / "per_text.csv"))
    stored["texts"] |= {name: [stored.get(name)] for name in COST}
    write_text(STORED / f"{run}.json", json.dumps(stored, separators=(",", ":")) + "\n")
    return None


def values_by_text(per_text):
    """Lists of values whose means are the metrics of a run; dev losses of pairs are left out.

    The loss of a sonnet is multiplied by its share of the tokens, relative to the mean.
    """
    texts = {}
    for split, frame in per_text.sort_values("id").groupby("split"):
        loss = frame["loss"]
        if "num_targets" in frame:
            loss *= frame["num_targets"] / frame["num_targets"].mean()
        else:
            correct = frame["predicted"] == frame["label"]
            texts[f"{split}_accuracy"] = correct.astype(int).tolist()
        texts[f"{split}_loss"] = loss.round(4).tolist()
    if "dev_accuracy" in texts:
        del texts["dev_loss"]  # of thousands of pairs
    return texts


def gather(experiment, options, extra_options):
    """The runs of an experiment, one record per row, fold and seed; missing ones are executed.

    `extra_options` options follow those of the row. Where a row has candidates, each fold uses the
    one with the lowest mean dev loss over the first seeds.
    """
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    candidates = {
        (row, fold, name): [*files, *words.split(), *extra_options]
        for fold, files in enumerate(write_folds() if experiment.cross_validation else [[]])
        for row, choices in experiment.rows.items()
        for name, words in (choices if isinstance(choices, dict) else {"": choices}).items()
    }
    if trials := {key: words for key, words in candidates.items() if key[-1]}:
        runs = finish(experiment.script, trials, seeds[:SELECTION_SEEDS], options, ["row"])
        best = ()
        if len(runs):
            runs["dev_loss"] = runs["dev_loss"].astype(float).fillna(np.inf)  # of failed runs
            losses = runs.groupby(["row", "fold", "chosen"], sort=False)["dev_loss"].mean()
            best = losses.groupby(["row", "fold"]).idxmin()
        losers = set(trials) - set(best)
        candidates = {key: words for key, words in candidates.items() if key not in losers}
    return finish(experiment.script, candidates, seeds, options)


def finish(script, candidates, seeds, options, unit=("row", "seed")):
    """A record for each candidate and seed; the column `failed` says why a run failed.

    `candidates` maps row, fold and name to arguments. With --no_new_runs, records that agree in
    the columns `unit` are left out unless all of their runs are stored.
    """
    code, records, arguments = code_sha256(), [], {}
    for seed in seeds:  # all rows of a seed, then the next
        for (row, fold, name), words in candidates.items():
            words = ["--seed", str(seed), *words]
            run = run_name(script, words)
            arguments[run] = words
            records.append({"row": row, "seed": seed, "fold": fold, "chosen": name, "run": run})
    if options.no_new_runs:
        records = complete_records(records, unit)
        arguments = {record["run"]: arguments[record["run"]] for record in records}
    missing = [run for run in arguments if stored_run(run).get("code_sha256") != code]
    other_code = list(filter(stored_run, missing))
    use_other_code = options.accept_other_code or options.no_new_runs
    if other_code:
        action = "used" if use_other_code else "repeated (or use --accept_other_code)"
        print(f"{len(other_code)} runs were made with other code; they are {action}")
    if use_other_code:
        missing = [run for run in missing if run not in other_code]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda run: execute(run, arguments[run], code, options.jobs), missing)
        results = tqdm(results, total=len(missing), unit="run")
        failed = dict(zip(missing, results, strict=True))
    for run, reason in failed.items():
        if reason:
            print(f"failed: {without_folders(arguments[run])}: {reason}")
    for record in records:
        reason = failed.get(record["run"])
        stored = {} if reason else stored_run(record["run"])
        empty = dict.fromkeys(["failed", "commit", "dtype", "dev_loss", "texts"])
        record |= empty | stored | record | {"failed": reason}
    return pd.DataFrame(records)


def complete_records(records, unit):
    """The records that agree in the columns `unit` with no record whose run is not stored."""
    key = itemgetter(*unit)
    missing = [record for record in records if not stored_run(record["run"])]
    if missing:
        count = len({record["run"] for record in missing})
        print(
            f"{count} runs failed or are not stored; their rows have fewer seeds, or are left out"
        )
    incomplete = set(map(key, missing))
    return [record for record in records if key(record) not in incomplete]


def differences(experiment, runs, metric):
    """Yield row, baseline and a frame of their differences by seed (index) and text (columns)."""
    values = {
        key: np.concatenate([texts.get(metric, []) for texts in folds["texts"]])
        for key, folds in runs.groupby(["row", "seed"])
        if folds["texts"].notna().all()
    }
    table = pd.DataFrame(values, dtype=float).T
    finished = set(table.index.get_level_values(0))
    for baseline, rows in experiment.comparisons.items():
        for row in rows:
            if row != baseline and {row, baseline} <= finished:
                frame = (table.loc[row] - table.loc[baseline]).dropna()
                if frame.size:
                    yield row, baseline, frame


def compare(experiment, runs):
    """Differences with 95 % intervals over seeds (paired t) and over texts (bootstrap)."""
    records = []
    for metric, margin in experiment.margins.items():
        for row, baseline, frame in differences(experiment, runs, metric):
            seeds, texts = frame.shape  # times and memory have one value instead of texts
            over_seeds = mean_interval(frame.mean(axis=1))[1:] if seeds > 1 else ()
            over_texts = bootstrap_interval(frame.mean()) if texts > 1 else ()
            difference = frame.mean(axis=None)
            over_both = combine(difference, over_seeds, over_texts)
            record = {
                "row": row,
                "metric": metric,
                "baseline": baseline,
                "difference": f"{difference:+.3f}",
                "95 % CI over seeds": format_interval(over_seeds),
                "95 % CI over texts": format_interval(over_texts),
                "95 % CI over both": format_interval(over_both),
                "margin": margin or "",
                "verdict": decide(over_both, margin),
            }
            if metric.endswith("accuracy"):
                count = frame.abs().sum(axis=1).mean()
                record["pairs classified differently"] = f"{count:.0f} of {texts}"
            records.append(record)
    return pd.DataFrame(records).fillna("")


def combine(difference, over_seeds, over_texts):
    """The interval with both sources of chance; empty for a single seed.

    They are independent, so that squares of errors add up, for each end alone (Zou and Donner
    2008): both intervals may exclude zero although this one does not.
    """
    if not over_seeds:
        return ()
    intervals = list(filter(len, [over_seeds, over_texts]))
    below = math.hypot(*(difference - low for low, _ in intervals))
    above = math.hypot(*(high - difference for _, high in intervals))
    return difference - below, difference + above


def decide(interval, margin):
    """What a 95 % interval of a difference shows; without one, nothing is decided.

    Equivalent means that it lies within the margin (two one-sided tests at 2.5 %).
    """
    low, high = interval or (-math.inf, math.inf)
    if max(-low, high) < margin:
        return "equivalent"
    if low > 0:
        return "higher"
    return "lower" if high < 0 else "undecided"


def format_interval(interval):
    return " to ".join(f"{end:+.3f}" for end in interval)


def format_values(values):
    """Mean and standard deviation in four digits."""
    mean, deviation = values.mean(), values.std()
    if pd.isna(mean):
        return ""
    digits = max(0, 4 - len(str(int(abs(mean)))))
    text = f"{mean:,.{digits}f}"
    return f"{text} \u00b1 {deviation:,.{digits}f}" if deviation > 0 else text


def markdown(table):
    table.columns = [name.replace("_", " ") for name in table]
    return table.to_markdown(disable_numparse=True, index=table.index.name is not None)


def report(experiment, runs, pooled):
    """The tables of an experiment in markdown; `pooled` has the means of the runs over folds."""
    by_row = pooled.groupby("row", sort=False)
    columns = [name for name in COLUMNS if name in pooled and pooled[name].notna().any()]
    table = by_row[columns].agg(format_values)
    seed_counts = runs.groupby("row")["seed"].nunique()
    if seed_counts.nunique() > 1:
        table["seeds"] = seed_counts
    if runs["chosen"].any():
        table["chosen"] = runs.groupby("row")["chosen"].agg(lambda names: "; ".join(names.unique()))
    sections = [markdown(table)]
    form = [name.removeprefix("gold_") for name in pooled if name.startswith("gold_")]
    if form:
        table = by_row[form].agg(format_values)
        for name, source in (("Shakespeare", "gold_"), ("random lines", "random_")):
            table.loc[name] = [format_values(pooled[source + column]) for column in form]
        sections.append(markdown(table))
    comparisons = compare(experiment, runs)
    sections.append(markdown(comparisons.copy()))
    if "parameters" in experiment.panels and FULL in list(comparisons.get("baseline", [])):
        shown = f"baseline == '{FULL}' and metric == 'test_loss'"
        shown += " and verdict in ['equivalent', 'lower']"
        sizes = by_row["trainable_parameters"].mean()[comparisons.query(shown)["row"]]
        smallest = "none is shown" if sizes.empty else sizes.idxmin()
        sections.append(
            f"Smallest row with a test loss equivalent to {FULL}, or lower: {smallest}."
        )
    for (row, reason), failed in runs.groupby(["row", "failed"]):
        seeds = ", ".join(map(str, failed["seed"].unique()))
        sections.append(f"Failed: {row}, seeds {seeds}: {reason}")
    shown_seeds = " to ".join(map(str, sorted({seed_counts.min(), seed_counts.max()})))
    finished = runs[runs["failed"].isna()].drop_duplicates("run")
    sources = finished[["commit", "dtype"]].value_counts(dropna=False)
    shown = ", ".join(f"{count} of {' '.join(map(str, key))}" for key, count in sources.items())
    sections.append(
        f"Mean \u00b1 standard deviation over {shown_seeds} seeds. {NOTES} "
        f"Differences use the seeds that both rows have. Runs by commit (and precision): {shown}."
    )
    return "\n\n".join(sections) + "\n"


def is_chosen(row, words, rows):
    """Whether a row has one of the words in its name; a whole name stands for that row alone."""
    return any(word == row or (word in row and word not in rows) for word in words)


def absolute(word):
    """A word of a command, in which an existing path is made absolute: runs have other folders."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).resolve()}" if value and Path(value).exists() else word


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", choices=EXPERIMENTS)
    for name, default, text in (("seeds", 5, "runs per row"), ("jobs", 1, "runs at a time")):
        add(f"--{name}", type=int, default=default, choices=range(1, 65), metavar="N", help=text)
    add(
        "--rows", nargs="+", metavar="WORD", help="only rows with one of these words in their names"
    )
    add("--accept_other_code", action="store_true", help="use runs made before the code changed")
    text = "a table of the stored runs, of any code; rows may have fewer seeds"
    add("--no_new_runs", action="store_true", help=text)
    options, extra_options = parser.parse_known_args()
    rows = EXPERIMENTS[options.name].rows
    chosen = {row: rows[row] for row in rows if is_chosen(row, options.rows or [""], rows)}
    if not chosen:
        raise InputError(f"--rows {' '.join(options.rows)} matches none of {'; '.join(rows)}")
    experiment = replace(EXPERIMENTS[options.name], rows=chosen)
    for word in extra_options:
        if word.partition("=")[0] in ("--seed", "--out_dir", "--resume"):
            raise InputError(f"{word} is set for each run; use --seeds")
    words = without_folders([options.name, *(options.rows or []), *extra_options])
    path = str(ROOT / "results" / re.sub(r"[^\w.]+", "-", words))
    runs = gather(experiment, options, list(map(absolute, extra_options)))
    if runs.empty:
        raise InputError("no row of this table is stored; leave --no_new_runs out")
    by_seed = runs.groupby(["row", "seed"], sort=False, as_index=False)
    pooled = by_seed.mean(numeric_only=True, skipna=False)  # over folds
    from plots import draw_experiment  # matplotlib is slow to import

    text = report(experiment, runs, pooled)
    write_csv(Path(f"{path}.csv"), runs.drop(columns="texts"))
    write_text(Path(f"{path}.md"), text)
    if runs["failed"].isna().any():
        gains = differences(experiment, runs, "test_loss")
        draw_experiment(Path(f"{path}.png"), experiment.panels, pooled, gains)
    print(text)
    sys.exit(int(runs["failed"].notna().any()))


if __name__ == "__main__":
    with exit_cleanly():
        main()
