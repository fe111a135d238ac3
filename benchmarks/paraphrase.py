"""Pairs trained a second and peak memory on paraphrases: ours against transformers, each with its own batching.

    python benchmarks/paraphrase.py [MODEL] [--pairs FILE] [--dtypes float32 bfloat16] [--rounds 5] [--steps 20]

The same random pairs for all in batches of 8, both texts in one prompt, GPT-2's dropout. transformers:
GPT2ForSequenceClassification, pairs in random order, each batch padded to its longest, AdamW as torch has it by
default; and the same with our buckets and fused AdamW. Ours: the batches and the step of paraphrase_detection.py. The
limit is 6 N FLOPs a real token (LoRA 4 N), N without the
embeddings.
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

PEER, BUCKETS = "transformers, full", "transformers, full, with our buckets and fused AdamW"
POOLINGS = {"ours, full, last": "last", "ours, full, generalized": "generalized", "ours, full, multihead": "multihead",
            "ours, LoRA, generalized": "generalized"}  # fmt: skip
LAST, GENERALIZED, MULTIHEAD, LORA = POOLINGS
BATCH = 8


def measure(case: str, dtype_name: str) -> dict[str, float]:
    """One process's figures."""
    import torch

    device, dtype = device_and_dtype(dtype_name)
    torch.manual_seed(0)
    model, loss_of, batches = (ours if case in POOLINGS else peer)(case, dtype)
    model.to(device).train()
    aside = ("embedding", "wte", "wpe", "lora_")
    body = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in aside))
    trained = [p for p in model.parameters() if p.requires_grad]
    figures = timed_steps(loss_of, trained, batches, device, dtype, fused=case != PEER)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(batches)
    padded = sum(batch["input_ids"].numel() for batch in batches) / len(batches)
    rate = product_rate(device, dtype)
    limit = (4 if case == LORA else 6) * body * real / (1e12 * rate)
    return {"pair_s": figures["step_s"] / BATCH, "pairs_a_second": BATCH / figures["step_s"],
            "limit_pairs_a_second": BATCH / limit, "share_of_limit": limit / figures["step_s"], **figures,
            "padded_to_real_tokens": padded / real, "product_tflops": rate}  # fmt: skip


def chosen_rows(count: int) -> list[int]:
    """The pairs that every case trains on."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: BATCH * options.steps].tolist()


def ours(case: str, dtype):
    from config import LoRAConfig
    from datasets import POOL, PairsDataset, bucketed_batches
    from lora import apply_lora, hold_frozen
    from models.gpt2 import GPT2Model
    from models.paraphrase_gpt import ParaphraseGPT

    model = ParaphraseGPT(GPT2Model.from_pretrained(folder_of(options.model)), POOLINGS[case])
    if case == LORA:
        hold_frozen(apply_lora(model, LoRAConfig()), dtype)
    data = PairsDataset(options.pairs, model.gpt)
    rows, lengths = chosen_rows(len(data)), data.lengths
    buckets = bucketed_batches([lengths[row] for row in rows], BATCH, seed=0, epoch=0, pool=POOL)
    return model, lambda batch: model.loss(**batch), [data.collate([rows[i] for i in bucket]) for bucket in buckets]


def peer(case: str, dtype):
    import torch
    from transformers import AutoTokenizer, GPT2ForSequenceClassification

    from datasets import POOL, bucketed_batches, prompt, read_pairs

    pairs = list(read_pairs(options.pairs, "check the path", []))
    order, folder = chosen_rows(len(pairs)), folder_of(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"
    model = GPT2ForSequenceClassification.from_pretrained(
        folder, num_labels=2, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    texts = [prompt(pairs[row].sentence1, pairs[row].sentence2) for row in order]
    buckets = [range(start, start + BATCH) for start in range(0, len(order), BATCH)]
    if case == BUCKETS:
        lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
        buckets = bucketed_batches(lengths, BATCH, seed=0, epoch=0, pool=POOL)
    batches = []
    for bucket in buckets:
        batch = tokenizer([texts[index] for index in bucket], return_tensors="pt", padding=True)
        labels = torch.tensor([pairs[order[index]].label for index in bucket])
        batches.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    return model, lambda batch: model(**batch).loss, batches


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--pairs", default=str(ROOT / "data" / "verses-train.csv"), help="a tab-separated file")
    options.set_defaults(steps=20)
    options = options.parse_args()
    found = run(options, measure, [PEER, BUCKETS, *POOLINGS], "paraphrase")
    columns = {"pairs_a_second": "pairs a second", "limit_pairs_a_second": "limit",
               "share_of_limit": "share of the limit", "peak_gb": "peak memory, GB",
               "padded_to_real_tokens": "padded / real tokens"}  # fmt: skip
    ratios = [  # of seconds a pair: the inverse of pairs a second
        ("pairs a second, ours (last) / the peer's", PEER, [LAST], "pair_s"),
        ("pairs a second, ours (generalized) / the peer's", PEER, [GENERALIZED], "pair_s"),
        ("the same / the peer's, given our buckets and fused AdamW", BUCKETS, [GENERALIZED], "pair_s"),
        ("pairs a second, our LoRA / our full", GENERALIZED, [LORA], "pair_s"),
        ("a step with generalized / with last", GENERALIZED, [LAST], "pair_s"),
        ("a step with multihead / with last", MULTIHEAD, [LAST], "pair_s"),
    ]
    write_tables("paraphrase", table(found, columns), ratio_table(found, options, ratios))
