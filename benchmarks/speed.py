"""Speed and memory against transformers and PEFT, with and without the faster parts of speed/.

    python benchmarks/speed.py [MODEL] [--dtypes float32 bfloat16] [--rounds 5]
    python benchmarks/speed.py --cases parts   # what each part of speed/ gains

MODEL is a folder, or the size of a GPT-2 with random weights, on which neither speed nor memory
depends; it is made once. Every measurement is a process of its own, and cases alternate within a
round. Tables show medians, and the median and range of ratios within rounds.

- Sonnets: a training step, batches of 8, GPT-2's dropout, fused AdamW. Baselines pad batches in
  file order, as their users do, and exclude padding from the loss.
- Pairs: a training step, batches of 8 prompts with both texts. The baseline is
  GPT2ForSequenceClassification on pairs in random order.
- Generation: 12 continuations of 128 tokens, temperature 1.2, top-p 0.9, with a cache. The baseline
  holds all weights in the precision.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import torch
import transformers
from torch import nn

from config import ROOT, GPT2Config, LoRAConfig
from datasets import PROMPT, PairsDataset, SonnetsDataset, read_pairs, read_sonnets, sonnet_prompt
from lora import LoRALinear, apply_lora
from models.gpt2 import GPT2Model
from models.hugging_face import BUNDLED_MODEL
from models.paraphrase_gpt import ParaphraseGPT
from models.sonnet_gpt import SonnetGPT
from modules.attention import DotProductAttention
from modules.loss import IGNORE_INDEX, VocabularyLoss
from speed import training as parts
from speed.decoding import speed_up_decoding
from training.loop import peak_memory_gb
from training.options import Hardware
from training.runs import write_csv, write_text

SIZES = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20)}
BATCH, NEW_TOKENS = 8, 128
PLAIN = {  # the parts of speed/training.py and what they replace
    parts.FrozenLinear: nn.Linear,
    parts.FastLoRALinear: LoRALinear,
    parts.FastDropout: nn.Dropout,
    parts.WrittenOutAttention: DotProductAttention,
    parts.FastVocabularyLoss: VocabularyLoss,
}
CASES = {
    "main": [
        *("sonnets full transformers", "sonnets full ours", "sonnets full plain"),
        *("sonnets lora PEFT", "sonnets lora PEFT-bfloat16-base"),
        *("sonnets lora ours", "sonnets lora plain"),
        *("pairs full transformers", "pairs full ours", "pairs lora ours"),
        *("generation full transformers", "generation full ours", "generation full plain"),
    ],
    "parts": [
        f"sonnets {method} {name}"
        for method in ("full", "lora")
        for name in ("ours", *(f"without-{part.__name__}" for part in PLAIN), "plain")
    ],
}
RATIOS = [  # heading, case, baselines
    (
        "LoRA step / PEFT's",
        "sonnets lora ours",
        ["sonnets lora PEFT", "sonnets lora PEFT-bfloat16-base"],
    ),
    ("full step / transformers'", "sonnets full ours", ["sonnets full transformers"]),
    ("LoRA step / our full step", "sonnets lora ours", ["sonnets full ours"]),
    ("LoRA step / without speed/", "sonnets lora ours", ["sonnets lora plain"]),
    ("full step / without speed/", "sonnets full ours", ["sonnets full plain"]),
    ("pairs: step / transformers'", "pairs full ours", ["pairs full transformers"]),
    ("pairs: LoRA step / our full step", "pairs lora ours", ["pairs full ours"]),
    ("generation / transformers'", "generation full ours", ["generation full transformers"]),
    ("generation / without speed/", "generation full ours", ["generation full plain"]),
]


def model_folder(model):
    """The folder of this name, or one with random weights of this size, which is made once."""
    if Path(model).is_dir():
        return Path(model)
    if model not in SIZES:
        sys.exit(f"{model} is neither a folder nor one of {', '.join(SIZES)}")
    folder = ROOT / "benchmarks" / "cache" / model
    if not (folder / "tokenizer.json").is_file():
        torch.manual_seed(0)
        gpt = GPT2Model(GPT2Config(*SIZES[model], eos_token_id=0))
        gpt.tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL)
        gpt.save_pretrained(folder)
    return folder


def measure(folder, case, hardware):
    """Seconds, and peak memory in GB, of one case."""
    torch.manual_seed(0)
    work, method, kind = case.split()
    if kind == "PEFT-bfloat16-base" and hardware.dtype != torch.bfloat16:
        return None
    if work == "generation":
        generate = our_generation if kind in ("ours", "plain") else their_generation
        return generate(folder, kind, hardware)
    theirs = kind in ("transformers", "PEFT", "PEFT-bfloat16-base")
    if theirs:
        model, batches = their_training(folder, work, kind)
    else:
        model, batches = our_training(folder, work, method)
    model.to(hardware.device).train()
    if kind == "ours" or kind.startswith("without-"):
        parts.speed_up(model)
    for part in model.modules():
        if type(part).__name__ == kind.removeprefix("without-"):
            part.__class__ = PLAIN[type(part)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(batch):
        optimizer.zero_grad()
        with hardware.autocast():
            loss = model(**batch).loss if theirs else model.loss(**batch)
        loss.backward()
        optimizer.step()

    batches = [{n: t.to(hardware.device) for n, t in batch.items()} for batch in batches]
    step(batches[0])  # allocates memory
    total = seconds(lambda: [step(batch) for batch in batches], hardware.device)
    return {"seconds": total / len(batches), "memory": peak_memory_gb(hardware.device)}


def seconds(work, device):
    """The duration of work()."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def texts_of(work, steps=3):
    """Sonnets, or pairs that are complete and chosen at random."""
    if work == "sonnets":
        return read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_train.csv").head(BATCH * steps)
    pairs = read_pairs(ROOT / "data" / "verses-train.csv")
    return pairs.sample(BATCH * steps * 5, random_state=0)


