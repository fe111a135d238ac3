"""Does a long run leak memory or files? 5,000 steps of a one-layer model, saved every 50 steps.

python benchmarks/leak.py      # minutes; reads /proc, so on Linux only

Prints the memory and the open files of the process, and their growth from the 250th step, when all
buffers have been allocated, to the last.
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
from training import Task, Trainer

EPOCHS = 20


def memory_mb():
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_files():
    return len(os.listdir("/proc/self/fd")) - 1  # listing them opens one


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000)
    text = "save the resume state every this many steps"
    parser.add_argument("--every", type=int, default=50, help=text)
    options = parser.parse_args()
    torch.manual_seed(0)
    gpt = GPT2Model(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=512, n_positions=64))
    ids = torch.randint(0, 512, (4, 33))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    records = []  # memory and open files before each step

    def collate(indices):
        records.append((memory_mb(), open_files()))
        if len(records) % 250 == 0:
            memory, files = records[-1]
            print(f"step {len(records):>5}: {memory:.1f} MB, {files} open files", flush=True)
        return batch

    task = Task(
        batches=lambda epoch: [[0]] * (options.steps // EPOCHS),
        collate=collate,
        loss=lambda model, batch: model.loss(batch["input_ids"], batch["labels"]),
        num_targets=lambda indices: batch["labels"].numel(),
        num_tokens=lambda indices: batch["input_ids"].numel(),
        evaluate=lambda model: {"dev_loss": model.loss(batch["input_ids"], batch["labels"]).item()},
        save=SonnetGPT.save_pretrained,
    )
    config = TrainConfig(epochs=EPOCHS, lr=1e-3, checkpoint_every=options.every)
    with tempfile.TemporaryDirectory() as folder:
        run = Run("sonnets", "leak", {"out_dir": f"{folder}/run", "resume": False}, {})
        Trainer(SonnetGPT(gpt), task, config, run, torch.device("cpu"), torch.float32).train()
    memory, files = records[min(249, len(records) - 1)]
    growth = memory_mb() / memory - 1
    print(
        f"memory {memory:.1f} -> {memory_mb():.1f} MB ({growth:+.2%}), "
        f"open files {files} -> {open_files()}, {len(records)} steps"
    )


if __name__ == "__main__":
    main()
