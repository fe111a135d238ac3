"""Both commands on a random model of one layer and files of a few lines, in this process."""

import json
import re
import shutil
from unittest import mock

import pandas as pd
import torch
import transformers

import paraphrase_detection
import sonnet_generation
from config import ROOT

SCRIPTS = {"sonnets": sonnet_generation, "paraphrases": paraphrase_detection}
KINDS = ["sonnets-full", "sonnets-lora", "paraphrases-full", "paraphrases-lora"]
TIMES = ["seconds", "tokens_per_second", "peak_memory_gb", "train_seconds", "seconds_per_epoch"]
HEADER = "id\tsentence1\tsentence2\tis_duplicate\n"


def make_files(root, dropout=0.1):
    """A model with the bundled tokenizer, five sonnets and seven pairs of different lengths.

    Plots must show $ and characters that their font lacks.
    """
    torch.manual_seed(0)
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 8192, "n_positions": 64}
    config = transformers.GPT2Config(**shape, **rates, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(root / "model")
    for path in (ROOT / "data" / "tiny-gpt2").glob("tokenizer*"):
        shutil.copy(path, root / "model")
    sonnets = [f"{n}\n\nFrom fairest\ncreatures\nwe {n}\n{'thy brow ' * n}\n" for n in range(1, 6)]
    (root / "sonnets.txt").write_text("\n".join(sonnets))
    pairs = [f"p{n}\t{'thy $x^ ' * n}\t{'の' if n % 2 else 'z'} {n}\t{n % 2}\n" for n in range(7)]
    (root / "pairs.csv").write_bytes((HEADER + "".join(pairs).replace("\t\t", "\tno\t")).encode())
    return root


def arguments(root, kind, out, *more):
    """The options of a run of two epochs, of three or four steps, in float32 on the CPU."""
    task, method = kind.split("-")
    if task == "sonnets":
        names = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
        given = [f"--{name}={root / 'sonnets.txt'}" for name in names]
        given += [f"--sonnet_out={out}-out/generated_sonnets.txt", "--max_new_tokens=4"]
    else:
        given = [f"--para_{split}={root / 'pairs.csv'}" for split in ("train", "dev", "test")]
        given += [
            f"--para_{split}_out={out}-out/para-{split}-output.csv" for split in ("dev", "test")
        ]
        given += ["--pooling=generalized"]
    if method == "lora":
        given.append("--use_lora")
    given += [f"--model_size={root / 'model'}", "--epochs=2", "--batch_size=2", "--lr=0.01"]
    return [*given, "--device=cpu", "--dtype=float32", f"--out_dir={out}", *more]


def command(task, given):
    """What the user's command does, in this process."""
    SCRIPTS[task].main(SCRIPTS[task].parse_options(list(map(str, given))))


def run(root, kind, out, *more):
    """Train without plots, which take longer than all the rest; returns the folder of the run."""
    task = kind.split("-")[0]
    with mock.patch("training.setup.draw_curves"):
        command(task, arguments(root, kind, out, *more))
    return out


def outcome(out):
    """The contents of a run's files by name, without times, the folder's name, and the state.

    A process that was killed leaves temporary files.
    """
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if ".unfinished-" not in name}
    contents = {name: path.read_bytes() for name, path in files.items()}
    for name in ("config.json", "state.pt", ".lock", "curves.png"):
        contents.pop(name, None)
    metrics = pd.read_csv(out / "metrics.csv", dtype=str)
    contents["metrics.csv"] = metrics.drop(columns=TIMES, errors="ignore").to_csv()
    summary = json.loads(contents["summary.json"])
    contents["summary.json"] = {name: summary[name] for name in summary.keys() - set(TIMES)}
    card = contents["best/README.md"].decode().replace(str(out), "RUN").replace(out.name, "RUN")
    contents["best/README.md"] = re.sub(rf"\| ({'|'.join(TIMES)}) +\|.*", "", card)
    return contents
