"""Answer questions by tables of runs: results/NAME.csv, NAME-texts.csv.gz, NAME.md and NAME.png.

    python experiments.py sonnets                      # full fine-tuning, LoRA, the base model
    python experiments.py poolings --seeds 3 --jobs 2  # two runs at a time, so times are not shown
    python experiments.py poolings --rows last mean    # only rows with one of these words
    python experiments.py poolings --dataset quora     # other options go to the task script
    python experiments.py poolings --continue          # keep the finished runs of NAME.csv

Every finished run is stored at once. Without --continue, a table starts afresh, and its old files
become before-NAME.csv and before-NAME-texts.csv.gz.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from config import ROOT, InputError
from datasets import read_sonnets
from evaluation.experiment_plots import draw_experiment
from evaluation.tables import COST, compare, report
from pooling import POOLINGS
from training.options import exit_cleanly
from training.runs import atomic_path, lock, write_csv, write_text

FIRST_SEED = 11711
SELECTION_SEEDS = 2  # candidates are compared with the first seeds
FOLDS = 11
JOB = ["row", "chosen", "fold", "options"]
KEY = ["row", "chosen", "fold", "seed"]
TEXT_COLUMNS = ["split", "id", "loss", "tokens", "predicted", "correct"]


@dataclass(frozen=True)
class Experiment:
    """A table: a task script, the options of each row, and what to compare.

    In the words of the script, {} is the folder of a run. A row may have candidates, a dict of
    names and options; the lowest mean dev loss chooses one.
    """

    script: str
    rows: Mapping[str, str | dict[str, str]]
    comparisons: Mapping[str, Iterable[str]]  # baseline -> rows, as far as they are in the table
    margins: dict[str, float]  # metric -> margin of equivalence
    cross_validation: bool = False  # over all bundled sonnets


def with_rates(options: str, rates: str, name: str = "") -> dict[str, str]:
    """A candidate for each learning rate."""
    return {f"{name}lr {rate}": f"{options} --lr {rate}" for rate in rates.split()}


# To ask a question of your own, add rows and an entry in EXPERIMENTS. Fix the margins before
# looking at results: 0.02 nats are 2 % of the perplexity.
SONNETS = "sonnet_generation.py --sonnet_out={}/test.txt"
PAIRS = "paraphrase_detection.py --para_dev_out={}/dev.csv --para_test_out={}/test.csv"
LOSS_MARGINS = {"dev_loss": 0.02, "test_loss": 0.02}
SONNET_MARGINS = LOSS_MARGINS | dict.fromkeys(COST, 0.0)
PAIR_MARGINS = {"dev_accuracy": 0.01, "test_accuracy": 0.01, "test_loss": 0.02}

FULL, LORA, REPORT = "full fine-tuning", "--use_lora", "--preset report"
FULL_REPORT, LORA_REPORT = "the report's settings: full", "the report's settings: LoRA"
METHODS = {FULL: "", "LoRA": LORA, "base model": "--epochs 0"}
SONNET_ROWS = METHODS | {FULL_REPORT: REPORT, LORA_REPORT: f"{REPORT} {LORA}"}
SONNET_COMPARISONS = {FULL: ["LoRA", "base model"], FULL_REPORT: [LORA_REPORT]}

TARGETS = ["q_proj", "q_proj v_proj", "q_proj k_proj v_proj out_proj"]
TARGETS += ["q_proj v_proj interm_dense", "all"]
BEST_FULL, LORA_RATES = with_rates("", "1e-4 5e-5 2e-4"), "1e-3 5e-4 2e-3"
BEST_ROWS = {FULL: BEST_FULL}
for targets, rank in product(TARGETS, (1, 4, 16, 64)):
    options = f"{LORA} --lora_targets {targets} --lora_rank {rank}"
    BEST_ROWS[f"{targets}, rank {rank}"] = with_rates(options, LORA_RATES)
BEST_COMPARISONS = {f"{targets}, rank 16": [f"{targets}, rank 64"] for targets in TARGETS}

ALL = f"{LORA} --lora_targets all"
BEST_LORA = with_rates(f"{ALL} --lora_rank 16 --lora_alpha 32", LORA_RATES, "rank 16, ")
BEST_LORA["rank 4, lr 1e-3"] = f"{ALL} --lr 1e-3"
FOLD_ROWS = METHODS | {"full, chosen on dev": BEST_FULL, "LoRA, chosen on dev": BEST_LORA}
FOLD_COMPARISONS = {FULL: FOLD_ROWS, "full, chosen on dev": ["LoRA, chosen on dev"]}

SOME, LEARNED = ("last", "mean", "generalized"), ("generalized", "multihead")
ENCODINGS = {"joint": SOME, "separate": tuple(POOLINGS), f"separate {LORA}": SOME}
POOLING_ROWS, FROZEN_ROWS, POOLING_COMPARISONS = {}, {}, {}
for encoding, poolings in ENCODINGS.items():
    rows = {f"{encoding}: {p}": f"--pair_encoding {encoding} --pooling {p}" for p in poolings}
    POOLING_ROWS |= rows
    if LORA not in encoding:
        FROZEN_ROWS |= {r: with_rates(f"--freeze_gpt {rows[r]}", "3e-3 1e-3 1e-2") for r in rows}
    POOLING_COMPARISONS[f"{encoding}: last"] = rows
    POOLING_COMPARISONS[f"{encoding}: mean"] = [f"{encoding}: {p}" for p in LEARNED]

EXPERIMENTS = {
    "sonnets": Experiment(SONNETS, SONNET_ROWS, SONNET_COMPARISONS, SONNET_MARGINS),
    "lora_best": Experiment(SONNETS, BEST_ROWS, {FULL: BEST_ROWS} | BEST_COMPARISONS, LOSS_MARGINS),
    "cross_validation": Experiment(
        SONNETS, FOLD_ROWS, FOLD_COMPARISONS, {"test_loss": 0.02}, cross_validation=True
    ),
    "poolings": Experiment(PAIRS, POOLING_ROWS, POOLING_COMPARISONS, PAIR_MARGINS),
    "frozen": Experiment(PAIRS, FROZEN_ROWS, POOLING_COMPARISONS, PAIR_MARGINS),
}
Job = dict[str, Any]  # row, chosen candidate, fold, options for the table, arguments for the script


def make_jobs(
    experiment: Experiment, words: list[str], extra: list[str], folder: Path
) -> list[Job]:
    """A job for every fold and candidate of the rows that have one of the words in their names.

    `extra` options may replace the bundled model, but not an option of a row: the last one counts.
    """
    folds = write_folds(folder) if experiment.cross_validation else [[]]
    rows = {row: c for row, c in experiment.rows.items() if any(word in row for word in words)}
    jobs = []
    for (row, choices), (fold, files) in product(rows.items(), enumerate(folds)):
        candidates = choices if isinstance(choices, dict) else {"": choices}
        for chosen, options in candidates.items():
            job = {"row": row, "chosen": chosen, "fold": fold}
            job["options"] = " ".join([*extra, options]).strip()
            job["arguments"] = ["--model_size", "tiny", *files, *extra, *options.split()]
            jobs.append(job)
    return jobs


def write_folds(folder: Path) -> list[list[str]]:
    """Split all bundled sonnets into folds; the options that name the files of each.

    Fold k is the test set, the next one is dev, and the others train. Sonnets are ordered by a
    hash, which is the same on every machine.
    """
    paths = sorted((ROOT / "data").glob("Shakespeare_Sonnets_*.csv"))
    sonnets = pd.concat(map(read_sonnets, paths))
    keys = [hashlib.sha256(f"{FIRST_SEED} {name}".encode()).digest() for name in sonnets["id"]]
    sonnets = sonnets.iloc[np.argsort(keys)]
    folds = []
    for fold in range(FOLDS):
        place = (np.arange(len(sonnets)) - fold) % FOLDS
        splits = {"held_out_sonnet_path": place == 0, "dev_sonnet_path": place == 1}
        splits["sonnet_path"] = place > 1
        for name, is_member in splits.items():
            write_csv(folder / f"{fold}-{name}.csv", sonnets[is_member])
        folds.append([f"--{name}={folder / f'{fold}-{name}.csv'}" for name in splits])
    return folds


class Table:
    """Runs jobs and stores their results: a line per run, and a line per held-out text."""

    def __init__(self, folder: Path, script: str, jobs: list[Job], workers: int) -> None:
        """Start afresh; `workers` is the number of runs at a time."""
        self.folder, self.script, self.jobs, self.workers = folder, script, jobs, workers
        self.path = str(ROOT / "results" / folder.name)
        self.csv, self.gz = Path(f"{self.path}.csv"), Path(f"{self.path}-texts.csv.gz")
        self.runs = pd.DataFrame(jobs).assign(seed=0, dev_loss=0.0).drop(columns="arguments")[:0]
        self.texts = self.runs[KEY]
        self.failures: list[str] = []
        self.lock = Lock()

    def read(self) -> None:
        """Keep the stored runs that belong to one of the jobs, with any seed."""
        text = dict.fromkeys(["row", "chosen", "options", "commit"], str)
        self.runs = pd.read_csv(self.csv, dtype=text).fillna({"chosen": "", "options": ""})
        self.texts = pd.read_csv(self.gz, dtype={"id": str}, keep_default_na=False)
        self.runs, self.texts = self.select(self.jobs)

    def write(self) -> None:
        """Write both files, each whole or not at all; equal results give equal bytes."""
        runs, texts = self.select(self.jobs)
        data = texts.to_csv(index=False, lineterminator="\n").encode()
        with atomic_path(self.gz) as path:
            path.write_bytes(gzip.compress(data, mtime=0))
        write_csv(self.csv, runs)

    def select(self, jobs: list[Job]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The finished runs of these jobs, with any seed, and their texts."""
        runs = pd.DataFrame(jobs)[JOB].merge(self.runs.sort_values("seed"), on=JOB)
        return runs, runs[KEY].merge(self.texts, on=KEY)

    def run(self, jobs: list[Job], seeds: range) -> None:
        """Run those jobs that are not finished, with all seeds."""
        finished = set(self.runs[KEY].itertuples(index=False, name=None))
        wanted = [job | {"seed": seed} for seed in seeds for job in jobs]
        missing = [run for run in wanted if itemgetter(*KEY)(run) not in finished]
        with ThreadPoolExecutor(self.workers) as pool:
            list(tqdm(pool.map(self.execute, missing), total=len(missing), unit="run"))

    def execute(self, run: Job) -> None:
        """Run the task script, and store its results, or the last line of its errors."""
        name = f"{run['row']} {run['chosen']}".strip() + f", seed {run['seed']}"
        folder = self.folder / re.sub(r"[^\w.]+", "-", f"{name} fold {run['fold']}")
        shutil.rmtree(folder, ignore_errors=True)
        script, *outputs = (word.format(folder) for word in self.script.split())
        command = [sys.executable, ROOT / script, *outputs, *run["arguments"]]
        command += [f"--seed={run['seed']}", f"--out_dir={folder}"]
        threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.workers))}
        settings = {"env": os.environ | threads, "encoding": "utf-8", "errors": "replace"}
        result = subprocess.run(command, capture_output=True, **settings)
        write_text(folder / "output.txt", result.stdout + result.stderr)
        if result.returncode == 0:
            self.store(run, folder)
            return
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        self.failures.append(f"Failed: {name}: {reason}")
        tqdm.write(f"{self.failures[-1]} (see {folder / 'output.txt'})")

    def store(self, run: Job, folder: Path) -> None:
        """Store the results of a finished run, and delete its resume state, which is large."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        record = {name: run[name] for name in [*KEY, "options"]} | {"jobs": self.workers}
        record |= {"commit": config["commit"], "dtype": config["dtype"]} | summary
        texts = pd.read_csv(folder / "per_text.csv", dtype={"id": str}, keep_default_na=False)
        texts = texts[texts["split"] != "train"].sort_values(["split", "id"]).round(4)
        if "label" in texts:
            texts["correct"] = (texts["predicted"] == texts["label"]).astype(int)
        texts = texts.assign(**{name: run[name] for name in KEY}).filter(KEY + TEXT_COLUMNS)
        with self.lock:
            self.runs = pd.concat([self.runs, pd.DataFrame([record])])
            self.texts = pd.concat([self.texts, texts])
            self.write()
        (folder / "state.pt").unlink(missing_ok=True)

    def run_all(self, seeds: range) -> list[Job]:
        """Run the candidates with the first seeds, then the best with all; the jobs that count."""
        trials = seeds[:SELECTION_SEEDS]
        self.run([job for job in self.jobs if job["chosen"]], trials)
        runs = self.runs.query("chosen != '' and seed in @trials")
        losses = runs.groupby(KEY[:3])["dev_loss"].agg(["mean", "count"])
        finished = losses[losses["count"] == len(trials)]  # a failed trial counts out
        best = set(finished.groupby(["row", "fold"])["mean"].idxmin())
        key = itemgetter(*KEY[:3])
        chosen = [job for job in self.jobs if not job["chosen"] or key(job) in best]
        self.run(chosen, seeds)
        return chosen


def main(arguments: list[str] | None = None) -> int:
    """Run a table and write its report; the exit code is 1 if a run failed."""
    settings = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(description=__doc__, **settings)
    add = parser.add_argument
    add("name", choices=EXPERIMENTS)
    add("--seeds", type=int, default=5, choices=range(1, 65), metavar="N", help="runs per row (5)")
    add("--jobs", type=int, default=1, choices=range(1, 65), metavar="N", help="runs at a time (1)")
    add("--rows", nargs="+", metavar="WORD", default=[], help="only rows with one of these words")
    add("--continue", action="store_true", dest="keep", help="keep the finished runs of NAME.csv")
    options, extra = parser.parse_known_args(arguments)
    for word in extra:
        if word.partition("=")[0] in ("--seed", "--out_dir", "--resume"):
            raise InputError(f"{word} is set for each run; use --seeds, or --continue")

    experiment = EXPERIMENTS[options.name]
    name = re.sub(r"[^\s=]*/", "", " ".join([options.name, *options.rows, *extra]))  # no folders
    folder = ROOT / "runs" / "experiments" / re.sub(r"[^\w.]+", "-", name)
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    jobs = make_jobs(experiment, options.rows or [""], extra, folder)
    if not jobs:
        raise InputError(f"--rows {options.rows} matches none of {'; '.join(experiment.rows)}")
    table = Table(folder, experiment.script, jobs, options.jobs)
    stored = [path for path in (table.csv, table.gz) if path.exists()]
    if options.keep and stored:
        table.read()
    else:  # nobody loses hours by forgetting --continue
        for path in stored:
            path.replace(path.with_name(f"before-{path.name}"))
    table.write()
    chosen = table.run_all(range(FIRST_SEED, FIRST_SEED + options.seeds))
    write_report(table, experiment, chosen)
    return int(bool(table.failures))


def write_report(table: Table, experiment: Experiment, jobs: list[Job]) -> None:
    """Write NAME.md and NAME.png, and print the former."""
    runs, texts = table.select(jobs)
    sections = table.failures
    if len(runs):
        runs[COST] = runs[runs["jobs"] == 1].reindex(columns=COST)  # others disturb each other
        differences = compare(experiment.comparisons, experiment.margins, runs, texts)
        sections = report(runs, differences) + sections
        draw_experiment(Path(f"{table.path}.png"), runs, list(experiment.margins))
    text = "\n\n".join(sections) + "\n"
    write_text(f"{table.path}.md", text)
    print(text)


if __name__ == "__main__":
    with exit_cleanly():
        sys.exit(main())
