"""Is this checkout as fast as another one, such as a worktree of an older commit?

    git worktree add /tmp/before COMMIT
    python benchmarks/compare_commits.py /tmp/before [MODEL] [--dtype float32] [--rounds 5]

Runs single measurements of benchmarks/sonnets.py, generation.py and paraphrase.py of both checkouts
in alternation, in one process each, on the same model folder and pairs. Prints the medians, and the
median and range of the ratio within a round; below 1, this checkout is faster or smaller. Use a
model with random weights, the default: older checkouts let texts of trained models end early.
"""

import argparse
from pathlib import Path

from harness import markdown, measure_once, median, median_and_range, model_folder

from config import ROOT

# Metrics by label; in all of them, less is better.
MEASUREMENTS = (
    ("sonnets.py", "ours, LoRA", {"LoRA step of 8 sonnets, s": "step_s", "memory, GB": "peak_gb"}),
    ("sonnets.py", "ours, full", {"full step of 8 sonnets, s": "step_s", "memory, GB": "peak_gb"}),
    ("generation.py", "ours", {"12 continuations of 128 tokens, s": "total_s"}),
    (
        "paraphrase.py",
        "ours, full, generalized",
        {"training per pair, generalized pooling, s": "pair_s", "memory, GB": "peak_gb"},
    ),
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    text = "a model's folder, or the size of a random one"
    parser.add_argument("model", nargs="?", default="gpt2", help=text)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    text = "timed steps per process"
    parser.add_argument("--steps", type=int, default=3, help=text)
    options = parser.parse_args()
    model = str(model_folder(options.model).resolve())
    arguments = [model, "--steps", str(options.steps)]
    checkouts = (options.other.resolve(), ROOT)
    records = []
    for script, case, metrics in MEASUREMENTS:
        rounds = {checkout: [] for checkout in checkouts}
        for number in range(options.rounds):
            # The order alternates too, so that neither always has the warmer machine.
            for checkout in checkouts[:: -1 if number % 2 else 1]:
                command = [str(checkout / "benchmarks" / script), *arguments]
                if script == "paraphrase.py":
                    command += ["--pairs", str(ROOT / "data" / "verses-train.csv")]
                rounds[checkout].append(measure_once(command, case, options.dtype, checkout))
            print(f"round {number + 1}, {script}, {case}", flush=True)
        other, this = rounds.values()
        for label, metric in metrics.items():
            ratios = [one[metric] / two[metric] for one, two in zip(this, other, strict=True)]
            medians = [f"{median(part, metric):.4f}" for part in (other, this)]
            records.append([label, *medians, median_and_range(ratios)])
    header = ["", "other", "this", "this / other (range)"]
    print(f"\n{markdown(header, records)}", end="")


if __name__ == "__main__":
    main()
