"""Whether what was made faster still learns the same: sonnets, default runs beside runs with the plain equivalents.

    python benchmarks/plain.py [--epochs 3] [--seeds 11711 11712 11713]

Plain: cross-entropy over whole logits, torch's own dropout, its scaled_dot_product_attention, LoRA's update added as a
sum; both in float32, with GPT-2's dropout of 0.1 switched on in the embedded base, full fine-tuning and LoRA. Prints
the dev losses of the last epoch and their ratio.
"""

import argparse
import contextlib
import csv
import io
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch.nn.functional as F
from harness import ROOT

import lora
import models.sonnet_gpt
import modules.attention
import modules.dropout
import sonnet_generation


def plain_cross_entropy(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())


def plain_dropout(x, p, training=True):
    return F.dropout(x, p, training)


def plain_attention(query, key, value, p):
    return F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=True)


def plain_lora(self, x):
    return self.base(x) + self.scaling * self.lora_b(self.lora_a(self.dropout(x)))


def dev_losses(folder: Path, base: Path, seed: int, *more: str) -> list[float]:
    """Of each epoch of a run."""
    options = ["--model_size", str(base), "--epochs", str(parsed.epochs), "--seed", str(seed), "--dtype", "float32",
               "--out_dir", str(folder), "--sonnet_out", str(folder) + ".txt", "--max_new_tokens", "1"]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        sonnet_generation.main(sonnet_generation.parse_options([*options, *more]))
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return [float(row["dev_loss"]) for row in csv.DictReader(file)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11711, 11712, 11713])
    parsed = parser.parse_args()
    replaced = (
        mock.patch.object(models.sonnet_gpt, "cross_entropy", plain_cross_entropy),
        mock.patch.object(modules.dropout, "dropout", plain_dropout),
        mock.patch.object(modules.attention, "causal_attention", plain_attention),
        mock.patch.object(lora.LoRALinear, "forward", plain_lora),
    )
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        shutil.copytree(ROOT / "data" / "tiny-gpt2", base)
        settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
        settings |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
        (base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        for method, more in (("full", ("--lr", "1e-4")), ("LoRA", ("--use_lora", "--lr", "1e-3"))):
            for seed in parsed.seeds:
                ours = dev_losses(Path(temporary) / f"{method}{seed}", base, seed, *more)
                with contextlib.ExitStack() as stack:
                    for patch in replaced:
                        stack.enter_context(patch)
                    plain = dev_losses(Path(temporary) / f"{method}{seed}-plain", base, seed, *more)
                pairs = ", ".join(f"{one:.4f} / {other:.4f}" for one, other in zip(ours, plain, strict=True))
                print(
                    f"{method}, seed {seed}, dev loss ours / plain: {pairs}; last {ours[-1] / plain[-1]:.4f}",
                    flush=True,
                )
