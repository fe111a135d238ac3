"""Seconds a training step and peak memory on sonnets: ours against transformers and PEFT.

    python benchmarks/sonnets.py [MODEL] [--dtypes float32 bfloat16] [--rounds 5] [--steps 3]

The same sonnets for all in batches of 8, GPT-2's dropout, fused AdamW. The peers pad batches in file order, as their
users do, and leave the padding out of the loss; ours are the batches and the step of sonnet_generation.py. bfloat16 is
autocast over float32 weights, or, as a further row, PEFT over a base held in bfloat16. The limit is arithmetic: 6 N
FLOPs a token for full fine-tuning and 4 N for LoRA, at the product rate of the same process.
"""

from harness import (
    ROOT,
    device_and_dtype,
    folder_of,
    parser,
    product_rate,
    ratio_table,
    run,
    table,
    timed_steps,
    write_tables,
)

FULL, LORA, FULL_PEER, LORA_PEER, BASE_PEER = (
    "ours, full", "ours, LoRA", "transformers, full", "PEFT, LoRA", "PEFT, LoRA over a bfloat16 base"
)  # fmt: skip
BATCH = 8


def measure(case: str, dtype_name: str) -> dict[str, float]:
    """One process's figures; nothing for a base in bfloat16 where the precision is another."""
    import torch

    if case == BASE_PEER and dtype_name != "bfloat16":
        return {}
    device, dtype = device_and_dtype(dtype_name)
    torch.manual_seed(0)
    model, loss_of, batches = (ours if case in (FULL, LORA) else peer)(case, dtype)
    model.to(device).train()
    total = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
    figures = timed_steps(loss_of, [p for p in model.parameters() if p.requires_grad], batches, device, dtype)
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches) / len(batches)
    rate = product_rate(device, dtype)
    limit = (6 if "full" in case else 4) * total * tokens / (1e12 * rate)
    return {**figures, "tokens_a_step": tokens, "product_tflops": rate, "limit_s": limit,
            "share_of_limit": limit / figures["step_s"]}  # fmt: skip


def sonnets() -> list:
    from datasets import read_sonnets

    return read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_train.csv")[: BATCH * options.steps]


def ours(case: str, dtype):
    from config import LoRAConfig
    from datasets import SonnetsDataset, bucketed_batches
    from lora import apply_lora, hold_frozen
    from models.gpt2 import GPT2Model
    from models.sonnet_gpt import SonnetGPT

    model = SonnetGPT(GPT2Model.from_pretrained(folder_of(options.model)))
    if case == LORA:
        hold_frozen(apply_lora(model, LoRAConfig()), dtype)
    data = SonnetsDataset(sonnets(), model.gpt)
    batches = [data.collate(rows) for rows in bucketed_batches(data.lengths, BATCH, seed=0, epoch=0)]
    return model, lambda batch: model.loss(batch["input_ids"], batch["labels"]), batches


def peer(case: str, dtype):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype if case == BASE_PEER else torch.float32)
    if case != FULL_PEER:
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, fan_in_fan_out=True,
                                                 target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"))  # fmt: skip
    texts, batches = [sonnet.text for sonnet in sonnets()], []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    return model, lambda batch: model(**batch).loss, batches


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    found = run(options, measure, [FULL_PEER, FULL, LORA_PEER, LORA, BASE_PEER], "sonnets")
    columns = {"step_s": "seconds a step", "limit_s": "limit", "share_of_limit": "share of the limit",
               "peak_gb": "peak memory, GB", "product_tflops": "products, TFLOP/s"}  # fmt: skip
    ratios = [
        ("LoRA step / the best peer's", LORA, [LORA_PEER, BASE_PEER], "step_s"),
        ("full step / the peer's", FULL, [FULL_PEER], "step_s"),
        ("LoRA step / our full step", LORA, [FULL], "step_s"),
        ("LoRA memory / the best peer's", LORA, [LORA_PEER, BASE_PEER], "peak_gb"),
        ("LoRA memory / our full's", LORA, [FULL], "peak_gb"),
        ("full memory / the peer's", FULL, [FULL_PEER], "peak_gb"),
    ]
    write_tables("sonnets", table(found, columns), ratio_table(found, options, ratios))
