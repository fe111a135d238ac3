"""A question to a table: runs of a task script over options and seeds, in results/NAME.{csv,md,png} and RESULTS.md.

    python experiments.py sonnets                         # full fine-tuning, LoRA, the untrained base
    python experiments.py poolings --seeds 3 --jobs 2     # fewer seeds; two runs at a time, whose seconds mean little
    python experiments.py poolings --rows last mean       # rows with these words alone
    python experiments.py poolings --dataset quora        # any option of the task script, for every run of the table

A run is kept in runs/experiments, under a hash of its script, of every option's value (defaults too) and of what is in
its data files and base weights: an interrupted table goes on, a changed option, default or file runs anew, and tables
share runs. Code is not hashed, as a comment would void hours: a table names the commits that its runs are of (with a +,
edited); after a change that matters, delete runs/experiments. A run that failed is in the table, and is tried again the
next time.
"""

import hashlib
import importlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from config import ROOT, HelpFormatter, InputError, Parser, exit_cleanly
from paraphrase_detection import POOLINGS

FIRST_SEED = 11711
COST = ("seconds_per_epoch", "peak_memory_gb")
TABLES = (  # of the runs' summaries, what there is of each: how good, and at what cost
    ("dev_loss", "test_loss", "test_bits_per_character", "dev_chrf",
     "dev_accuracy", "dev_macro_f1", "test_accuracy", "test_macro_f1", "test_word_overlap_accuracy"),
    ("trainable_parameters", "epochs", "best_epoch", "first_train_loss", "final_train_loss", "train_seconds", *COST),
)  # fmt: skip
LOSS = {"dev_loss": 0.02, "test_loss": 0.02}
JUDGED = {"dev_accuracy": 0.01, "test_accuracy": 0.01, "test_loss": 0.02}


@dataclass(frozen=True)
class Experiment:
    """A task script, the options of each row of its table, what to compare and what to draw.

    A row is compared with the first of those that share what stands before their colon, if they have one.
    """

    script: str
    rows: dict[str, str]
    compare: dict[str, float]  # a figure of the summary -> the margin within which a difference is taken for none
    panels: tuple  # each "curves" (losses over epochs), "parameters" (against dev loss), or figures to draw in a row

    def baseline(self, row: str) -> str:
        return next(other for other in self.rows if other.rpartition(":")[0] == row.rpartition(":")[0])


# To ask a question of your own, add an entry: the script; rows, each a label and its options; margins, fixed before the
# runs; panels. The margins here: 0.02 nats are 2 % of perplexity; 0.01 of accuracy is a pair in a hundred.
PAIRS = "--epochs 1 --pair_encoding"
METHODS = {"full": "", "LoRA": "--use_lora"}
TARGETS = ("q_proj", "q_proj v_proj", "q_proj k_proj v_proj out_proj", "q_proj v_proj interm_dense")
EXPERIMENTS = {
    "sonnets": Experiment(
        "sonnet_generation",
        {"full fine-tuning": "", "LoRA": "--use_lora", "base, not tuned": "--epochs 0",
         "the report's settings: full": "--preset report --model_size tiny",
         "the report's settings: LoRA": "--preset report --model_size tiny --use_lora"},
        LOSS | dict.fromkeys(COST, 0.0), ("curves", tuple(LOSS), COST)),
    "lora_rank": Experiment(
        "sonnet_generation",
        {"full fine-tuning": ""} | {
            f"{re.sub('_proj|_dense', '', names)}, rank {rank}": f"--use_lora --lora_rank {rank} --lora_targets {names}"
            for names in TARGETS for rank in (1, 4, 64)},
        LOSS, ("parameters", tuple(LOSS), COST)),
    "poolings": Experiment(
        "paraphrase_detection",
        {f"{encoding}: {pooling}": f"{PAIRS} {encoding} --pooling {pooling}"
         for encoding in ("joint", "separate") for pooling in POOLINGS}
        | {f"separate, LoRA: {pooling}": f"{PAIRS} separate --pooling {pooling} --use_lora"
           for pooling in ("last", "generalized", "multihead")},
        JUDGED, (("test_accuracy", "test_loss"), COST)),
    "model_size": Experiment(
        "sonnet_generation",
        {f"{size}: {name}": f"--model_size {size} {METHODS[name]}"
         for size in ("tiny", "gpt2", "gpt2-medium") for name in METHODS},
        LOSS, ("parameters", tuple(LOSS), COST)),
    "learning_rate": Experiment(
        "sonnet_generation",
        {f"{name}: {rate}": f"--lr {rate} {METHODS[name]}"
         for name, rates in (("full", ("1e-4", "5e-5", "2e-4")), ("LoRA", ("1e-3", "5e-4", "2e-3"))) for rate in rates},
        LOSS, ("curves", tuple(LOSS))),
    "paraphrase_learning_rate": Experiment(
        "paraphrase_detection",
        {f"{name}: {rate}": f"{PAIRS} separate --pooling generalized --lr {rate} {METHODS[name]}"
         for name, rates in (("full", ("5e-4", "2e-4")), ("LoRA", ("2e-3", "1e-3"))) for rate in rates},
        JUDGED, ("curves", ("test_accuracy", "test_loss"))),
}  # fmt: skip


