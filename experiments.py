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
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
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
from training.options import Parser, exit_cleanly
from training.runs import atomic_path, lock, write_csv, write_text

FIRST_SEED = 11711
SELECTION_SEEDS = 2  # candidates are compared with the first seeds
FOLDS = 11
KEY = ["row", "chosen", "fold", "seed"]
TEXT_COLUMNS = ["split", "id", "loss", "tokens", "predicted", "correct"]


@dataclass(frozen=True)
class Experiment:
    """A table: a task script, the options of each row, and what to compare.

    A row may have candidates, a dict of names and options; the lowest mean dev loss chooses one.
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
SONNETS, PAIRS = "sonnet_generation", "paraphrase_detection"
LOSS_MARGINS = {"dev_loss": 0.02, "test_loss": 0.02}
PAIR_MARGINS = {"dev_accuracy": 0.01, "test_accuracy": 0.01, "test_loss": 0.02}

FULL, LORA, REPORT = "full fine-tuning", "--use_lora", "--preset report"
FULL_REPORT, LORA_REPORT = "the report's settings: full", "the report's settings: LoRA"
SONNET_ROWS = {FULL: "", "LoRA": LORA, "base model": "--epochs 0"}
SONNET_ROWS |= {FULL_REPORT: REPORT, LORA_REPORT: f"{REPORT} {LORA}"}
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
FOLD_ROWS = {FULL: "", "LoRA": LORA, "base model": "--epochs 0"}
FOLD_ROWS |= {"full, chosen on dev": BEST_FULL, "LoRA, chosen on dev": BEST_LORA}
FOLD_COMPARISONS = {FULL: FOLD_ROWS, "full, chosen on dev": ["LoRA, chosen on dev"]}

SOME, LEARNED = ("last", "mean", "generalized"), ("generalized", "multihead")
ENCODINGS = {"joint": SOME, "separate": tuple(POOLINGS), f"separate {LORA}": SOME}
POOLING_ROWS, FROZEN_ROWS, POOLING_COMPARISONS = {}, {}, {}
for encoding, poolings in ENCODINGS.items():
    names = {pooling: f"{encoding}: {pooling}" for pooling in poolings}
    POOLING_COMPARISONS[names["last"]] = list(names.values())
    POOLING_COMPARISONS[names["mean"]] = [names[p] for p in LEARNED if p in names]
    for pooling, row in names.items():
        POOLING_ROWS[row] = f"--pair_encoding {encoding} --pooling {pooling}"
        if LORA not in row:
            FROZEN_ROWS[row] = with_rates(f"--freeze_gpt {POOLING_ROWS[row]}", "3e-3 1e-3 1e-2")

EXPERIMENTS = {
    "sonnets": Experiment(
        SONNETS, SONNET_ROWS, SONNET_COMPARISONS, LOSS_MARGINS | dict.fromkeys(COST, 0.0)
    ),
    "lora_best": Experiment(SONNETS, BEST_ROWS, {FULL: BEST_ROWS} | BEST_COMPARISONS, LOSS_MARGINS),
    "cross_validation": Experiment(
        SONNETS, FOLD_ROWS, FOLD_COMPARISONS, {"test_loss": 0.02}, cross_validation=True
    ),
    "poolings": Experiment(PAIRS, POOLING_ROWS, POOLING_COMPARISONS, PAIR_MARGINS),
    "frozen": Experiment(PAIRS, FROZEN_ROWS, POOLING_COMPARISONS, PAIR_MARGINS),
}


@dataclass(frozen=True, order=True)
class Job:
    """A run: the place in the table of a row, candidate and fold; a seed; and their options."""

    place: int
    seed: int
    row: str
    chosen: str
    fold: int
    options: str  # without folders
    arguments: tuple[str, ...]


def make_jobs(
    experiment: Experiment, words: list[str], extra: list[str], folder: Path
) -> list[Job]:
    """A job for every fold and candidate of the rows that the words choose, with the first seed.

    `extra` options may replace the bundled model, but not an option of a row: the last one counts.
    """
    folds = write_folds(folder) if experiment.cross_validation else [[]]
    rows = {row: c for row, c in experiment.rows.items() if is_chosen(row, words, experiment.rows)}
    jobs = []
    for (row, choices), (fold, files) in product(rows.items(), enumerate(folds)):
        candidates = choices if isinstance(choices, dict) else {"": choices}
        for chosen, options in candidates.items():
            arguments = (*files, *map(absolute, extra), *options.split())
            short = without_folders(arguments)
            arguments = ("--model_size", "tiny", *arguments)
            jobs.append(Job(len(jobs), FIRST_SEED, row, chosen, fold, short, arguments))
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

    def __init__(self, name: str, script: str, workers: int) -> None:
        """Start afresh; `workers` is the number of runs at a time."""
        self.path = str(ROOT / "results" / name)
        self.csv, self.gz = Path(f"{self.path}.csv"), Path(f"{self.path}-texts.csv.gz")
        self.folder = ROOT / "runs" / "experiments" / name
        self.script = script
        self.workers = workers
        self.finished: dict[Job, tuple[dict[str, Any], pd.DataFrame]] = {}
        self.failures: list[str] = []
        self.lock = Lock()

    def read(self, jobs: list[Job]) -> None:
        """Keep the stored runs that belong to one of the jobs, with any seed."""
        by_key = {(job.row, job.chosen, job.fold, job.options): job for job in jobs}
        text = dict.fromkeys(["row", "chosen", "options", "commit"], str)
        runs = pd.read_csv(self.csv, dtype=text).fillna({"chosen": "", "options": ""})
        texts = pd.read_csv(self.gz, dtype={"id": str}, keep_default_na=False).groupby(KEY)
        for run in runs.to_dict("records"):
            job = by_key.get((run["row"], run["chosen"], run["fold"], run["options"]))
            if job:
                frame = texts.get_group(tuple(run[name] for name in KEY))
                self.finished[replace(job, seed=run["seed"])] = run, frame

    def write(self) -> None:
        """Write both files, each whole or not at all; equal results give equal bytes."""
        runs, texts = self.select(list(self.finished))
        data = texts.to_csv(index=False, lineterminator="\n").encode()
        with atomic_path(self.gz) as path:
            path.write_bytes(gzip.compress(data, mtime=0))
        write_csv(self.csv, runs)

    def select(self, jobs: list[Job]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The finished runs of these jobs, with any seed, and their texts."""
        places = {job.place for job in jobs}
        finished = [self.finished[job] for job in sorted(self.finished) if job.place in places]
        runs = [run for run, _ in finished] or {name: [] for name in [*KEY, "options"]}
        texts = [frame for _, frame in finished] or [pd.DataFrame(columns=KEY)]
        return pd.DataFrame(runs), pd.concat(texts)

    def run(self, jobs: list[Job], seeds: range) -> None:
        """Run those jobs that are not finished, with all seeds."""
        runs = [replace(job, seed=seed) for seed in seeds for job in jobs]
        missing = [run for run in runs if run not in self.finished]
        with ThreadPoolExecutor(self.workers) as pool:
            list(tqdm(pool.map(self.execute, missing), total=len(missing), unit="run"))

    def execute(self, job: Job) -> None:
        """Run the task script, and store its results, or the last line of its errors."""
        folder = self.folder / f"{job.place}-{job.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()  # the working directory, for its predictions/
        command = [sys.executable, str(ROOT / f"{self.script}.py"), *job.arguments]
        command += ["--seed", str(job.seed), "--out_dir", str(folder)]
        threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.workers))}
        settings = {"cwd": folder, "env": os.environ | threads, "errors": "replace"}
        result = subprocess.run(command, capture_output=True, encoding="utf-8", **settings)
        write_text(folder / "output.txt", result.stdout + result.stderr)
        if result.returncode == 0:
            self.store(job, folder)
            return
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        name = f"{job.row} {job.chosen}".strip()
        self.failures.append(f"Failed: {name}, seed {job.seed}: {reason}")
        tqdm.write(f"{self.failures[-1]} (see {folder / 'output.txt'})")

    def store(self, job: Job, folder: Path) -> None:
        """Store the results of a finished run, and delete its resume state, which is large."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        names = {name: vars(job)[name] for name in KEY}
        run = {**names, "options": job.options, "commit": config["commit"]}
        run |= {"dtype": config["dtype"], "jobs": self.workers}
        run |= json.loads((folder / "summary.json").read_text("utf-8"))
        texts = pd.read_csv(folder / "per_text.csv", dtype={"id": str}, keep_default_na=False)
        texts = texts[texts["split"] != "train"].sort_values(["split", "id"]).round(4)
        if "label" in texts:
            texts["correct"] = (texts["predicted"] == texts["label"]).astype(int)
        with self.lock:
            self.finished[job] = run, texts.assign(**names).filter(KEY + TEXT_COLUMNS)
            self.write()
        (folder / "state.pt").unlink(missing_ok=True)

    def run_all(self, jobs: list[Job], seeds: range) -> list[Job]:
        """Run the candidates with the first seeds, then the best with all; the jobs that count."""
        candidates = [job for job in jobs if job.chosen]
        trials = seeds[:SELECTION_SEEDS]
        self.run(candidates, trials)
        losses = defaultdict(dict)  # a job with a failed trial has none
        for job in candidates:
            runs = [self.finished.get(replace(job, seed=seed)) for seed in trials]
            if all(runs):
                losses[job.row, job.fold][job] = np.mean([run["dev_loss"] for run, _ in runs])
        best = {min(group, key=group.get) for group in losses.values()}
        chosen = [job for job in jobs if job in best or not job.chosen]
        self.run(chosen, seeds)
        return chosen


def without_folders(words: Iterable[str]) -> str:
    """Words of a command in one line, without the folders of files."""
    return re.sub(r"[^\s=]*/", "", " ".join(words))


def absolute(word: str) -> str:
    """A word of a command, in which an existing path is made absolute: runs have other folders."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).resolve()}" if value and Path(value).exists() else word


