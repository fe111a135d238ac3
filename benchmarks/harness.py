"""What the benchmarks share: one process per measurement, alternating cases, medians and tables.

If no model folder is given, one is made: a GPT-2 of full size with random weights, on which neither
speed nor memory depends, and the tokenizer of the bundled model. Comparisons are ratios within a
round, and tables show their median and range. Afterwards, `python benchmarks/documents.py` copies
the tables to README.md and RESULTS.md.
"""

import argparse
import dataclasses
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from config import BUNDLED_MODEL, PRESETS, ROOT
from files import write_csv, write_text
from models.gpt2 import GPT2Model
from runs import peak_memory_gb
from training import autocast, choose_device

FOLDER = ROOT / "benchmarks"


def parser(description):
    """The options of every benchmark."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("model", nargs="?", default="gpt2", help="a model's folder, or the size of a random one")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--rounds", type=int, default=5)
    add("--cases", nargs="+", help="some of the cases by name; default all")
    add("--steps", type=int, default=3, help="timed steps per process, after an untimed one")
    add("--out_dir", type=Path, default=FOLDER / "results", help="folder of the results")
    text = "one process for all cases: sooner, but memory is only right on CUDA"
    add("--in_process", action="store_true", help=text)
    add("--one", nargs=2, metavar=("CASE", "DTYPE"), help="print one measurement as JSON")
    return options


def model_folder(model):
    """The folder of this name, or one with random weights of this size, which is made once."""
    if Path(model).is_dir():
        return Path(model)
    folder = FOLDER / "cache" / model
    if not (folder / "tokenizer.json").is_file():
        from data.pretrain import init_weights  # its imports would add to the measured memory

        torch.manual_seed(0)
        gpt = GPT2Model(dataclasses.replace(PRESETS[model], eos_token_id=0))
        init_weights(gpt)
        gpt.folder = BUNDLED_MODEL
        gpt.copied_files = ["tokenizer.json"]
        gpt.save_pretrained(folder)
    return folder


def add_peft_lora(model, task_type):
    """A model of transformers with PEFT's LoRA on the layers that LoRAConfig adapts here."""
    from peft import LoraConfig, get_peft_model  # only in processes that use it: its memory counts

    config = LoraConfig(
        r=4,
        lora_alpha=16,
        lora_dropout=0.05,
        fan_in_fan_out=True,
        target_modules=["c_attn", "c_fc"],
        task_type=task_type,
    )
    return get_peft_model(model, config)


def seconds(work, device):
    """The duration of work(); on CUDA it is measured by events on the GPU."""
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


@functools.cache
def matmul_tflops(device, dtype):
    """The rate of (1024, 768) by (768, 3072) matrix multiplications: the upper limit for a step."""
    left = torch.randn(1024, 768, device=device, dtype=dtype)
    right = torch.randn(768, 3072, device=device, dtype=dtype)
    count = 1 if device.type == "cpu" else 50
    repeated = (seconds(lambda: [left @ right for _ in range(count)], device) for _ in range(20))
    return 2 * 1024 * 768 * 3072 / (min(repeated) / count) / 1e12


def timed_steps(loss_of, parameters, batches, device, dtype, fused=True):
    """Mean seconds per step with AdamW, and the peak memory in GB.

    A first step, in which memory is allocated and --compile compiles, is measured on its own.
    """
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused or None)

    def step(batch):
        batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()

    first = seconds(lambda: step(batches[0]), device)
    total = sum(seconds(lambda batch=batch: step(batch), device) for batch in batches)
    memory = peak_memory_gb(device)
    return {"step_s": total / len(batches), "first_step_s": first, "peak_gb": memory}


def run(options, measure, cases, name):
    """Measure every case and precision `rounds` times; returns (dtype, case) -> list of metrics.

    `measure(options, case, device, dtype)` runs in a process of its own (unless --in_process), and
    cases alternate. It returns nothing for a case that does not exist in a precision. Writes
    NAME.csv with the median of each metric and the range of the first.
    """
    device = choose_device("auto")
    if options.one:
        case, dtype = options.one
        print(json.dumps(measure(options, case, device, getattr(torch, dtype))))
        sys.exit()

    def measure_here(command, case, dtype):
        gc.collect()  # the model of the last case
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return measure(options, case, device, getattr(torch, dtype))

    measure_case = measure_here if options.in_process else measure_once
    model_folder(options.model)  # is made before anything is measured
    results = {}
    for dtype in options.dtypes:
        for number in range(1, options.rounds + 1):
            for case in options.cases or cases:
                metrics = measure_case(sys.argv, case, dtype)
                if metrics:
                    results.setdefault((dtype, case), []).append(metrics)
                    first, value = next(iter(metrics.items()))
                    print(f"round {number}, {dtype}, {case}: {first} {value:.3f}", flush=True)
    records = []
    for (dtype, case), rounds in results.items():
        record = {"model": Path(options.model).name, "dtype": dtype, "case": case}
        record |= {"rounds": len(rounds)} | {key: median(rounds, key) for key in rounds[0]}
        first = [next(iter(metrics.values())) for metrics in rounds]
        records.append(record | {"min": min(first), "max": max(first)})
    records = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        for row in records
    ]
    write_csv(options.out_dir / f"{name}.csv", records)
    return results


def measure_once(command, case, dtype, folder=None):
    """The metrics that a benchmark prints for one case; exits if it fails."""
    command = [sys.executable, *command, "--one", case, dtype]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case}, {dtype}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def median(rounds, metric):
    return statistics.median(metrics[metric] for metrics in rounds)


def median_and_range(ratios):
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def report(options, results, name, columns, comparisons):
    """Print NAME.md and write it: medians per case, and ratios per comparison.

    `columns` maps metrics to headings. A comparison is (heading, case, other cases, metric): the
    case's metric divided by the least of the other cases'.
    """
    medians = [
        [case, dtype, *(shown(median(rounds, metric)) for metric in columns)]
        for (dtype, case), rounds in results.items()
    ]
    ratios = [
        [heading, *(ratio(results, dtype, *comparison) for dtype in options.dtypes)]
        for heading, *comparison in comparisons
    ]
    ratios = [record for record in ratios if any(record[1:])]  # with --cases, some have none
    rounds = f"median of {options.rounds} rounds (range)" if options.rounds > 1 else "one round"
    title = f"{Path(options.model).name}, {rounds}"
    first = markdown(["", "precision", *columns.values()], medians)
    text = f"{first}\n{markdown([title, *options.dtypes], ratios)}"
    print(f"\n{text}")
    write_text(options.out_dir / f"{name}.md", text)


def shown(value):
    """Two decimals, or four for the milliseconds of a GPU."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def ratio(results, dtype, case, others, metric):
    """The ratio of a comparison, or nothing if the cases do not exist in this precision."""
    others = [results[dtype, other] for other in others if (dtype, other) in results]
    if (dtype, case) not in results or not others:
        return ""
    best = min(others, key=lambda rounds: median(rounds, metric))
    pairs = zip(results[dtype, case], best, strict=True)
    return median_and_range([ours[metric] / theirs[metric] for ours, theirs in pairs])


def markdown(header, records):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *records]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
