"""What every benchmark shares: a process for each measurement, alternating rounds, medians and spread in a CSV."""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="a size name or a model's folder")
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=5, help="timed steps a process; one before them is left out")
    options.add_argument("--one", nargs=2, metavar=("CASE", "DTYPE"), help=argparse.SUPPRESS)
    return options


def product_rate(device, dtype) -> float:
    """TFLOP/s of this machine's matrix products, (1024, 768) by (768, 3072): about what a step can reach at most."""
    import torch

    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((1024, 768), (768, 3072)))
    best = float("inf")
    count = 1 if device.type == "cpu" else 50  # a GPU is asked for many before its result is waited for
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(count):
            product = left @ right
        product[0, 0].item()
        best = min(best, (time.perf_counter() - start) / count)
    return 2 * 1024 * 768 * 3072 / best / 1e12


def timed_steps(loss_of: Callable[[dict], object], parameters: list, batches: list[dict], device, dtype) -> dict:
    """Seconds a step with AdamW (median, and the sum; the first left out), and the process's peak memory in GB."""
    import torch

    from runs import peak_memory_gb

    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        loss.item()  # a GPU has finished then
        seconds.append(time.perf_counter() - start)
    return {"step_s": statistics.median(seconds[1:]), "total_s": sum(seconds[1:]), "peak_gb": peak_memory_gb(device)}


def run(options: argparse.Namespace, measure: Callable[[str, str], dict], cases: list[str], name: str) -> list[dict]:
    """Measure every case and precision `rounds` times, each in a process of its own, cases alternating.

    Prints and writes to results/NAME.csv a row a case: the median of each figure, and the spread of the first.
    """
    if options.one:
        print(json.dumps(measure(*options.one)))
        sys.exit()
    rows = []
    for dtype in options.dtypes:
        found = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case, figures in found.items():
                done = subprocess.run([sys.executable, *sys.argv, "--one", case, dtype], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{case}, {dtype}: {done.stderr}")
                figures.append(json.loads(done.stdout.splitlines()[-1]))
        for case, figures in found.items():
            first = [run[next(iter(run))] for run in figures]
            medians = {key: round(statistics.median(run[key] for run in figures), 4) for key in figures[0]}
            spread = {"least": round(min(first), 4), "most": round(max(first), 4)}
            rows.append({"model": Path(options.model).name, "dtype": dtype, "case": case, "rounds": len(figures),
                         **medians, **spread})  # fmt: skip
            print(rows[-1], flush=True)
    path = HERE / "results" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def ratio(rows: list[dict], dtype: str, case: str, other: str, figure: str) -> float:
    """One case's figure over another's, in one precision."""
    values = {row["case"]: row[figure] for row in rows if row["dtype"] == dtype}
    return values[case] / values[other]