def our_training(folder, work, method):
    """Model and batches of the scripts."""
    gpt = GPT2Model.from_pretrained(folder)
    if method == "lora":
        apply_lora(gpt, LoRAConfig())
    model = SonnetGPT(gpt) if work == "sonnets" else ParaphraseGPT(gpt, "generalized")
    dataset = (SonnetsDataset if work == "sonnets" else PairsDataset)(texts_of(work), gpt)
    return model, [dataset.collate(indices) for indices in dataset.batches(BATCH, 0, 0)]


def their_training(folder, work, kind):
    """Model and batches of transformers and PEFT."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    is_bfloat16 = kind == "PEFT-bfloat16-base"
    settings = {"dtype": torch.bfloat16 if is_bfloat16 else torch.float32}
    frame = texts_of(work)
    if work == "sonnets":
        model = transformers.GPT2LMHeadModel.from_pretrained(folder, **settings)
        texts = frame["text"].tolist()
    else:
        settings |= {"num_labels": 2, "pad_token_id": tokenizer.pad_token_id}
        model = transformers.GPT2ForSequenceClassification.from_pretrained(folder, **settings)
        texts = list(map(PROMPT.format, frame["sentence1"], frame["sentence2"]))
    if kind.startswith("PEFT"):
        from peft import LoraConfig, get_peft_model  # only in processes that use it: its memory

        targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
        config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, task_type="CAUSAL_LM", **targets)
        model = get_peft_model(model, config)
    batches = []
    for start in range(0, len(texts), BATCH):
        rows = slice(start, start + BATCH)
        batch = dict(tokenizer(texts[rows], return_tensors="pt", padding=True))
        if work == "sonnets":
            batch["labels"] = batch["input_ids"].masked_fill(
                batch["attention_mask"] == 0, IGNORE_INDEX
            )
        else:
            batch["labels"] = torch.tensor(frame["label"].to_numpy(int)[rows])
        batches.append(batch)
    return model, batches


def prompts():
    """The given lines of the dev sonnets."""
    sonnets = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv")
    return [sonnet_prompt(text) for text in sonnets["text"]]


def our_generation(folder, kind, hardware):
    """The script's generation; no text ends early."""
    model = SonnetGPT(GPT2Model.from_pretrained(folder)).to(hardware.device)
    model.gpt.end_of_text = None
    if kind == "ours":
        model = speed_up_decoding(model, hardware.dtype, rows=12)
    settings = {"temperature": 1.2, "top_p": 0.9, "max_lines": 0}

    def generate(count):
        with hardware.autocast():
            model.generate(prompts(), max_new_tokens=count, **settings)

    generate(2)
    total = seconds(lambda: generate(NEW_TOKENS), hardware.device)
    return {"seconds": total, "memory": peak_memory_gb(hardware.device)}