def folder_of(script: str, arguments: list[str]) -> Path:
    """Where the run of these arguments is kept; an option that names a file counts by what is in the file."""
    from runs import NOT_COMPARED

    options = vars(importlib.import_module(script).parse_options(arguments))
    base = ROOT / "data" / "tiny-gpt2" if options["model_size"] == "tiny" else Path(options["model_size"])
    values = {name: value for name, value in options.items() if name not in NOT_COMPARED - {"gradient_checkpointing"}}
    values["weights"] = str(base / "model.safetensors")
    for name, value in values.items():
        if isinstance(value, str) and Path(value).is_file():
            values[name] = hashlib.sha256(Path(value).read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    return ROOT / "runs" / "experiments" / f"{script}-{key}"


def execute(folder: Path, arguments: list[str], jobs: int) -> str | None:
    """Run the script that the folder is named for, or go on with its run; returns why it failed, None if it did not."""
    from runs import write_text

    command = [sys.executable, str(ROOT / f"{folder.name.rpartition('-')[0]}.py"), *arguments, "--out_dir", str(folder)]
    folder.mkdir(parents=True, exist_ok=True)  # the run's working directory: its predictions/ is its own
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, encoding="utf-8", cwd=folder,
                          env=threads | os.environ, check=False)  # fmt: skip
    write_text(folder / "output.txt", done.stdout + done.stderr)
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1] if done.returncode else None


def gather(experiment: Experiment, seeds: int, jobs: int, given: list[str]) -> dict[str, list[dict]]:
    """Each row's summaries, a seed after the other: of runs that are there, and of missing ones, `jobs` at a time.

    `given` options come after a row's own, and win. Of a run that failed there is, beside its seed, why: `failed`.
    """
    from tqdm import tqdm

    plan, found = {}, {row: [] for row in experiment.rows}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):  # an interrupted table has all rows of its first seeds
        for row, options in experiment.rows.items():
            arguments = [*options.split(), *given, "--seed", str(seed)]
            plan[row, seed] = folder_of(experiment.script, arguments), arguments
    missing = {folder: arguments for folder, arguments in plan.values() if not (folder / "summary.json").exists()}
    with ThreadPoolExecutor(jobs) as pool:
        done = tqdm(pool.map(lambda run: execute(*run, jobs), missing.items()), total=len(plan), unit="run",
                    initial=len(plan) - len(missing), smoothing=0)  # fmt: skip
        failed = dict(zip(missing, done, strict=True))
    for (row, seed), (folder, _) in plan.items():
        run = {"seed": seed, "folder": folder.relative_to(ROOT).as_posix(), "failed": failed.get(folder)}
        if not run["failed"]:
            config, summary = (json.loads((folder / f"{file}.json").read_bytes()) for file in ("config", "summary"))
            commit = config["commit"] or "unknown"
            run |= {"commit": commit[:9] + "+" * commit.endswith("+"), "dtype": config["dtype"]} | summary
        found[row].append(run)
    return found


def judged_right(run: dict, split: str):
    """An array (N,) with 1 for each labelled pair of a split that the run's prediction is right on, else 0."""
    import numpy as np

    from datasets import read_pairs

    path = json.loads((ROOT / run["folder"] / "config.json").read_bytes())["options"][f"para_{split}"]
    lines = (ROOT / run["folder"] / "predictions" / f"para-{split}-output.csv").read_text(encoding="utf-8").splitlines()
    predicted = [int(line.rpartition(",")[2]) for line in lines[1:]]
    return 1.0 * np.equal(predicted, [pair.label for pair in read_pairs(path, "the run has read it", [])])