def is_chosen(row: str, words: list[str], rows: Iterable[str]) -> bool:
    """Whether a row has one of the words in its name; a whole name stands for that row alone."""
    return any(word == row or (word in row and word not in rows) for word in words)


def main(arguments: list[str] | None = None) -> int:
    """Run a table and write its report; the exit code is 1 if a run failed."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("name", choices=EXPERIMENTS)
    add("--seeds", type=int, default=5, choices=range(1, 65), metavar="N", help="runs per row (5)")
    add("--jobs", type=int, default=1, choices=range(1, 65), metavar="N", help="runs at a time (1)")
    text = "only rows with one of these words in their names"
    add("--rows", nargs="+", metavar="WORD", default=[], help=text)
    text = "keep the finished runs of results/NAME.csv"
    add("--continue", action="store_true", dest="keep", help=text)
    options, extra = parser.parse_known_args(arguments)
    for word in extra:
        if word.partition("=")[0] in ("--seed", "--out_dir", "--resume"):
            raise InputError(f"{word} is set for each run; use --seeds, or --continue")

    experiment = EXPERIMENTS[options.name]
    name = without_folders([options.name, *options.rows, *extra])
    table = Table(re.sub(r"[^\w.]+", "-", name), experiment.script, options.jobs)
    table.folder.mkdir(parents=True, exist_ok=True)
    lock(table.folder)
    jobs = make_jobs(experiment, options.rows or [""], extra, table.folder)
    if not jobs:
        raise InputError(f"--rows {options.rows} matches none of {'; '.join(experiment.rows)}")
    if options.keep and table.csv.exists():
        table.read(jobs)
    elif table.csv.exists():  # nobody loses hours by forgetting --continue
        for path in (table.csv, table.gz):
            path.replace(path.with_name(f"before-{path.name}"))
    table.write()
    chosen = table.run_all(jobs, range(FIRST_SEED, FIRST_SEED + options.seeds))
    write_report(table, experiment, *table.select(chosen))
    return int(bool(table.failures))


def write_report(
    table: Table, experiment: Experiment, runs: pd.DataFrame, texts: pd.DataFrame
) -> None:
    """Write NAME.md and NAME.png, and print the former."""
    sections = table.failures
    if len(runs):
        runs[COST] = runs[runs["jobs"] == 1].reindex(columns=COST)  # others disturb each other
        differences = compare(experiment.comparisons, experiment.margins, runs, texts)
        sections = report(runs, differences, experiment.margins) + sections
        draw_experiment(Path(f"{table.path}.png"), runs, experiment.margins, differences)
    text = "\n\n".join(sections) + "\n"
    write_text(f"{table.path}.md", text)
    print(text)


if __name__ == "__main__":
    with exit_cleanly():
        sys.exit(main())
