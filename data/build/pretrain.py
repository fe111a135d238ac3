"""Pretrain the bundled model, data/tiny-gpt2, on data/cache/corpus with this project's own loop.

python data/build/pretrain.py   # about 30 million tokens; --resume continues an interrupted run
"""

import argparse
import hashlib
import math
import shutil
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor

from config import ROOT, GPT2Config, InputError, TrainConfig
from datasets import SonnetsDataset, TextDataset, read_sonnets
from evaluation.metrics import language_model_metrics
from models.gpt2 import GPT2Model
from models.hugging_face import BUNDLED_MODEL
from models.sonnet_gpt import SonnetGPT
from training.loop import Task, Trainer
from training.options import choose_hardware, exit_cleanly
from training.runs import open_run

CORPUS = ROOT / "data" / "cache" / "corpus"
STEPS = 246  # per epoch: 1.008 million tokens
# Sequences per batch and tokens per sequence in both halves of the run; short ones cost less.
BATCHES = ((32, 128), (8, 512))
# Shares of the sequences in both halves. Verse matters most when the learning rate is small.
SHARES = {"shakespeare": (0.15, 0.35), "bible": (0.40, 0.25), "modern": (0.45, 0.40)}
TINY = GPT2Config(4, 256, 4, 8192, 512, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, eos_token_id=0)


class Corpus(TextDataset):
    """Read sequences of tokens from the corpus; each source is read from start to end, repeatedly.

    Its indices are sequences: source, start and length.
    """

    def __init__(self, folder: Path, epochs: int) -> None:
        self.tokens = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in SHARES}
        self.epochs = epochs

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[list[tuple[str, int, int]]]:
        """Return batches of sequences; every source continues where the last epoch ended."""
        sequences = []
        for name, tokens in self.tokens.items():
            begin = 0
            for index in range(epoch + 1):
                half = int(index >= self.epochs / 2)
                size, length = BATCHES[half]
                starts = begin + length * np.arange(round(size * STEPS * SHARES[name][half]))
                begin = starts[-1] + length
            # The remainder shifts the sequences of each pass over a source against the last pass.
            span = len(tokens) - length - 1
            sequences += [(name, int(start) % span, length) for start in starts]
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(len(sequences), generator=generator).tolist()
        shuffled = [sequences[index] for index in order]
        return [shuffled[start : start + size] for start in range(0, size * STEPS, size)]

    def collate(self, indices: list[tuple[str, int, int]]) -> dict[str, Tensor]:
        """Return input ids and labels (B, T)."""
        return as_batch([self.tokens[name][s : s + length + 1] for name, s, length in indices])

    def num_tokens(self, indices: list[tuple[str, int, int]]) -> int:
        """Return the number of input tokens, which is also the number of labels."""
        return sum(length for _, _, length in indices)


class HeldOut(TextDataset):
    """Hold `count` sequences of `length` tokens, evenly spread over text that is not trained on."""

    def __init__(self, path: Path, count: int = 32, length: int = 512) -> None:
        tokens = np.load(path)
        starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
        self.sequences = [tokens[start : start + length + 1] for start in starts]
        self.ids, self.lengths = list(range(count)), [length] * count
        self.characters = math.nan  # unknown, so bits per character cannot be computed

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """Return input ids and labels (B, T)."""
        return as_batch([self.sequences[index] for index in indices])


def as_batch(sequences: list[np.ndarray]) -> dict[str, Tensor]:
    """Return input ids and labels (B, T) of sequences with T + 1 tokens."""
    tokens = torch.from_numpy(np.stack(sequences).astype(np.int64))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].contiguous()}


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=30, help="of 1.008 million tokens each (default: 30)")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate (default: 1.5e-3)")
    add("--resume", action="store_true", help="continue the last run with the same options")
    add("--corpus", type=Path, default=CORPUS, help="folder of the token arrays")
    add("--out", type=Path, default=BUNDLED_MODEL, help="folder of the model (the bundled one)")
    add("--out_dir", help="folder of the run")
    return parser.parse_args(arguments)


def main(options: Namespace) -> None:
    settings = {"schedule": "cosine", "warmup": 0.02, "max_grad_norm": 1.0, "weight_decay": 0.1}
    config = TrainConfig(epochs=options.epochs, lr=options.lr, **settings)
    if not (options.corpus / "shakespeare.npy").is_file():
        raise InputError(
            f"{options.corpus} contains no tokens; data/README.md says how to make them"
        )

    # Data and model
    hardware = choose_hardware()
    contents = {name: (options.corpus / f"{name}.npy").read_bytes() for name in SHARES}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    compared = {"epochs": options.epochs, "lr": options.lr}
    paths = {"resume": options.resume, "out_dir": options.out_dir}
    run = open_run("pretrain", "tiny", compared | paths | {"data_sha256": hashes})
    torch.manual_seed(config.seed)
    gpt = GPT2Model(TINY)
    gpt.tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = SonnetGPT(gpt).to(hardware.device)
    dataset = Corpus(options.corpus, config.epochs)
    held_out = {
        name: HeldOut(options.corpus / f"heldout_{name}.npy") for name in ("bible", "modern")
    }
    sonnets = SonnetsDataset(read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv"), gpt)

    def evaluate() -> dict[str, float]:
        with hardware.autocast():
            losses = {
                f"{name}_loss": language_model_metrics(model, texts)[0]["loss"]
                for name, texts in held_out.items()
            }
            bits = language_model_metrics(model, sonnets)[0]["bits_per_character"]
        dev_loss = sum(losses.values()) / len(losses)
        return {"dev_loss": dev_loss, **losses, "sonnets_bits_per_character": bits}

    # Train, and save the best model in float16
    print(f"pretraining tiny in {run}, {hardware.dtype}")
    task = Task(dataset, evaluate, gpt.save_pretrained)
    epochs = Trainer(model, task, config, run, hardware).train()
    best = transformers.GPT2LMHeadModel.from_pretrained(run / "best", dtype=torch.float16)
    best.save_pretrained(options.out)
    shutil.copy(run / "metrics.csv", options.out / "pretraining.csv")
    print(pd.DataFrame(epochs).tail(1).T.to_string(header=False))
    print(f"the best model is in {options.out}")


if __name__ == "__main__":
    with exit_cleanly():
        main(parse_options())
