"""Answer questions by tables of runs: results/NAME.csv, NAME-texts.csv.gz, NAME.md and NAME.png.

    python experiments.py sonnets                      # full fine-tuning, LoRA, the base model
    python experiments.py poolings --seeds 3 --jobs 2  # two runs at a time, so times are not shown
    python experiments.py poolings --rows last mean    # only rows with one of these words
    python experiments.py poolings --dataset quora     # other options go to the task script
    python experiments.py poolings --continue          # keep the finished runs of NAME.csv

Every finished run is stored at once; one that fails is left out. Without --continue, a table starts
afresh, and its old files become before-NAME.csv and before-NAME-texts.csv.gz.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from config import ROOT, InputError
from datasets import read_sonnets
from evaluation.plots import draw_experiment
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


Rows = list[tuple[str, str, str]]  # row, candidate ("" if it is the only one), options


class Experiment(NamedTuple):
    """A table: a task script, the options of each row, and what to compare.

    {} in `script` stands for the folder of a run. Of the candidates of a row, the one with the
    lowest mean dev loss is kept.
    """

    script: str
    rows: Rows
    comparisons: dict[str, str]  # baseline -> how the names of other rows begin, as a pattern
    margins: dict[str, float]  # metric -> margin of equivalence
    cross_validation: bool = False  # over all bundled sonnets


def with_rates(row: str, options: str, rates: str) -> Rows:
    """A candidate for each learning rate."""
    return [(row, f"lr {rate}", f"{options} --lr {rate}") for rate in rates.split()]


# To ask a question of your own, add rows and an entry in EXPERIMENTS. Fix the margins before
# looking at results: 0.02 nats are 2 % of the perplexity.
SONNETS = "sonnet_generation.py --sonnet_out={}/test.txt"
PAIRS = "paraphrase_detection.py --para_dev_out={}/dev.csv --para_test_out={}/test.csv"
LOSS_MARGINS = {"dev_loss": 0.02, "test_loss": 0.02}
SONNET_MARGINS = LOSS_MARGINS | dict.fromkeys(COST, 0.0)
PAIR_MARGINS = {"dev_accuracy": 0.01, "test_accuracy": 0.01, "test_loss": 0.02}

FULL, LORA = "full fine-tuning", "--use_lora"
METHODS = [(FULL, "", ""), ("LoRA", "", LORA), ("base model", "", "--epochs 0")]

TARGETS = "q_proj v_proj", "q_proj v_proj interm_dense", "all"  # of LoRA's paper, our default
FULL_RATES, LORA_RATES = "1e-4 5e-5 2e-4", "1e-3 5e-4 2e-3"
BEST_ROWS, BEST_COMPARISONS = with_rates(FULL, "", FULL_RATES), {FULL: ""}
for targets, rank in product(TARGETS, (1, 4, 16)):
    options = f"{LORA} --lora_targets {targets} --lora_rank {rank}"
    BEST_ROWS += with_rates(f"{targets}, rank {rank}", options, LORA_RATES)
    BEST_COMPARISONS[f"{targets}, rank 4"] = f"{targets}, rank 16"

FULL_BEST, LORA_BEST = "full, chosen on dev", "LoRA, chosen on dev"
FOLD_ROWS = METHODS + with_rates(FULL_BEST, "", FULL_RATES)
FOLD_ROWS += with_rates(LORA_BEST, f"{LORA} --lora_targets all --lora_rank 16", LORA_RATES)
FOLD_COMPARISONS = {FULL: "", FULL_BEST: LORA_BEST}

SOME = ("last", "mean", "generalized")
# Encoding with further options: also the first words of a row
ENCODINGS = {"joint": SOME, "separate": tuple(POOLINGS), f"separate {LORA}": SOME}
POOLING_ROWS, FROZEN_ROWS, POOLING_COMPARISONS = [], [], {}
for encoding, poolings in ENCODINGS.items():
    for pooling in poolings:
        row, options = f"{encoding}: {pooling}", f"--pair_encoding {encoding} --pooling {pooling}"
        POOLING_ROWS.append((row, "", options))
        if LORA not in encoding:
            FROZEN_ROWS += with_rates(row, f"--freeze_gpt {options}", "3e-3 1e-3 1e-2")
    POOLING_COMPARISONS[f"{encoding}: last"] = f"{encoding}: "
    POOLING_COMPARISONS[f"{encoding}: mean"] = f"{encoding}: (generalized|multihead)"

EXPERIMENTS = {
    "sonnets": Experiment(SONNETS, METHODS, {FULL: ""}, SONNET_MARGINS),
    "lora_best": Experiment(SONNETS, BEST_ROWS, BEST_COMPARISONS, LOSS_MARGINS),
    "cross_validation": Experiment(SONNETS, FOLD_ROWS, FOLD_COMPARISONS, {"test_loss": 0.02}, True),
    "poolings": Experiment(PAIRS, POOLING_ROWS, POOLING_COMPARISONS, PAIR_MARGINS),
    "frozen": Experiment(PAIRS, FROZEN_ROWS, POOLING_COMPARISONS, PAIR_MARGINS),
}


def make_jobs(experiment: Experiment, words: list[str], extra: list[str]) -> pd.DataFrame:
    """`row`, `chosen` candidate, `fold` and `options` of the rows with one of the words.

    `extra` options may replace the bundled model, but not an option of a row: the last one counts.
    """
    jobs = pd.DataFrame(experiment.rows, columns=["row", "chosen", "options"])
    jobs["options"] = (f"{shlex.join(extra)} " + jobs["options"]).str.strip()
    folds = pd.DataFrame({"fold": range(FOLDS if experiment.cross_validation else 1)})
    jobs = folds.merge(jobs, how="cross")[JOB]
    return jobs[[any(word in row for word in words) for row in jobs["row"]]]


def write_fold(folder: Path, fold: int) -> list[str]:
    """Write one way to split all bundled sonnets; the options that name its three files.

    Of FOLDS parts, the given one is the test set, the next one is dev, and the others train.
    Sonnets are ordered by a hash, which is the same on every machine.
    """
    paths = sorted((ROOT / "data").glob("Shakespeare_Sonnets_*.csv"))
    sonnets = pd.concat(map(read_sonnets, paths))
    keys = [hashlib.sha256(f"{FIRST_SEED} {name}".encode()).hexdigest() for name in sonnets["id"]]
    sonnets = sonnets.assign(key=keys).sort_values("key", ignore_index=True).drop(columns="key")
    place = (sonnets.index - fold) % FOLDS
    splits = {"held_out_sonnet_path": place == 0, "dev_sonnet_path": place == 1}
    splits["sonnet_path"] = place > 1
    for name, is_member in splits.items():
        write_csv(folder / f"{fold}-{name}.csv", sonnets[is_member])
    return [f"--{name}={folder / f'{fold}-{name}.csv'}" for name in splits]


class Table:
    """Runs jobs; a finished run is a line of NAME.csv, and its texts are in NAME-texts.csv.gz."""

    def __init__(
        self, experiment: Experiment, jobs: pd.DataFrame, folder: Path, workers: int
    ) -> None:
        """Start without runs; `workers` is the number of runs at a time."""
        self.experiment, self.jobs, self.folder, self.workers = experiment, jobs, folder, workers
        self.path = str(ROOT / "results" / folder.name)
        self.csv, self.gz = Path(f"{self.path}.csv"), Path(f"{self.path}-texts.csv.gz")
        self.runs = jobs.assign(seed=0, dev_loss=0.0)[:0]
        self.texts = self.runs[KEY].assign(split="", id="")
        self.lock, self.failed = Lock(), False

    def read(self) -> None:
        """Read the stored runs."""
        self.runs = read_runs(self.csv)
        self.texts = pd.read_csv(self.gz, dtype={"id": str}, keep_default_na=False)

    def write(self) -> None:
        """Write the runs of the jobs in a fixed order, each file whole or not at all."""
        self.runs = self.jobs.merge(self.runs.sort_values("seed"))
        # Texts first: in this order, the file is a third as large if ids are hashes (Quora's).
        self.texts = self.runs[KEY].merge(self.texts).sort_values(["split", "id"], kind="stable")
        with atomic_path(self.gz) as path:
            self.texts.to_csv(path, index=False, compression="gzip")
        write_csv(self.csv, self.runs)

    def run_all(self, seeds: range) -> pd.DataFrame:
        """Run the candidates with the first seeds, then the best with all; the jobs that count."""
        trials = seeds[:SELECTION_SEEDS]
        self.run(self.jobs, trials)
        chosen = self.jobs.merge(choose(self.runs, trials))
        self.run(chosen, seeds)
        return chosen

    def run(self, jobs: pd.DataFrame, seeds: range) -> None:
        """Run those jobs that are not finished, with all seeds."""
        wanted = pd.DataFrame({"seed": seeds}).merge(jobs, how="cross")
        missing = wanted.merge(self.runs, how="left_anti").to_dict("records")
        with ThreadPoolExecutor(self.workers) as pool:
            list(tqdm(pool.map(self.execute, missing), total=len(missing), unit="run"))

    def execute(self, run: dict[str, str | int]) -> None:
        """Run the task script, and store its results or print its errors."""
        folder = self.folder / file_name(*(run[name] for name in KEY))
        shutil.rmtree(folder, ignore_errors=True)
        script, *outputs = (word.format(folder) for word in self.experiment.script.split())
        command = [sys.executable, ROOT / script, *outputs, "--model_size=tiny"]
        if self.experiment.cross_validation:
            command += write_fold(self.folder, run["fold"])
        command += [*shlex.split(run["options"]), f"--seed={run['seed']}", f"--out_dir={folder}"]
        threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.workers))}
        result = subprocess.run(command, env=os.environ | threads, capture_output=True)
        if result.returncode:
            self.failed = True
            tqdm.write(f"failed: {folder.name}: {result.stderr.decode(errors='replace')}")
        else:
            self.store(run | {"jobs": self.workers}, folder)

    def store(self, run: dict[str, str | int], folder: Path) -> None:
        """Store the results of a finished run, and delete its resume state, which is large."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        record = run | {"commit": config["commit"], "dtype": config["dtype"]} | summary
        texts = pd.read_csv(folder / "per_text.csv", dtype={"id": str}, keep_default_na=False)
        if "label" in texts:
            texts["correct"] = (texts["predicted"] == texts["label"]).astype(int)
        texts = texts.assign(**run).filter(KEY + TEXT_COLUMNS)
        with self.lock:
            self.runs = pd.concat([self.runs, pd.DataFrame([record])])
            self.texts = pd.concat([self.texts, texts.round(4)])
            self.write()
        (folder / "state.pt").unlink(missing_ok=True)