def their_generation(folder, kind, hardware):
    """The same with transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=hardware.dtype)
    model.to(hardware.device).eval()
    batch = tokenizer(prompts(), return_tensors="pt", padding=True).to(hardware.device)
    settings = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "top_k": 0}
    settings["pad_token_id"] = tokenizer.pad_token_id

    @torch.inference_mode()
    def generate(count):
        model.generate(**batch, min_new_tokens=count, max_new_tokens=count, **settings)

    generate(2)
    total = seconds(lambda: generate(NEW_TOKENS), hardware.device)
    return {"seconds": total, "memory": peak_memory_gb(hardware.device)}


def run_once(arguments):
    """The metrics that a process of its own prints; exits if it fails."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{arguments}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(table, metric, case, baselines):
    """Median and range over rounds of a case's metric divided by the best baseline's."""
    present = [name for name in baselines if name in table]
    if case not in table or not present:
        return ""
    best = min(present, key=lambda name: statistics.median(m[metric] for m in table[name]))
    ratios = [a[metric] / b[metric] for a, b in zip(table[case], table[best], strict=True)]
    text = f"{statistics.median(ratios):.2f}"
    return f"{text} ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else text


def report(results, rounds):
    """Two tables in Markdown: medians, and ratios."""
    medians, ratios = {}, {}
    for dtype, table in results.items():
        for case, metrics in table.items():
            for metric, unit in (("seconds", "s"), ("memory", "GB")):
                value = statistics.median(m[metric] for m in metrics)
                medians.setdefault(case, {})[f"{dtype}, {unit}"] = f"{value:.3f}"
        for heading, case, baselines in RATIOS:
            ratios.setdefault(heading, {})[dtype] = ratio(table, "seconds", case, baselines)
            memory = ratio(table, "memory", case, baselines)
            ratios.setdefault(f"memory: {heading}", {})[dtype] = memory
    frames = [
        pd.DataFrame(medians).T.rename_axis("case"),
        pd.DataFrame(ratios).T.rename_axis(f"median of {rounds} rounds"),
    ]
    frames[1] = frames[1][frames[1].ne("").any(axis=1)]
    return "\n\n".join(frame.fillna("").to_markdown(disable_numparse=True) for frame in frames)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", default="gpt2", help="a model's folder, or the size of a random one")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--rounds", type=int, default=5)
    add("--cases", nargs="+", default=["main"], help="main, parts, or words of the cases' names")
    add("--out", type=Path, help="a Markdown file; default in benchmarks/results")
    add("--one", nargs=2, metavar=("CASE", "DTYPE"), help="print one measurement as JSON")
    options = parser.parse_args()
    folder = model_folder(options.model)
    if options.one:
        case, dtype = options.one
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(json.dumps(measure(folder, case, Hardware(device, getattr(torch, dtype)))))
        return
    known = CASES["main"] + CASES["parts"]
    cases = CASES.get(options.cases[0]) or [
        c for c in known if set(options.cases) <= set(c.split())
    ]
    if not cases:
        parser.error(f"no case has the words {options.cases}; cases are {known}")
    results = {dtype: {} for dtype in options.dtypes}
    for number in range(1, options.rounds + 1):
        for dtype in options.dtypes:
            for case in dict.fromkeys(cases):
                metrics = run_once([folder, "--one", case, dtype])
                if metrics:
                    results[dtype].setdefault(case, []).append(metrics)
                    print(
                        f"round {number}, {dtype}, {case}: {metrics['seconds']:.3f} s", flush=True
                    )
    text = report(results, options.rounds)
    print(f"\n{text}")
    name = options.cases[0] if options.cases[0] in CASES else "some"
    out = options.out or ROOT / "benchmarks" / "results" / f"speed-{name}.md"
    write_text(out, text + "\n")
    records = [
        {"dtype": dtype, "case": case, "round": number, **metrics}
        for dtype, table in results.items()
        for case, rounds in table.items()
        for number, metrics in enumerate(rounds, 1)
    ]
    medians = (
        pd.DataFrame(records).groupby(["dtype", "case"], sort=False).median().drop(columns="round")
    )
    write_csv(out.with_suffix(".csv"), medians.reset_index().round(4))


if __name__ == "__main__":
    main()
