"""A batch of which each row has an adapter of its own, against separate runs: seconds, difference; a swap's seconds.

    python benchmarks/adapters.py [MODEL] [--dtypes float32] [--rounds 5]

2, 4 and 8 adapters (rank 4, random updates) and as many prompts, the first lines of dev sonnets, each continued by 64
tokens: as one batch that mixes the adapters, one after the other (load_adapter, then generate), or as one batch
through a single adapter, which shows what mixing itself costs. Every adapter is read from its folder each time.
"""

import tempfile
from pathlib import Path

from harness import ROOT, device_and_dtype, folder_of, parser, ratio_table, run, seconds, table, write_tables

COUNTS = (2, 4, 8)
HOW = ("mixed", "separate", "one adapter")
TOKENS = 64


def measure(case: str, dtype_name: str) -> dict[str, float]:
    """One process's figures for one number of adapters; the first, short continuation is left out."""
    import torch

    from config import LoRAConfig
    from datasets import read_sonnets
    from lora import adapters, apply_lora, hold_frozen, load_adapter, mixed_adapters, save_adapter
    from models.gpt2 import GPT2Model
    from models.sonnet_gpt import SonnetGPT
    from training import precision

    how, _, count = case.partition(", ")
    count = int(count)
    device, dtype = device_and_dtype(dtype_name)
    prompts = [sonnet.prompt for sonnet in read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv")][:count]
    fresh = SonnetGPT(GPT2Model.from_pretrained(folder_of(options.model)))
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(index) for index in range(count)]
        apply_lora(fresh, LoRAConfig())
        for index, folder in enumerate(folders):
            torch.manual_seed(index)
            for adapter in adapters(fresh).values():
                torch.nn.init.normal_(adapter.lora_b.weight, std=0.02)
            save_adapter(fresh, folder)
        model = SonnetGPT(GPT2Model.from_pretrained(folder_of(options.model)).requires_grad_(False)).to(device)

        def write(tokens: int) -> None:
            settings = {"temperature": 0, "max_new_tokens": tokens, "max_lines": None}
            with precision(device, dtype):
                if how == "mixed":
                    model.generate(prompts, adapters=folders, **settings)
                elif how == "one adapter":
                    load_adapter(model, folders[0])
                    model.generate(prompts, **settings)
                else:
                    for prompt, folder in zip(prompts, folders, strict=True):
                        load_adapter(model, folder)
                        model.generate([prompt], **settings)

        difference = 0.0
        if how == "mixed":
            ids = torch.randint(0, model.gpt.config.vocab_size, (count, 64), device=device)
            with torch.no_grad(), mixed_adapters(model, folders):
                mixed = model(ids)
            for row, folder in enumerate(folders):
                with torch.no_grad():
                    alone = load_adapter(fresh.to(device), folder)(ids[row : row + 1])
                difference = max(difference, (mixed[row] - alone[0]).abs().max().item())
        hold_frozen(model, dtype)
        write(2)
        took = seconds(lambda: write(TOKENS), device)
        swap = min(seconds(lambda: load_adapter(fresh, folders[0]), device) for _ in range(5))
    return {"total_s": took, "difference": 1e6 * difference, "swap_ms": 1000 * swap}


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    found = run(options, measure, [f"{how}, {count}" for count in COUNTS for how in HOW], "adapters")
    columns = {"total_s": "seconds", "difference": "largest difference of logits, 1e-6", "swap_ms": "a swap, ms"}
    against = {"one after the other": HOW[1], "one for all rows": HOW[2]}
    rows = [(f"{count} adapters in one batch / {what}", f"mixed, {count}", [f"{other}, {count}"], "total_s")
            for what, other in against.items() for count in COUNTS]  # fmt: skip
    write_tables("adapters", table(found, columns), ratio_table(found, options, rows))
