"""Pretrain the bundled model, data/tiny-gpt2, on data/cache/corpus with this project's own loop.

python data/pretrain.py             # about 30 million tokens; --resume continues an interrupted run
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

from cli import exit_cleanly
from config import BUNDLED_MODEL, PRESETS, ROOT, InputError, TrainConfig
from datasets import SonnetsDataset, read_sonnets
from evaluation import language_model_metrics
from files import atomic_write
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from runs import Run, environment
from training import Task, Trainer, choose_device, choose_dtype

CORPUS = ROOT / "data" / "cache" / "corpus"
STEPS = 246  # per epoch: 1.008 million tokens
# Sequences per batch and tokens per sequence in both halves of the run; short ones cost less.
BATCHES = ((32, 128), (8, 512))
# Shares of the sequences in both halves. Verse matters most when the learning rate is small.
SHARES = {"shakespeare": (0.15, 0.35), "bible": (0.40, 0.25), "modern": (0.45, 0.40)}


def init_weights(gpt):
    """GPT-2's initialization: N(0, 0.02), biases 0, smaller weights into the residual stream.

    The weights of out_proj and out_dense have the standard deviation 0.02 / sqrt(2 n_layer).
    """
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("out_proj.weight", "out_dense.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * gpt.config.n_layer))
        elif "norm" not in name:
            nn.init.normal_(parameter, std=0.02)


class Corpus:
    """Sequences of tokens from the corpus; each source is read from start to end, repeatedly."""

    def __init__(self, epochs, seed):
        self.tokens = {name: np.load(CORPUS / f"{name}.npy", mmap_mode="r") for name in SHARES}
        self.epochs, self.seed = epochs, seed

    def batches(self, epoch):
        """Batches of (source, start, length); every source continues where the last epoch ended."""
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
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(sequences), generator=generator).tolist()
        shuffled = [sequences[index] for index in order]
        return [shuffled[start : start + size] for start in range(0, size * STEPS, size)]

    def collate(self, sequences):
        """Input ids and labels (B, T) of sequences as in `batches`."""
        return as_batch([self.tokens[name][s : s + length + 1] for name, s, length in sequences])

    @staticmethod
    def num_targets(sequences):
        """The number of labels."""
        return sum(length for _, _, length in sequences)


class HeldOut:
    """`count` sequences of `length` tokens, evenly spread over text that is not trained on."""

    def __init__(self, name, count=32, length=512):
        tokens = np.load(CORPUS / f"heldout_{name}.npy")
        starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
        self.sequences = [tokens[start : start + length + 1] for start in starts]

        self.characters = [math.nan]  # unknown, so bits per character cannot be computed

    def collate(self, indices):
        """Input ids and labels (B, T)."""
        return as_batch([self.sequences[index] for index in indices])

    def num_targets(self, indices):
        """The number of labels."""
        return sum(len(self.sequences[index]) - 1 for index in indices)


def as_batch(sequences):
    """Input ids and labels (B, T) of sequences with T + 1 tokens."""
    tokens = torch.from_numpy(np.stack(sequences).astype(np.int64))
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].contiguous()}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "epochs of 1.008 million tokens each (default: 30)"
    parser.add_argument("--epochs", type=int, default=30, help=text)
    text = "peak learning rate (default: 1.5e-3)"
    parser.add_argument("--lr", type=float, default=1.5e-3, help=text)
    text = "continue an interrupted run with the same options"
    parser.add_argument("--resume", action="store_true", help=text)
    parser.add_argument("--out_dir", help="folder of the run")
    options = parser.parse_args(arguments)
    config = TrainConfig(
        epochs=options.epochs,
        lr=options.lr,
        schedule="cosine",
        warmup=0.02,
        max_grad_norm=1.0,
        weight_decay=0.1,
    )
    if not (CORPUS / "shakespeare.npy").is_file():
        raise InputError(
            f"{CORPUS} contains no tokens; data/README.md lists the commands that make them"
        )

    # Load
    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    paths = [str(CORPUS / f"{name}.npy") for name in SHARES]
    run = Run("pretrain", "tiny", vars(options), environment(device, dtype, paths))
    torch.manual_seed(config.seed)
    gpt = GPT2Model(PRESETS["tiny"])
    init_weights(gpt)
    gpt.folder = BUNDLED_MODEL  # of the tokenizer
    gpt.raw_config = json.loads((BUNDLED_MODEL / "config.json").read_text(encoding="utf-8"))
    model = SonnetGPT(gpt).to(device)
    corpus = Corpus(config.epochs, config.seed)
    bible, modern = HeldOut("bible"), HeldOut("modern")
    sonnets = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv")
    sonnets = SonnetsDataset(sonnets, gpt)

    def evaluate(model):
        bible_loss = language_model_metrics(model, bible, 8)["loss"]
        modern_loss = language_model_metrics(model, modern, 8)["loss"]
        bits = language_model_metrics(model, sonnets, 12)["bits_per_character"]
        return {
            "dev_loss": (bible_loss + modern_loss) / 2,
            "bible_loss": bible_loss,
            "modern_loss": modern_loss,
            "sonnets_bits_per_character": bits,
        }

    # Train
    task = Task(
        batches=corpus.batches,
        collate=corpus.collate,
        loss=lambda model, batch: model.loss(**batch),
        num_targets=corpus.num_targets,
        num_tokens=corpus.num_targets,
        evaluate=evaluate,
        save=lambda model, folder: model.gpt.save_pretrained(folder, dtype=torch.float16),
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"pretraining tiny ({count:,} parameters) in {run.folder}, {dtype}")
    progress = Trainer(model, task, config, run, device, dtype).train()

    # Report
    copies = {name: run.best / name for name in ("config.json", "model.safetensors")}
    copies["pretraining.csv"] = run.folder / "metrics.csv"
    for name, source in copies.items():
        with atomic_write(BUNDLED_MODEL / name) as file:
            file.write(source.read_bytes())
    print(json.dumps(progress.epochs[progress.best_epoch - 1], indent=2))
    print(f"the model of epoch {progress.best_epoch} is in {BUNDLED_MODEL}")


if __name__ == "__main__":
    with exit_cleanly():
        main()
