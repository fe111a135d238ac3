"""Seconds for a batch in which each prompt has its own LoRA adapter, compared with separate runs.

    python benchmarks/adapters.py [MODEL] [--dtypes float32] [--rounds 5]

2, 4 and 8 adapters (rank 4, random updates) and as many prompts, the first lines of dev sonnets,
each continued by 64 tokens: as one batch that mixes the adapters, one after the other
(load_adapter, then generate), or as one batch with a single adapter, which shows the cost of mixing
itself. Every adapter is read from its folder each time. Also measures the time to load an adapter,
and the largest difference of logits between the mixed batch and single runs.
"""

import tempfile
from pathlib import Path

import torch
from harness import model_folder, parser, report, run, seconds

from adapters import load_adapter, mixed_adapters, save_adapter
from config import ROOT, LoRAConfig
from datasets import read_sonnets, sonnet_prompt
from lora import apply_lora, cast_frozen_weights, lora_layers
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from training import autocast

COUNTS = (2, 4, 8)
MIXED, SEPARATE, SINGLE = "mixed", "separate", "one adapter"
TOKENS = 64


def measure(options, case, device, dtype):
    """The metrics of one process; a first, short continuation is not timed."""
    method, count = case.split(", ")
    sonnets = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv")
    prompts = [sonnet_prompt(text) for text in sonnets["text"][: int(count)]]
    base = model_folder(options.model)
    other = SonnetGPT(GPT2Model.from_pretrained(base))
    model = SonnetGPT(GPT2Model.from_pretrained(base).requires_grad_(False)).to(device)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(index) for index in range(len(prompts))]
        save_random_adapters(other, folders)
        other.to(device)
        difference = largest_difference(model, other, folders) if method == MIXED else 0.0
        cast_frozen_weights(model, dtype)

        def generate(tokens):
            settings = {"temperature": 0, "max_new_tokens": tokens, "max_lines": None}
            with autocast(device, dtype):
                if method == MIXED:
                    model.generate(prompts, adapters=folders, **settings)
                elif method == SINGLE:
                    load_adapter(model, folders[0])
                    model.generate(prompts, **settings)
                else:
                    for prompt, folder in zip(prompts, folders, strict=True):
                        load_adapter(model, folder)
                        model.generate([prompt], **settings)

        generate(2)
        total = seconds(lambda: generate(TOKENS), device)
        load = min(seconds(lambda: load_adapter(other, folders[0]), device) for _ in range(5))
    return {"total_s": total, "difference": 1e6 * difference, "load_ms": 1000 * load}


def save_random_adapters(model, folders):
    """Save one adapter with a random update in each folder."""
    apply_lora(model, LoRAConfig())
    for index, folder in enumerate(folders):
        torch.manual_seed(index)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_b.weight, std=0.02)
        save_adapter(model, folder)


@torch.no_grad()
def largest_difference(model, other, folders):
    """Between the logits of a mixed batch and those of `other` with one adapter at a time."""
    device = model.gpt.token_embedding.weight.device
    ids = torch.randint(0, model.gpt.config.vocab_size, (len(folders), 64), device=device)
    with mixed_adapters(model, folders):
        mixed = model(ids)
    differences = []
    for index, folder in enumerate(folders):
        single = load_adapter(other, folder)(ids[index : index + 1])
        differences.append((mixed[index] - single[0]).abs().max().item())
    return max(differences)


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    cases = [f"{method}, {count}" for count in COUNTS for method in (MIXED, SEPARATE, SINGLE)]
    results = run(options, measure, cases, "adapters")
    columns = {
        "total_s": "seconds",
        "difference": "largest difference of logits, 1e-6",
        "load_ms": "loading an adapter, ms",
    }
    comparisons = [
        (f"{count} adapters in one batch / {text}", f"{MIXED}, {count}", [f"{method}, {count}"])
        for method, text in ((SEPARATE, "one after the other"), (SINGLE, "one adapter for all"))
        for count in COUNTS
    ]
    comparisons = [(*comparison, "total_s") for comparison in comparisons]
    report(options, results, "adapters", columns, comparisons)
