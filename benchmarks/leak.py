"""Whether a long run keeps memory or files: 5,000 steps of a one-layer model, its state saved every 50.

python benchmarks/leak.py      # minutes; reads /proc, so on Linux only

Prints the process's memory and open files as the run goes on, and the growth from the 250th step, when all buffers
have been made, to the last.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from config import GPT2Config, TrainConfig
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from runs import Run
from training import Task, train


def memory_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) - 1  # listing them opens one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=50, help="save the resume state every this many steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    gpt = GPT2Model(GPT2Config(layers=1, width=64, heads=2, vocab_size=512, positions=64))
    gpt.initialise()
    ids = torch.randint(0, 512, (4, 33))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "attention_mask": torch.ones(4, 32)}
    seen = []

    def collate(rows: list) -> dict:
        seen.append((memory_mb(), open_files()))
        if len(seen) % 250 == 0:
            print(f"step {len(seen):>5}: {seen[-1][0]:.1f} MB, {seen[-1][1]} open files", flush=True)
        return batch

    steps = options.steps // 20
    task = Task(
        batches=lambda epoch: [[0]] * steps,
        collate=collate,
        loss=lambda model, batch: model.loss(batch["input_ids"], batch["labels"]),
        items=lambda batch: batch["labels"].numel(),
        evaluate=lambda model: {"dev_loss": model.loss(batch["input_ids"], batch["labels"]).item()},
        save=lambda model, folder: model.gpt.save_pretrained(folder),
    )
    config = TrainConfig(epochs=20, lr=1e-3, checkpoint_every=options.every)
    with tempfile.TemporaryDirectory() as folder:
        run = Run("sonnets", "leak", {"out_dir": f"{folder}/run", "resume": False}, {})
        train(SonnetGPT(gpt), task, config, run, torch.device("cpu"), torch.float32)
    first, last = seen[min(249, len(seen) - 1)], (memory_mb(), open_files())
    print(f"memory {first[0]:.1f} -> {last[0]:.1f} MB ({100 * (last[0] / first[0] - 1):+.2f} %), "
          f"open files {first[1]} -> {last[1]}, {len(seen)} steps")  # fmt: skip


if __name__ == "__main__":
    main()
