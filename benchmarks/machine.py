"""Measure a machine in at most eight minutes: CUDA tests, parity, speed, memory, torchrun.

    python benchmarks/machine.py [MODEL]          # for a GPU; writes benchmarks/results/machine.md
    python benchmarks/machine.py --quick          # does everything run? one step of the tiny model

Runs the other benchmarks with one round each, in every precision that the machine has. A part that
fails is one row with its reason; the others still run, and the exit code is 1. Parts that need a
GPU, or several, are rows too. --quick only prints, unless --out is given.
"""

import argparse
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import paraphrase
import sonnets
import torch
from harness import FOLDER, markdown, model_folder

from config import BUNDLED_MODEL, ROOT
from files import read_json, write_text
from runs import environment
from training import choose_device, choose_dtype

NOT_HERE = "not on this machine"
PAIR_CASES = (  # without the other poolings, which take about as long
    paraphrase.BASELINE,
    paraphrase.BUCKETS,
    paraphrase.GENERALIZED,
    paraphrase.LORA_BASELINE,
    paraphrase.LORA,
)
COMPILE_CASES = (sonnets.FULL, sonnets.FULL_COMPILED, sonnets.LORA, sonnets.LORA_COMPILED)


@dataclass(frozen=True)
class Part:
    """One row of the table."""

    name: str
    work: Callable | None  # (folder, seconds left) -> outcome, tables; None: not on this machine


def make_parts(model, quick, device):
    """All parts, the most important ones first."""
    cuda = device.type == "cuda"
    several = cuda and torch.cuda.device_count() > 1
    settings = ["--rounds", "1"]
    if quick or cuda:
        settings.append("--in_process")
    if quick:
        settings += ["--steps", "1"]
    elif cuda:
        settings += ["--steps", "16"]  # one pass over the sonnets
    tokens = ["--tokens", "8"] if quick else []
    dtypes = precisions(device)
    parts = [
        Part("tests on CUDA", cuda_tests if cuda else None),
        Part("parity", benchmark("parity.py", model, "--dtypes", *dtypes)),
    ]
    for dtype in dtypes:
        arguments = [model, *settings, "--dtypes", dtype]
        pairs = [*arguments, "--cases", *PAIR_CASES]
        parts += [
            Part(f"sonnets, {dtype}", benchmark("sonnets.py", *arguments)),
            Part(f"paraphrases, {dtype}", benchmark("paraphrase.py", *pairs)),
            Part(f"generation, {dtype}", benchmark("generation.py", *arguments, *tokens)),
        ]
    fastest = str(choose_dtype("auto", device)).removeprefix("torch.")
    arguments = [model, *settings, "--dtypes", fastest, "--cases", *COMPILE_CASES]
    if quick:
        arguments += ["--backend", "eager"]
    parts.append(Part(f"--compile, {fastest}", benchmark("sonnets.py", *arguments)))
    scaling = torchrun(model, torch.cuda.device_count(), "cuda") if several else None
    parts.append(Part("torchrun", scaling))
    return parts


def precisions(device):
    """The names of those that the hardware multiplies."""
    if device.type == "cpu":
        fast = choose_dtype("auto", device) == torch.bfloat16
    else:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    names = ["float32"]
    if fast:
        names.append("bfloat16")
    if device.type == "cuda":
        names.append("float16")
    return names


def call(command, seconds):
    """The output of a Python command; raises RuntimeError with its last line if it fails."""
    if seconds <= 0:
        raise RuntimeError("no time is left")
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its own processes end with it
    )
    with process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not finished after {seconds:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    last = (output.strip().splitlines() or [""])[-1]
    if process.returncode:
        raise RuntimeError(last or f"exit code {process.returncode}")
    return last


def cuda_tests(folder, seconds):
    """The tests that need CUDA; warnings of other versions are no errors here."""
    command = ["-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider"]
    return call([*command, str(ROOT / "tests" / "test_cuda.py")], seconds), ""


def benchmark(script, *arguments):
    """The work of a part that runs another benchmark and includes its tables."""

    def work(folder, seconds):
        call([str(FOLDER / script), *map(str, arguments), "--out_dir", str(folder)], seconds)
        [path] = folder.glob("*.md")
        return "done", path.read_text(encoding="utf-8")

    return work


def torchrun(model, processes, device):
    """The work of a part that trains LoRA for an epoch with one and with several processes."""

    def work(folder, seconds):
        deadline = time.monotonic() + seconds
        outcomes = []
        for count in (1, processes):
            run = folder / str(count)
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            command = [*launcher, "sonnet_generation.py", f"--model_size={model}", "--use_lora"]
            command += ["--epochs=1", "--max_new_tokens=1", f"--device={device}"]
            command += [f"--out_dir={run}", f"--sonnet_out={run}.txt"]
            call(command, deadline - time.monotonic())
            summary = read_json(run / "summary.json")
            outcomes.append(
                f"{count}: {summary['tokens_per_second']:,.0f} tokens per second, "
                f"dev loss {summary['dev_loss']:.3f}"
            )
        return f"processes {'; '.join(outcomes)}", ""

    return work


def run_parts(parts, seconds):
    """Run the parts; returns the table of their outcomes, their own tables, and if one failed."""
    deadline = time.monotonic() + seconds
    records, tables, failed = [], [], False
    for part in parts:
        start = time.monotonic()
        outcome, table = NOT_HERE, ""
        if part.work:
            try:
                with tempfile.TemporaryDirectory() as folder:
                    outcome, table = part.work(Path(folder), deadline - start)
            except Exception as error:  # of any kind: the other parts still run
                reason = " ".join(str(error).split()).replace("|", "/")
                outcome = f"failed: {reason[:300] or type(error).__name__}"
                failed = True
        duration = f"{time.monotonic() - start:.0f}"
        records.append([part.name, outcome, duration])
        print(f"{part.name}: {outcome} ({duration} s)", flush=True)
        if table:
            tables.append(f"## {part.name}\n\n{table}")
    return markdown(["part", "outcome", "seconds"], records), tables, failed


def describe_machine(device, model):
    """A table of hardware and versions."""
    versions = environment(device, choose_dtype("auto", device), [])
    packages = versions["packages"] | {"peft": importlib.metadata.version("peft")}
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    names = [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus]
    return markdown(
        ["machine", ""],
        [
            ["GPUs", "; ".join(names) or "none"],
            ["CUDA", str(torch.version.cuda)],
            ["processor", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"],
            ["threads", str(versions["threads"])],
            ["precision of --dtype auto", versions["dtype"]],
            ["python", versions["python"]],
            ["packages", ", ".join(f"{name} {version}" for name, version in packages.items())],
            ["commit", str(versions["commit"])],
            ["model", Path(model).name],
        ],
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "a model's folder, or the size of a random one; default gpt2, with --quick the tiny one"
    parser.add_argument("model", nargs="?", help=text)
    parser.add_argument("--quick", action="store_true", help="one step of everything")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts after these do not run")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/machine.md")
    options = parser.parse_args(arguments)
    if options.quick:
        model = model_folder(options.model or BUNDLED_MODEL)
    else:
        model = model_folder(options.model or "gpt2")
        options.out = options.out or FOLDER / "results" / "machine.md"
    device = choose_device("auto")
    parts = make_parts(str(model.resolve()), options.quick, device)
    outcomes, tables, failed = run_parts(parts, 60 * options.minutes)
    if options.quick:
        outcomes += "\nOne step of each case shows that everything runs, not how fast it is.\n"
    text = "\n".join([describe_machine(device, model), outcomes, *tables])
    print(f"\n{text}")
    if options.out:
        write_text(options.out, text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
