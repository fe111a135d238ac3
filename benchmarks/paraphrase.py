"""Training pairs per second and peak memory on paraphrases, compared with transformers and PEFT.

    python benchmarks/paraphrase.py [MODEL] [--pairs FILE] [--dtypes float32 bfloat16] [--steps 20]

All cases use the same random pairs in batches of 8, both texts in one prompt, and GPT-2's dropout.
The baseline is GPT2ForSequenceClassification on pairs in random order, each batch padded to its
longest text, with torch's default AdamW; and the same with our buckets and fused AdamW, fully and
with PEFT's LoRA. Ours are the batches of paraphrase_detection.py. The limit is 6 N FLOPs per real
token (LoRA: 4 N), where N does not include the embeddings.
"""

import torch
from harness import add_peft_lora, matmul_tflops, model_folder, parser, report, run, timed_steps

from config import ROOT, LoRAConfig
from datasets import PAIR_POOL, PairsDataset, bucketed_batches, prompt, read_pairs
from lora import apply_lora, cast_frozen_weights
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT

BASELINE = "transformers, full"
BUCKETS = "transformers, full, with our buckets and fused AdamW"
LORA_BASELINE = "PEFT, LoRA, with our buckets and fused AdamW"
LAST = "ours, full, last"
GENERALIZED = "ours, full, generalized"
MULTIHEAD = "ours, full, multihead"
LORA = "ours, LoRA, generalized"
BASELINES = (BASELINE, BUCKETS, LORA_BASELINE)
CASES = (*BASELINES, LAST, GENERALIZED, MULTIHEAD, LORA)
OUTSIDE_BODY = ("embedding", "wte", "wpe", "lora_")
BATCH = 8


def measure(options, case, device, dtype):
    """The metrics of one process."""
    torch.manual_seed(0)
    make = baseline if case in BASELINES else ours
    pairs = sample_pairs(options.pairs, BATCH * options.steps)
    model, loss_of, batches = make(case, model_folder(options.model), pairs, dtype)
    model.to(device).train()
    named = model.named_parameters()
    body = sum(p.numel() for name, p in named if not any(part in name for part in OUTSIDE_BODY))
    trained = [p for p in model.parameters() if p.requires_grad]
    metrics = timed_steps(loss_of, trained, batches, device, dtype, fused=case != BASELINE)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches) / len(batches)
    padded = sum(batch["input_ids"].numel() for batch in batches) / len(batches)
    tflops = matmul_tflops(device, dtype)
    limit = (4 if "LoRA" in case else 6) * body * real / (1e12 * tflops)
    return {
        "pair_s": metrics["step_s"] / BATCH,
        "pairs_per_second": BATCH / metrics["step_s"],
        "limit_pairs_per_second": BATCH / limit,
        "share_of_limit": limit / metrics["step_s"],
        **metrics,
        "padded_to_real_tokens": padded / real,
        "matmul_tflops": tflops,
    }


def sample_pairs(path, count):
    """The pairs that every case is trained on: complete ones with a label, chosen at random."""
    pairs = read_pairs(path)
    complete = pairs["label"].notna()
    for column in ("sentence1", "sentence2"):
        complete &= pairs[column].str.strip().ne("")
    pairs = pairs[complete]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return pairs.iloc[order[:count].tolist()]


def buckets(lengths):
    return bucketed_batches(lengths, BATCH, seed=0, epoch=0, pool=PAIR_POOL)


def ours(case, folder, pairs, dtype):
    """Model, loss and batches of paraphrase_detection.py."""
    model = ParaphraseGPT(GPT2Model.from_pretrained(folder), pooling=case.split(", ")[-1])
    if case == LORA:
        cast_frozen_weights(apply_lora(model, LoRAConfig()), dtype)
    dataset = PairsDataset(pairs, model.gpt)
    batches = [dataset.collate(indices) for indices in buckets(dataset.lengths)]
    return model, lambda batch: model.loss(**batch, right_padded=True), batches


def baseline(case, folder, pairs, dtype):
    """Model, loss and batches of transformers."""
    from transformers import AutoTokenizer, GPT2ForSequenceClassification  # slow to import

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"
    model = GPT2ForSequenceClassification.from_pretrained(
        folder, num_labels=2, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    if case == LORA_BASELINE:
        model = add_peft_lora(model, "SEQ_CLS")
    texts = list(map(prompt, pairs["sentence1"], pairs["sentence2"]))
    labels = torch.tensor(pairs["label"].to_numpy(int))
    chosen = [range(start, start + BATCH) for start in range(0, len(texts), BATCH)]
    if case != BASELINE:
        chosen = buckets([len(ids) for ids in tokenizer(texts)["input_ids"]])
    batches = []
    for indices in chosen:
        batch = tokenizer([texts[index] for index in indices], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels[list(indices)]})
    return model, lambda batch: model(**batch).loss, batches


if __name__ == "__main__":
    options = parser(__doc__)
    path = str(ROOT / "data" / "verses-train.csv")
    options.add_argument("--pairs", default=path, help="a tab-separated file")
    options.set_defaults(steps=20)
    options = options.parse_args()
    results = run(options, measure, CASES, "paraphrase")
    columns = {
        "pairs_per_second": "pairs per second",
        "limit_pairs_per_second": "limit",
        "share_of_limit": "share of the limit",
        "peak_gb": "peak memory, GB",
        "padded_to_real_tokens": "padded / real tokens",
    }
    comparisons = [  # of seconds per pair, the inverse of pairs per second
        ("pairs per second, ours (last) / the baseline's", BASELINE, [LAST], "pair_s"),
        (
            "pairs per second, ours (generalized) / the baseline's",
            BASELINE,
            [GENERALIZED],
            "pair_s",
        ),
        (
            "the same / the baseline's with our buckets and fused AdamW",
            BUCKETS,
            [GENERALIZED],
            "pair_s",
        ),
        ("pairs per second, our LoRA / PEFT's", LORA_BASELINE, [LORA], "pair_s"),
        ("pairs per second, our LoRA / our full", GENERALIZED, [LORA], "pair_s"),
        ("a step with generalized / with last", GENERALIZED, [LAST], "pair_s"),
        ("a step with multihead / with last", MULTIHEAD, [LAST], "pair_s"),
    ]
    report(options, results, "paraphrase", columns, comparisons)
