"""Do our faster operations train as well as torch's own? Sonnet runs with both, side by side.

    python benchmarks/plain.py [--epochs 3] [--seeds 11711 11712 11713]

The plain operations are cross-entropy of whole logits, torch's own dropout and
scaled_dot_product_attention, and LoRA as a sum. All runs use float32 and the bundled model with
GPT-2's dropout of 0.1, full fine-tuning and LoRA. Prints the dev losses per epoch and the ratio of
the last ones.
"""

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch.nn.functional as F

import lora
import models.sonnet_gpt
import modules.attention
import modules.dropout
import sonnet_generation
from config import BUNDLED_MODEL


def plain_cross_entropy(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())


def plain_dropout(x, p):
    return F.dropout(x, p)


def plain_attention(query, key, value, p):
    return F.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=True)


def plain_lora(self, x):
    return self.base(x) + self.scaling * self.lora_b(self.lora_a(self.dropout(x)))


REPLACEMENTS = (
    (models.sonnet_gpt, "cross_entropy", plain_cross_entropy),
    (modules.dropout, "dropout", plain_dropout),
    (modules.attention, "causal_attention", plain_attention),
    (lora.LoRALinear, "forward", plain_lora),
)
METHODS = {"full": ["--lr", "1e-4"], "LoRA": ["--use_lora", "--lr", "1e-3"]}


def dev_losses(folder, base, seed, epochs, method):
    """The dev loss of each epoch of a run."""
    arguments = ["--model_size", str(base), "--epochs", str(epochs), "--seed", str(seed)]
    arguments += ["--dtype", "float32", "--out_dir", str(folder), "--max_new_tokens", "1"]
    arguments += ["--sonnet_out", f"{folder}.txt", *METHODS[method]]
    with contextlib.redirect_stdout(io.StringIO()):
        sonnet_generation.main(sonnet_generation.parse_options(arguments))
    return pd.read_csv(folder / "metrics.csv")["dev_loss"].tolist()


def copy_with_dropout(folder):
    """Copy the bundled model with GPT-2's dropout."""
    shutil.copytree(BUNDLED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11711, 11712, 11713])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        copy_with_dropout(base)
        for method in METHODS:
            for seed in options.seeds:
                run = Path(temporary) / f"{method}{seed}"
                ours = dev_losses(run, base, seed, options.epochs, method)
                with contextlib.ExitStack() as stack:
                    for replacement in REPLACEMENTS:
                        stack.enter_context(mock.patch.object(*replacement))
                    run = run.with_name(f"{run.name}-plain")
                    plain = dev_losses(run, base, seed, options.epochs, method)
                losses = ", ".join(
                    f"{one:.4f} / {other:.4f}" for one, other in zip(ours, plain, strict=True)
                )
                ratio = ours[-1] / plain[-1]
                print(
                    f"{method}, seed {seed}, dev loss ours / plain: {losses}; {ratio:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