def differences(experiment: Experiment, found: dict[str, list[dict]]) -> list[list[str]]:
    """For each figure and row: the difference from its baseline, over the same seeds, two 95 % intervals, the verdict.

    One interval is over seeds (paired t); one over items, where predictions are known (bootstrap of means over seeds).
    The verdict holds for both. Equivalent: both lie within the margin (two one-sided tests at 2.5 % each).
    """
    from evaluation import bootstrap_interval, mean_interval

    lines = []
    for figure, row in ((figure, row) for figure in experiment.compare for row in found):
        base, margin = experiment.baseline(row), experiment.compare[figure]
        pairs = [(run, other) for run, other in zip(found[row], found[base], strict=True)
                 if None not in (run.get(figure), other.get(figure))]  # fmt: skip
        if row == base or not pairs:
            continue
        gains = [run[figure] - other[figure] for run, other in pairs]
        seeds, items = mean_interval(gains)[1:] if len(gains) > 1 else (), ()
        if figure.endswith("_accuracy"):
            right = [judged_right(run, figure[:-9]) - judged_right(other, figure[:-9]) for run, other in pairs]
            items = bootstrap_interval(sum(right) / len(right))
        ends = [*seeds, *items] or [-math.inf, math.inf]
        verdict = ("equivalent" if max(map(abs, ends)) < margin else "higher" if min(ends) > 0
                   else "lower" if max(ends) < 0 else "undecided")  # fmt: skip
        intervals = [" to ".join(f"{end:+.3f}" for end in ends) for ends in (seeds, items)]
        lines.append([row, figure, base, f"{statistics.mean(gains):+.3f}", *intervals, f"{margin or ''}", verdict])
    return lines


def shown(values: list[float | None]) -> str:
    """The mean of what is known, with three decimals or four digits, and the standard deviation if values differ."""
    known = [value for value in values if value is not None]
    mean = statistics.mean(known or [0])
    digits = max(0, 3 - int(math.log10(max(1, abs(mean)))))
    spread = f" ± {statistics.stdev(known):,.{digits}f}" if len(set(known)) > 1 else ""
    return f"{mean:,.{digits}f}{spread}" if known else ""


def as_table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("_", " ")


def as_markdown(experiment: Experiment, found: dict[str, list[dict]]) -> str:
    """Tables of means and standard deviations over seeds, a line a row; the differences; what failed; a key."""
    runs = [run for row in found for run in found[row]]
    form = list(dict.fromkeys(name.removeprefix("gold_") for run in runs for name in run if name.startswith("gold_")))
    references = {label: [{name: run.get(f"{who}_{name}") for name in form} for run in runs]
                  for label, who in (("Shakespeare's own", "gold"), ("his lines, shuffled", "shuffled"))}  # fmt: skip
    parts = []
    for table in (*TABLES, form):
        columns = [name for name in table if any(run.get(name) is not None for run in runs)]
        rows = found | references if table is form else found
        cells = [[row, *(shown([run.get(name) for run in rows[row]]) for name in columns)] for row in rows]
        parts += [as_table([["", *columns], *cells])] * bool(columns)
    header = ["", "figure", "against", "difference", "95 %, seeds", "95 %, items", "margin", "verdict"]
    parts.append(as_table([header, *differences(experiment, found)]))
    failed = {}
    for row, run in ((row, run) for row, of_row in found.items() for run in of_row if run["failed"]):
        failed.setdefault((row, run["failed"]), []).append(str(run["seed"]))
    parts += [f"Failed: {row}, seed {', '.join(seeds)}: {why}" for (row, why), seeds in failed.items()]
    commits = Counter(f"{run['commit']} ({run['dtype']})" for run in runs if not run["failed"]).items()
    parts.append(f"Mean ± standard deviation over {len(runs) // len(found)} seeds. Losses are nats. Seconds are of "
                 "training alone, memory is the process's peak. Runs by commit (and precision): "
                 f"{', '.join(f'{count} of {commit}' for commit, count in commits)}.")  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, 65), metavar="N", help="runs of each row")
    parser.add_argument("--jobs", type=int, default=1, choices=range(1, 65), metavar="N", help="runs at a time")
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="of its rows, those that hold one of these words")
    options, given = parser.parse_known_args()
    experiment = EXPERIMENTS[options.name]
    rows = {row: how for row, how in experiment.rows.items() if any(word in row for word in options.rows or [row])}
    if not rows:
        raise InputError(f"--rows {' '.join(options.rows)} finds none of the rows {'; '.join(experiment.rows)}")
    experiment = replace(experiment, rows=rows)
    given = [str(Path(word).resolve()) if Path(word).exists() else word for word in given]  # runs have other folders
    if taken := {"--seed", "--out_dir", "--resume"} & {word.partition("=")[0] for word in given}:
        raise InputError(f"{', '.join(taken)} is set for each run; --seeds says how many there are")
    found = gather(experiment, options.seeds, options.jobs, given)
    from figures import draw_experiment
    from runs import include_tables, write_csv, write_text

    path = ROOT / "results" / re.sub(r"[^\w.]+", "-", "-".join([options.name, *(options.rows or []), *given]))
    table = as_markdown(experiment, found)
    write_csv(Path(f"{path}.csv"), [{"row": row, **run} for row, runs in found.items() for run in runs])
    write_text(Path(f"{path}.md"), table)
    draw_experiment(Path(f"{path}.png"), experiment.panels, found)
    for document in ROOT.glob("*.md"):
        include_tables(document)
    print(table)
    sys.exit(any(run["failed"] for runs in found.values() for run in runs))


if __name__ == "__main__":
    with exit_cleanly():
        main()
