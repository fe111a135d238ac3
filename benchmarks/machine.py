"""Measure a machine in a few minutes: its hardware, the CUDA tests, speed and memory in one round.

    python benchmarks/machine.py [MODEL]     # writes benchmarks/results/machine.md

MODEL is as in benchmarks/speed.py. A part that fails is shown with its reason, the others still
run, and the exit code is 1.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from config import ROOT
from training.options import choose_hardware
from training.runs import environment, write_text

OUT = ROOT / "benchmarks" / "results" / "machine.md"


def describe():
    """Lines about hardware and versions."""
    hardware = choose_hardware()
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    names = [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus]
    packages = environment()["packages"].items()
    return [
        f"- GPUs: {'; '.join(names) or 'none'}; CUDA {torch.version.cuda}",
        f"- processor: {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        f"- precision of --dtype auto: {hardware.dtype}",
        f"- packages: {', '.join(f'{name} {version}' for name, version in packages)}",
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="gpt2")
    options = parser.parse_args()
    table = OUT.with_name("machine-speed.md")
    speed = [str(ROOT / "benchmarks" / "speed.py"), options.model, "--rounds", "1"]
    commands = {"speed": [*speed, "--out", str(table)]}
    if torch.cuda.is_available():
        tests = ["-m", "pytest", "-q", "-W", "default", str(ROOT / "tests" / "test_cuda.py")]
        commands = {"tests on CUDA": tests, **commands}
    lines, failed = describe(), False
    for name, command in commands.items():
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        failed |= done.returncode != 0
        last = (done.stdout + done.stderr).strip().splitlines()[-1]
        lines.append(f"- {name}: {'failed: ' if done.returncode else ''}{last}")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if table.is_file():
        text += f"\n{table.read_text(encoding='utf-8')}"
        table.unlink()
    write_text(OUT, text)
    print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