def read_runs(path: Path) -> pd.DataFrame:
    """The runs of a NAME.csv."""
    names = dict.fromkeys(["row", "chosen", "options", "commit"], str)
    return pd.read_csv(path, dtype=names).fillna({"chosen": "", "options": ""})


def choose(runs: pd.DataFrame, trials: range) -> pd.DataFrame:
    """The best job of each row and fold: the lowest mean dev loss over the seeds `trials`."""
    losses = runs[runs["seed"].isin(trials)].groupby(JOB, as_index=False)["dev_loss"]
    # Candidates without a failed trial come first.
    best = losses.agg(["count", "mean"]).sort_values(["count", "mean"], ascending=[False, True])
    return best.drop_duplicates(["row", "fold"])[JOB]


def file_name(*words: str | int) -> str:
    """The words without characters that file names cannot have."""
    return re.sub(r"[^\w.]+", "-", " ".join(map(str, words)))


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

    experiment = EXPERIMENTS[options.name]
    jobs = make_jobs(experiment, options.rows or [""], extra)
    if jobs.empty:
        raise InputError(f"no row of {options.name} has one of the words {options.rows}")
    folder = ROOT / "runs" / "experiments" / file_name(options.name, *options.rows, *extra)
    lock(folder)
    table = Table(experiment, jobs, folder, options.jobs)
    if options.keep and table.csv.exists():
        table.read()
    for path in (table.csv, table.gz):
        # Nobody loses hours by forgetting --continue once.
        if path.exists() and not options.keep and len(pd.read_csv(path)):
            path.replace(path.with_name(f"before-{path.name}"))
    table.write()  # without runs of other options
    chosen = table.run_all(range(FIRST_SEED, FIRST_SEED + options.seeds))

    runs = chosen.merge(table.runs)
    texts = runs[KEY].merge(table.texts)
    if len(runs):
        runs[COST] = runs[runs["jobs"] == 1].reindex(columns=COST)  # others disturb each other
        text = report(runs, compare(runs, texts, experiment.comparisons, experiment.margins))
        write_text(f"{table.path}.md", text)
        print(text)
        draw_experiment(f"{table.path}.png", runs, list(experiment.margins))
    return int(table.failed)


if __name__ == "__main__":
    with exit_cleanly():
        sys.exit(main())
