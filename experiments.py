"""Turn a question into a table: runs over options and seeds, in results/NAME.{csv,md,png}.

    python experiments.py sonnets                      # full fine-tuning, LoRA, the base model
    python experiments.py poolings --seeds 3 --jobs 2  # two runs at a time; ignore their times
    python experiments.py poolings --rows last mean    # only rows that contain one of these words
    python experiments.py poolings --dataset quora     # other options go to the task script

Runs are kept in runs/experiments under a hash of script, options, data, base model and code, so
an interrupted table continues and a change of any of these repeats its runs. Comments and plots do
not count as code. Failed runs are shown in the table and repeated the next time.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cli import Parser, exit_cleanly
from config import BUNDLED_MODEL, LINEARS, ROOT, InputError
from datasets import read_pairs
from evaluation import bootstrap_interval, mean_interval
from files import read_json, write_csv, write_text
from models.hugging_face import MODEL_PATTERNS, matching_files
from pooling import POOLINGS
from runs import OUTPUT_OPTIONS, code_sha256, file_sha256

FIRST_SEED = 11711
RUNS = ROOT / "runs" / "experiments"
COST = ("seconds_per_epoch", "peak_memory_gb")
COLUMNS = (  # of the first table, where a run has them
    "dev_loss test_loss test_bits_per_character dev_accuracy test_accuracy test_macro_f1 "
    "trainable_parameters best_epoch seconds_per_epoch peak_memory_gb"
).split()
LOSS_MARGINS = {"dev_loss": 0.02, "test_loss": 0.02}  # nats, 2 % of the perplexity
PAIR_MARGINS = {"dev_accuracy": 0.01, "test_accuracy": 0.01, "test_loss": 0.02}
LOSS_PANEL, PAIR_PANEL = ("dev_loss", "test_loss"), ("test_accuracy", "test_loss")


@dataclass(frozen=True)
class Experiment:
    """A table: a task script, the options of each row, and what to compare and to draw.

    A row is compared with the first row that has the same text before the colon, if there is one.
    """

    script: str
    rows: dict
    margins: dict  # metric -> smaller differences count as equivalent
    panels: tuple  # see plots.draw_experiment

    def baseline(self, row):
        group = row.rpartition(":")[0]
        return next(other for other in self.rows if other.rpartition(":")[0] == group)


# To ask a question of your own, add an entry. Fix the margins before looking at results.
REPORT = "--preset report --model_size tiny"
TARGETS = ("q_proj", "q_proj v_proj", " ".join(LINEARS[:4]), "q_proj v_proj interm_dense")
PAIRS = "--epochs 1 --pair_encoding"
RATES = {"": ("1e-4", "5e-5", "2e-4"), "--use_lora": ("1e-3", "5e-4", "2e-3")}  # defaults first
EXPERIMENTS = {
    "sonnets": Experiment(
        "sonnet_generation",
        {
            "full fine-tuning": "",
            "LoRA": "--use_lora",
            "base model": "--epochs 0",
            "the report's settings: full": REPORT,
            "the report's settings: LoRA": f"{REPORT} --use_lora",
        },
        LOSS_MARGINS | dict.fromkeys(COST, 0.0),
        (LOSS_PANEL, COST),
    ),
    "lora_rank": Experiment(
        "sonnet_generation",
        {"full fine-tuning": ""}
        | {
            f"{targets}, rank {rank}": f"--use_lora --lora_rank {rank} --lora_targets {targets}"
            for targets in TARGETS
            for rank in (1, 4, 64)
        },
        LOSS_MARGINS,
        ("parameters", LOSS_PANEL, COST),
    ),
    "learning_rate": Experiment(
        "sonnet_generation",
        {
            f"{method or 'full'}: {rate}": f"--lr {rate} {method}"
            for method, rates in RATES.items()
            for rate in rates
        },
        LOSS_MARGINS,
        (LOSS_PANEL,),
    ),
    "poolings": Experiment(
        "paraphrase_detection",
        {
            f"{encoding}: {pooling}": f"{PAIRS} {encoding} --pooling {pooling}"
            for encoding in ("joint", "separate", "separate --use_lora")
            for pooling in POOLINGS
        },
        PAIR_MARGINS,
        (PAIR_PANEL, COST),
    ),
}


def run_folder(script, arguments, code):
    """The folder of a run; a file that an option names counts with its contents."""
    values = vars(importlib.import_module(script).parse_options(arguments))
    values = {name: values[name] for name in values if name not in OUTPUT_OPTIONS}
    base = BUNDLED_MODEL if values["model_size"] == "tiny" else Path(values["model_size"])
    values |= {name: str(base / name) for name in matching_files(base, MODEL_PATTERNS)}
    for name, value in values.items():
        if isinstance(value, str) and Path(value).is_file():
            values[name] = file_sha256(value)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return RUNS / f"{script}-{digest[:12]}-{code[:12]}"


def is_finished(folder):
    """Whether the run is complete and was made with the code that its folder names."""
    if not (folder / "summary.json").exists():
        return False
    code = folder.name.rpartition("-")[2]
    return read_json(folder / "config.json")["code_sha256"].startswith(code)


def other_code(folder):
    """The newest finished run of the same options with other code, or None."""
    finished = RUNS.glob(f"{folder.name.rpartition('-')[0]}-*/summary.json")
    newest = max(finished, key=lambda path: path.stat().st_mtime, default=None)
    return newest and newest.parent


def execute(folder, arguments, jobs):
    """Run a task script, or resume its run; returns why it failed, or None."""
    script = folder.name.rsplit("-", 2)[0]
    if (folder / "summary.json").exists():
        shutil.rmtree(folder)  # made with code that was edited meanwhile
    folder.mkdir(parents=True, exist_ok=True)  # the working directory, with predictions/ of its own
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    command += ["--out_dir", str(folder), "--resume"]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    settings = {"capture_output": True, "encoding": "utf-8", "env": threads | os.environ}
    result = subprocess.run(command, cwd=folder, **settings)
    write_text(folder / "output.txt", result.stdout + result.stderr)
    if result.returncode:
        return (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
    if not is_finished(folder):
        return "the code was edited while the table was computed; repeat the command"
    return None


def gather(experiment, options, extra_options):
    """The summaries of all runs, one record per row and seed; missing runs are executed first.

    The column `failed` says why a run failed. `extra_options` options follow those of the row.
    """
    code = code_sha256()
    records, missing = [], {}
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):  # all rows of a seed, then the next
        for row, row_options in experiment.rows.items():
            arguments = [*row_options.split(), *extra_options, "--seed", str(seed)]
            folder = run_folder(experiment.script, arguments, code)
            records.append(
                {"row": row, "seed": seed, "folder": folder, "commit": None, "dtype": None}
            )
            if not is_finished(folder):
                missing[folder] = arguments
    reusable = {folder: run for folder in missing if (run := other_code(folder))}
    if reusable:
        action = "used" if options.accept_other_code else "repeated (or use --accept_other_code)"
        print(f"{len(reusable)} runs were made with other code; they are {action}")
    if not options.accept_other_code:
        reusable = {}
    missing = {folder: missing[folder] for folder in missing if folder not in reusable}
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda run: execute(*run, options.jobs), missing.items())
        bar = tqdm(results, total=len(records), initial=len(records) - len(missing), unit="run")
        failed = dict(zip(missing, bar, strict=True))
    for record in records:
        record["failed"] = failed.get(record["folder"])
        folder = reusable.get(record["folder"], record["folder"])
        record["folder"] = folder.relative_to(ROOT).as_posix()
        if not record["failed"]:
            config = read_json(folder / "config.json")
            record |= {"commit": config["commit"], "dtype": config["dtype"]}
            record |= read_json(folder / "summary.json")
    return pd.DataFrame(records)


def correct(folder, split):
    """1 for each labeled pair of a split that a run classifies correctly, else 0, by id."""
    options = read_json(ROOT / folder / "config.json")["options"]
    gold = read_pairs(options[f"para_{split}"]).set_index("id")["label"].dropna()
    path = ROOT / folder / "predictions" / f"para-{split}-output.csv"
    predicted = pd.read_csv(
        path,
        skiprows=1,
        names=["id", "label"],
        dtype={"id": str},
        index_col=0,
        keep_default_na=False,
    )
    return (predicted["label"].loc[gold.index] == gold).astype(float)


def compare(experiment, runs):
    """Differences from each row's baseline over the same seeds, with two 95 % intervals.

    One interval is over seeds (paired t), the other over pairs of texts (bootstrap of the means
    over seeds), where predictions are known.
    """
    records = []
    folders = runs.pivot(index="seed", columns="row", values="folder")
    for metric, margin in experiment.margins.items():
        if metric not in runs:
            continue
        values = runs.pivot(index="seed", columns="row", values=metric)
        for row in experiment.rows:
            base = experiment.baseline(row)
            differences = (values[row] - values[base]).dropna()
            if row == base or differences.empty:
                continue
            over_seeds, over_pairs = (), ()
            if len(differences) > 1:
                over_seeds = mean_interval(differences)[1:]
            split, _, name = metric.rpartition("_")
            if name == "accuracy":
                pairs = folders.loc[differences.index, [row, base]].to_numpy()
                gains = [correct(one, split) - correct(other, split) for one, other in pairs]
                over_pairs = bootstrap_interval(np.mean(gains, axis=0))
            records.append(
                {
                    "row": row,
                    "metric": metric,
                    "baseline": base,
                    "difference": f"{differences.mean():+.3f}",
                    "95 % CI over seeds": " to ".join(f"{end:+.3f}" for end in over_seeds),
                    "95 % CI over pairs": " to ".join(f"{end:+.3f}" for end in over_pairs),
                    "margin": margin or "",
                    "verdict": decide(over_seeds, over_pairs, margin),
                }
            )
    return pd.DataFrame(records)


def decide(over_seeds, over_pairs, margin):
    """What all intervals agree on; a single seed decides nothing.

    Equivalent means that the intervals lie within the margin (two one-sided tests at 2.5 %).
    """
    if not over_seeds:
        return "undecided"
    ends = [*over_seeds, *over_pairs]
    if max(map(abs, ends)) < margin:
        return "equivalent"
    if min(ends) > 0:
        return "higher"
    return "lower" if max(ends) < 0 else "undecided"


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


def report(experiment, runs):
    """The tables of an experiment in markdown."""
    columns = [name for name in COLUMNS if name in runs and runs[name].notna().any()]
    by_row = runs.groupby("row", sort=False)
    sections = [markdown(by_row[columns].agg(format_values))]
    form = [name.removeprefix("gold_") for name in runs if name.startswith("gold_")]
    if form:
        table = by_row[form].agg(format_values)
        for name, source in (("Shakespeare", "gold_"), ("random lines", "random_")):
            table.loc[name] = [format_values(runs[source + column]) for column in form]
        sections.append(markdown(table))
    sections.append(markdown(compare(experiment, runs)))
    for (row, reason), failed in runs.groupby(["row", "failed"]):
        sections.append(f"Failed: {row}, seeds {', '.join(map(str, failed['seed']))}: {reason}")
    sources = runs.loc[runs["failed"].isna(), ["commit", "dtype"]].value_counts(dropna=False)
    shown = ", ".join(f"{count} of {' '.join(map(str, key))}" for key, count in sources.items())
    sections.append(
        f"Mean \u00b1 standard deviation over {runs['seed'].nunique()} seeds. Losses in nats. "
        "Times are of training alone, memory is the peak of the process. "
        f"Runs by commit (and precision): {shown}."
    )
    return "\n\n".join(sections) + "\n"


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", choices=EXPERIMENTS)
    for name, default, text in (("seeds", 5, "runs per row"), ("jobs", 1, "runs at a time")):
        add(f"--{name}", type=int, default=default, choices=range(1, 65), metavar="N", help=text)
    add("--rows", nargs="+", metavar="WORD", help="only rows that contain one of these words")
    add("--accept_other_code", action="store_true", help="use runs made before the code changed")
    options, extra_options = parser.parse_known_args()
    rows = EXPERIMENTS[options.name].rows
    chosen = {row: rows[row] for row in rows if any(word in row for word in options.rows or [""])}
    if not chosen:
        raise InputError(f"--rows {' '.join(options.rows)} matches none of {'; '.join(rows)}")
    experiment = replace(EXPERIMENTS[options.name], rows=chosen)
    # Runs have other working directories.
    extra_options = [
        str(Path(word).resolve()) if Path(word).exists() else word for word in extra_options
    ]
    reserved = {"--seed", "--out_dir", "--resume"} & {
        word.partition("=")[0] for word in extra_options
    }
    if reserved:
        raise InputError(f"{', '.join(reserved)} is set for each run; use --seeds")
    runs = gather(experiment, options, extra_options)
    from plots import draw_experiment  # matplotlib is slow to import

    name = re.sub(r"[^\w.]+", "-", "-".join([options.name, *(options.rows or []), *extra_options]))
    path = str(ROOT / "results" / name)
    text = report(experiment, runs)
    write_csv(Path(f"{path}.csv"), runs)
    write_text(Path(f"{path}.md"), text)
    draw_experiment(Path(f"{path}.png"), experiment.panels, runs)
    print(text)
    sys.exit(int(runs["failed"].notna().any()))


if __name__ == "__main__":
    with exit_cleanly():
        main()
