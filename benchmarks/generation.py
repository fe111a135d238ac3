"""Seconds for 12 continuations of 128 tokens as one batch, compared with transformers.

    python benchmarks/generation.py [MODEL] [--dtypes float32 bfloat16] [--rounds 5]

The first three lines of the 12 dev sonnets, temperature 1.2, top-p 0.9, a key-value cache, and all
weights in the precision. The limit is to read every weight once per token, at the rate at which the
same process reads a large array.
"""

import torch
from harness import model_folder, parser, report, run, seconds

from config import ROOT
from datasets import read_sonnets, sonnet_prompt
from lora import cast_frozen_weights
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from runs import peak_memory_gb
from training import autocast

OURS, BASELINE = "ours", "transformers"


def measure(options, case, device, dtype):
    """The metrics of one process; a first, short continuation is not timed."""
    torch.manual_seed(0)
    sonnets = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv")
    prompts = [sonnet_prompt(text) for text in sonnets["text"]]
    make = ours if case == OURS else baseline
    model, generate = make(model_folder(options.model), prompts, device, dtype)
    generate(2)
    total = seconds(lambda: generate(options.tokens), device)
    memory = peak_memory_gb(device)  # before the large array
    large = torch.zeros(2**27, device=device)
    bytes_per_second = large.nbytes / min(seconds(large.sum, device) for _ in range(10))
    model_bytes = sum(p.numel() for p in model.parameters()) * torch.finfo(dtype).bits // 8
    limit = options.tokens * model_bytes / bytes_per_second
    return {
        "total_s": total,
        "limit_s": limit,
        "share_of_limit": limit / total,
        "read_gb_s": bytes_per_second / 1e9,
        "peak_gb": memory,
    }


def ours(folder, prompts, device, dtype):
    """The model, and a function that writes the given number of tokens."""
    model = SonnetGPT(GPT2Model.from_pretrained(folder).requires_grad_(False)).to(device)
    cast_frozen_weights(model, dtype)
    model.gpt.end_of_text = None  # no text ends early

    def generate(count):
        with autocast(device, dtype):
            model.generate(
                prompts, temperature=1.2, top_p=0.9, max_new_tokens=count, max_lines=None
            )

    return model, generate


def baseline(folder, prompts, device, dtype):
    """The same with transformers."""
    from transformers import AutoTokenizer, GPT2LMHeadModel  # slow to import

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(device)

    @torch.inference_mode()
    def generate(count):
        model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=1.2,
            top_p=0.9,
            top_k=0,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=tokenizer.pad_token_id,
        )

    return model, generate


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=128, help="new tokens per text")
    options = options.parse_args()
    results = run(options, measure, [BASELINE, OURS], "generation")
    columns = {
        "total_s": "seconds",
        "limit_s": "limit",
        "share_of_limit": "share of the limit",
        "read_gb_s": "memory read, GB/s",
        "peak_gb": "peak memory, GB",
    }
    heading = f"12 continuations of {options.tokens} tokens, ours / transformers"
    report(options, results, "generation", columns, [(heading, OURS, [BASELINE], "total_s")])
