"""A question to a table: runs of a task script over options and seeds, gathered in results/NAME.csv and NAME.md.

    python experiments.py sonnets              # base, full fine-tuning and LoRA, three seeds
    python experiments.py poolings             # five poolings by two encodings of a pair, two epochs each
    python experiments.py learning_rate        # a sweep behind default learning rates; so is paraphrase_learning_rate

Runs are kept in runs/experiments, so an interrupted table goes on where it stopped. They are found by row and seed:
after a change of code or defaults, delete runs/experiments/NAME to run them anew.
"""

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from config import ROOT, InputError, exit_cleanly

COST = ("best_epoch", "seconds_per_epoch", "peak_memory_gb")
FIGURES = {  # of each script's summary, the table's columns
    "sonnet_generation.py": ("dev_loss", "test_loss", "test_bits_per_character", *COST),
    "paraphrase_detection.py": ("dev_accuracy", "dev_macro_f1", "test_accuracy", "test_macro_f1", *COST),
}


@dataclass(frozen=True)
class Experiment:
    """A task script, the options of each row of the table, and the seeds."""

    script: str
    rows: dict[str, list[str]]
    seeds: tuple[int, ...]


EXPERIMENTS = {
    "sonnets": Experiment(
        "sonnet_generation.py", {"full fine-tuning": [], "LoRA, rank 4": ["--use_lora"]}, seeds=(11711, 11712, 11713)
    ),
    "learning_rate": Experiment(
        "sonnet_generation.py",
        {f"full fine-tuning, {rate}": ["--lr", rate] for rate in ("5e-5", "1e-4", "2e-4")}
        | {f"LoRA, {rate}": ["--use_lora", "--lr", rate] for rate in ("5e-4", "1e-3", "2e-3")},
        seeds=(1,),
    ),
    "paraphrase_learning_rate": Experiment(
        "paraphrase_detection.py",
        {f"full fine-tuning, {rate}": ["--pooling", "generalized", "--lr", rate] for rate in ("2e-4", "5e-4")}
        | {f"LoRA, {rate}": ["--pooling", "generalized", "--use_lora", "--lr", rate] for rate in ("1e-3", "2e-3")},
        seeds=(1,),
    ),
    "poolings": Experiment(
        "paraphrase_detection.py",
        {f"{pooling}, {encoding}": ["--pooling", pooling, "--pair_encoding", encoding, "--epochs", "2"]
         for encoding in ("joint", "separate") for pooling in ("last", "mean", "max", "generalized", "multihead")},
        seeds=(11711,),
    ),
}  # fmt: skip


def summary_of(name: str, row: str, seed: int, jobs: int) -> dict:
    """One run's summary; runs it unless it is there already. Raises InputError for a run that failed."""
    from runs import write_text

    experiment = EXPERIMENTS[name]
    folder = ROOT / "runs" / "experiments" / name / f"{row.replace(', ', '-').replace(' ', '_')}-seed{seed}"
    if not (folder / "summary.json").exists():
        command = [sys.executable, str(ROOT / experiment.script), *experiment.rows[row], "--seed", str(seed),
                   "--out_dir", str(folder), "--resume"]  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)  # the run's working directory: its predictions/ is its own
        threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", cwd=folder, env=os.environ | threads, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise InputError(f"{' '.join(command)} failed: {reason}")
        write_text(folder / "output.txt", done.stdout)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def summaries(name: str, jobs: int) -> dict[str, list[dict]]:
    """Every row's summaries, a seed each, `jobs` runs at a time."""
    from tqdm import tqdm

    todo = [(row, seed) for row in EXPERIMENTS[name].rows for seed in EXPERIMENTS[name].seeds]
    found = {row: [] for row, _ in todo}
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda run: summary_of(name, *run, jobs), todo)
        for (row, _), summary in zip(todo, tqdm(done, name, len(todo), unit="run", disable=None), strict=True):
            found[row].append(summary)
    return found


def as_csv(found: dict[str, list[dict]]) -> str:
    """A line a run, every figure of its summary."""
    names = list(dict.fromkeys(key for runs in found.values() for run in runs for key in run))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["row", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"row": row, **run} for row, runs in found.items() for run in runs)
    return buffer.getvalue()


def as_markdown(found: dict[str, list[dict]], columns: tuple[str, ...]) -> str:
    """A line a row: the mean over seeds, and the standard deviation where there are several."""
    lines = [f"| | {' | '.join(name.replace('_', ' ') for name in columns)} |", "|---" * (len(columns) + 1) + "|"]
    base = next(iter(found.values()))[0]
    figures = [f"{base[f'base_{name}']:.3f}" if f"base_{name}" in base else "" for name in columns]
    if any(figures):
        lines.append(f"| base, not tuned | {' | '.join(figures)} |")
    for row, runs in found.items():
        cells = []
        for name in columns:
            values = [run[name] for run in runs if run.get(name) is not None]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    count = len(next(iter(found.values())))
    over = "One seed" if count == 1 else f"Mean ± standard deviation over {count} seeds"
    losses = " Losses are nats a token." if "dev_loss" in columns else ""
    return "\n".join(lines) + f"\n\n{over}.{losses} Seconds are of training alone, memory is the process's peak.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; seconds mean something with 1 only")
    options = parser.parse_args()
    if options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, not {options.jobs}")
    name = options.name
    from runs import write_text

    found = summaries(name, options.jobs)
    write_text(ROOT / "results" / f"{name}.csv", as_csv(found))
    table = as_markdown(found, FIGURES[EXPERIMENTS[name].script])
    write_text(ROOT / "results" / f"{name}.md", table)
    print(table)


if __name__ == "__main__":
    with exit_cleanly():
        main()
