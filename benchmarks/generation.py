"""Seconds for 12 continuations of 128 tokens as one batch: ours against transformers, each with its cache.

    python benchmarks/generation.py [MODEL] [--dtypes float32 bfloat16] [--rounds 5]

The first three lines of the 12 dev sonnets, temperature 1.2, top-p 0.9, all weights in the precision. The limit is to
read every weight once a token, at the rate at which the same process reads a large array.
"""

from harness import (
    ROOT,
    device_and_dtype,
    folder_of,
    parser,
    ratio_table,
    run,
    seconds,
    table,
    write_tables,
)

OURS, PEER = "ours", "transformers"
TOKENS = 128


def measure(case: str, dtype_name: str) -> dict[str, float]:
    """One process's figures; the first, short continuation is left out."""
    import torch

    from datasets import read_sonnets
    from runs import peak_memory_gb

    device, dtype = device_and_dtype(dtype_name)
    torch.manual_seed(0)
    prompts = [sonnet.prompt for sonnet in read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv")]
    write, read_bytes = (ours if case == OURS else peer)(prompts, device, dtype)
    write(2)
    took = seconds(lambda: write(TOKENS), device)
    large = torch.zeros(2**27, device=device)
    rate = large.nbytes / min(seconds(large.sum, device) for _ in range(10))
    limit = TOKENS * read_bytes / rate
    return {"total_s": took, "limit_s": limit, "share_of_limit": limit / took, "read_gb_s": rate / 1e9,
            "peak_gb": peak_memory_gb(device)}  # fmt: skip


def ours(prompts: list[str], device, dtype):
    import torch

    from lora import hold_frozen
    from models.gpt2 import GPT2Model
    from models.sonnet_gpt import SonnetGPT
    from training import precision

    model = SonnetGPT(GPT2Model.from_pretrained(folder_of(options.model)).requires_grad_(False)).to(device)
    hold_frozen(model, dtype)

    def write(count: int) -> None:
        with precision(device, dtype):
            model.generate(prompts, temperature=1.2, max_new_tokens=count, max_lines=None)

    return write, sum(p.numel() for p in model.parameters()) * torch.finfo(dtype).bits // 8


def peer(prompts: list[str], device, dtype):
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(device)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    @torch.inference_mode()
    def write(count: int) -> None:
        model.generate(**inputs, do_sample=True, temperature=1.2, top_p=0.9, top_k=0, max_new_tokens=count,
                       min_new_tokens=count, pad_token_id=tokenizer.pad_token_id)  # fmt: skip

    return write, sum(p.numel() for p in model.parameters()) * torch.finfo(dtype).bits // 8


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    found = run(options, measure, [PEER, OURS], "generation")
    columns = {"total_s": "seconds", "limit_s": "limit", "share_of_limit": "share of the limit",
               "read_gb_s": "memory read, GB/s", "peak_gb": "peak memory, GB"}  # fmt: skip
    ratios = [("12 continuations of 128 tokens, ours / transformers", OURS, [PEER], "total_s")]
    write_tables("generation", table(found, columns), ratio_table(found, options, ratios))
