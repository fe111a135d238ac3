"""Pretrain the embedded base, data/tiny-gpt2, on data/cache/corpus with the project's own model, loss and loop.

python data/pretrain.py             # about 30 million tokens; --resume goes on after an interruption
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from config import PRESETS, ROOT, InputError, TrainConfig, exit_cleanly
from datasets import SonnetsDataset, read_sonnets
from evaluation import language_model_figures
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from runs import Run, facts, write_bytes
from training import Task, choose_device, choose_dtype, train

CORPUS, BASE = ROOT / "data" / "cache" / "corpus", ROOT / "data" / "tiny-gpt2"
STEPS = 246  # an epoch: 1.008 million tokens
BATCHES = ((32, 128), (8, 512))  # sequences, tokens each: first half, second half; short ones cost less
# shares of the sequences: first half, second half. Verse counts most where the learning rate is small
SHARES = {"shakespeare": (0.15, 0.35), "bible": (0.40, 0.25), "modern": (0.45, 0.40)}


class Windows:
    """Sequences of tokens out of the corpus, each source read from its start to its end, again and again."""

    def __init__(self, epochs: int, seed: int):
        self.tokens = {name: np.load(CORPUS / f"{name}.npy", mmap_mode="r") for name in SHARES}
        self.epochs, self.seed = epochs, seed

    def batches(self, epoch: int) -> list[list[tuple[str, int, int]]]:
        """Each step's (source, start, length): every source goes on where the epoch before left off."""
        rows = []
        for name, tokens in self.tokens.items():
            begin = 0
            for index in range(epoch + 1):
                half = int(index >= self.epochs / 2)
                size, length = BATCHES[half]
                starts = begin + length * np.arange(round(size * STEPS * SHARES[name][half]))
                begin = starts[-1] + length
            # a pass's sequences start elsewhere than those of the pass before: the corpus is no multiple of a length
            rows += [(name, int(start) % (len(tokens) - length - 1), length) for start in starts]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        return [[rows[index] for index in order[start : start + size]] for start in range(0, size * STEPS, size)]

    def collate(self, rows: list[tuple[str, int, int]]) -> dict:
        return as_batch([self.tokens[name][start : start + length + 1] for name, start, length in rows])


def as_batch(windows: list[np.ndarray]) -> dict:
    tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    ones = torch.ones_like(inputs)
    return {"input_ids": inputs, "labels": labels, "attention_mask": ones, "characters": labels.numel()}


def held_out(name: str, count: int = 32, length: int = 512) -> list[dict]:
    """`count` sequences spread evenly over text that is not trained on."""
    tokens = np.load(CORPUS / f"heldout_{name}.npy")
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    return [as_batch([tokens[start : start + length + 1] for start in starts[first : first + 8]])
            for first in range(0, count, 8)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="of 1.008 million tokens each (default: 30)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default: 1.5e-3)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same options")
    parser.add_argument("--out_dir", help="folder of the run")
    options = parser.parse_args()

    config = TrainConfig(epochs=options.epochs, lr=options.lr, schedule="cosine", warmup=0.02,
                         max_grad_norm=1.0, weight_decay=0.1)  # fmt: skip
    if not (CORPUS / "shakespeare.npy").is_file():
        raise InputError(f"{CORPUS} holds no tokens; data/README.md lists the commands that make them")
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    run = Run("pretrain", "tiny", vars(options), facts(device, dtype, [CORPUS / f"{name}.npy" for name in SHARES]))
    torch.manual_seed(config.seed)
    gpt = GPT2Model(PRESETS["tiny"])
    gpt.initialise()
    gpt.folder = BASE  # the tokenizer
    model = SonnetGPT(gpt).to(device)
    windows = Windows(config.epochs, config.seed)
    bible, modern = held_out("bible"), held_out("modern")
    sonnets = SonnetsDataset(read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv"), gpt).in_order(12)

    def evaluate(model: SonnetGPT) -> dict[str, float]:
        on_bible, on_modern = (language_model_figures(model, batches)["loss"] for batches in (bible, modern))
        bits = language_model_figures(model, sonnets)["bits_per_character"]
        return {"dev_loss": (on_bible + on_modern) / 2, "bible_loss": on_bible, "modern_loss": on_modern,
                "sonnets_bits_per_character": bits}  # fmt: skip

    def save(model: SonnetGPT, folder: Path) -> None:
        model.gpt.save_pretrained(folder, dtype=torch.float16)

    task = Task(windows.batches, windows.collate,
                lambda model, batch: model.loss(batch["input_ids"], batch["labels"]),
                lambda batch: batch["labels"].numel(), evaluate, save)  # fmt: skip
    print(f"pretraining tiny ({sum(p.numel() for p in model.parameters()):,} parameters) in {run.folder}, {dtype}")
    progress = train(model, task, config, run, device, dtype)
    for name in ("config.json", "model.safetensors"):
        write_bytes(BASE / name, (run.best / name).read_bytes())
    write_bytes(BASE / "pretraining.csv", (run.folder / "metrics.csv").read_bytes())
    print(json.dumps(progress.rows[progress.best_epoch - 1], indent=2))
    print(f"the base of epoch {progress.best_epoch} is in {BASE}")


if __name__ == "__main__":
    with exit_cleanly():
        main()
