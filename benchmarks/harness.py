"""What every benchmark shares: a process for each measurement, cases alternating, medians and spread in a CSV.

Without a model's folder, one is made: GPT-2 in full size with random weights, on which neither speed nor memory
depends, and the embedded base's tokenizer. A comparison is a ratio within a round; its median and range are shown.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", nargs="?", default="gpt2", help="a model's folder, or the size of a random one")
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=3, help="timed steps a process; one before them is left out")
    options.add_argument("--one", nargs=2, metavar=("CASE", "DTYPE"), help=argparse.SUPPRESS)
    return options


def folder_of(model: str) -> Path:
    """The folder of that name, or one with random weights of that size, made once."""
    from config import PRESETS
    from models.gpt2 import GPT2Model

    if Path(model).is_dir():
        return Path(model)
    folder = HERE / "cache" / model
    if not (folder / "tokenizer.json").is_file():
        import torch

        torch.manual_seed(0)
        gpt = GPT2Model(PRESETS[model])
        gpt.initialise()
        gpt.save_pretrained(folder)
        shutil.copy(ROOT / "data" / "tiny-gpt2" / "tokenizer.json", folder)
    return folder


def device_and_dtype(dtype: str) -> tuple:
    """CUDA where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, dtype)


def seconds(work: Callable[[], object], device) -> float:
    """How long `work` takes; on CUDA by events, which the GPU itself stamps."""
    import torch

    if device.type == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def product_rate(device, dtype) -> float:
    """TFLOP/s of this machine's matrix products, (1024, 768) by (768, 3072): what a step can reach at most."""
    import torch

    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((1024, 768), (768, 3072)))
    count = 1 if device.type == "cpu" else 50
    best = min(seconds(lambda: [left @ right for _ in range(count)], device) for _ in range(20)) / count
    return 2 * 1024 * 768 * 3072 / best / 1e12


def timed_steps(loss_of: Callable[[dict], object], parameters: list, batches: list[dict], device, dtype,
                fused: bool | None = True) -> dict:  # fmt: skip
    """Mean seconds a step with AdamW over these batches, after a first step that is left out, and the peak in GB."""
    import torch

    from runs import peak_memory_gb

    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused or None)

    def step(batch: dict) -> None:
        batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()

    step(batches[0])
    total = sum(seconds(lambda batch=batch: step(batch), device) for batch in batches)
    return {"step_s": total / len(batches), "peak_gb": peak_memory_gb(device)}


def run(options: argparse.Namespace, measure: Callable[[str, str], dict], cases: list[str], name: str) -> dict:
    """Measure every case and precision `rounds` times, each in a process of its own, cases alternating.

    Writes to results/NAME.csv a row a case: each figure's median, and the spread of the first. Returns the figures of
    every round, a list for each (dtype, case).
    """
    if options.one:
        print(json.dumps(measure(*options.one)))
        sys.exit()
    folder_of(options.model)  # made before anything is timed
    found, rows = {}, []
    for dtype in options.dtypes:
        for number in range(options.rounds):
            for case in cases:
                done = subprocess.run([sys.executable, *sys.argv, "--one", case, dtype], capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{case}, {dtype}: {done.stderr}")
                figures = json.loads(done.stdout.splitlines()[-1])
                if figures:  # a case may have no form in a precision
                    found.setdefault((dtype, case), []).append(figures)
                    first = next(iter(figures))
                    print(f"round {number + 1}, {dtype}, {case}: {first} {figures[first]:.3f}", flush=True)
    for (dtype, case), figures in found.items():
        first = [run[next(iter(run))] for run in figures]
        medians = {key: round(statistics.median(run[key] for run in figures), 4) for key in figures[0]}
        spread = {"least": round(min(first), 4), "most": round(max(first), 4)}
        rows.append({"model": Path(options.model).name, "dtype": dtype, "case": case, "rounds": len(figures),
                     **medians, **spread})  # fmt: skip
    path = HERE / "results" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return found


def ratio_table(found: dict, options: argparse.Namespace, rows: list[tuple[str, str, list[str], str]]) -> list[str]:
    """Markdown: of each (heading, case, other cases, figure) the ratio, a column a precision."""
    title = f"{Path(options.model).name}, median of {options.rounds} rounds (range)"
    lines = [f"| {title} | {' | '.join(options.dtypes)} |", "|---" * (1 + len(options.dtypes)) + "|"]
    for heading, case, others, figure in rows:
        cells = [ratio(found, dtype, case, others, figure) for dtype in options.dtypes]
        lines.append(f"| {heading} | {' | '.join(cells)} |")
    return lines


def ratio(found: dict, dtype: str, case: str, others: list[str], figure: str) -> str:
    """One case's figure over the best (least) of others', the median over rounds and its range, for a table."""
    there = [found[dtype, other] for other in others if (dtype, other) in found]
    if (dtype, case) not in found or not there:
        return ""
    best = min(there, key=lambda runs: statistics.median(run[figure] for run in runs))
    values = [ours[figure] / theirs[figure] for ours, theirs in zip(found[dtype, case], best, strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(found: dict, columns: dict[str, str]) -> list[str]:
    """Markdown rows, a case and precision each, with the medians of these figures under these headings."""
    lines = [f"| | precision | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    for (dtype, case), figures in found.items():
        cells = [f"{statistics.median(run[name] for run in figures):.2f}" for name in columns]
        lines.append(f"| {case} | {dtype} | {' | '.join(cells)} |")
    return lines


def write_tables(name: str, cases: list[str], ratios: list[str]) -> None:
    """Both into results/NAME.md, and from there into RESULTS.md; and on the screen."""
    from runs import include_tables

    text = "\n".join([*cases, "", *ratios]) + "\n"
    print(text)
    (HERE / "results" / f"{name}.md").write_text(text, encoding="utf-8", newline="\n")
    include_tables(ROOT / "RESULTS.md")
