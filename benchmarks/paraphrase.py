"""Question pairs trained a second and peak memory: ours against transformers, each with its own batching.

    python benchmarks/paraphrase.py MODEL PAIRS_CSV [--dtypes float32 bfloat16] [--rounds 5] [--steps 20]

The same random pairs for all, in batches of 8; GPT-2's dropout, AdamW. transformers: GPT2ForSequenceClassification,
random batches padded to each one's longest, or bucketed as ours are. Ours: the step of paraphrase_detection.py over
its bucketed batches, both texts in one prompt. Writes benchmarks/results/paraphrase.csv.
"""

from harness import parser, product_rate, ratio, run, timed_steps

CASES = ["transformers", "transformers-bucketed", "full-last", "full-generalized", "lora-generalized"]
BATCH = 8


def measure(case: str, dtype_name: str) -> dict[str, float]:
    """One process's figures; pairs a second first."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    make = transformers_step if case.startswith("transformers") else our_step
    loss_of, parameters, batches = make(case, dtype, device)
    figures = timed_steps(loss_of, parameters, batches, device, dtype)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches[1:])
    return {"pairs_s": BATCH * (len(batches) - 1) / figures.pop("total_s"), **figures,
            "real_tokens_a_step": real / (len(batches) - 1),
            "padded_tokens_a_step": sum(batch["input_ids"].numel() for batch in batches[1:]) / (len(batches) - 1),
            "product_tflops": product_rate(device, dtype)}  # fmt: skip


def chosen_rows(count: int) -> list[int]:
    """The pairs that every case trains on."""
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[: BATCH * (options.steps + 1)].tolist()


def our_step(case: str, dtype, device):
    """Loss, parameters and batches of the paraphrase task."""
    from config import LoRAConfig
    from datasets import PairsDataset, bucketed_batches
    from lora import apply_lora, hold_frozen
    from models.gpt2 import GPT2Model
    from models.paraphrase_gpt import ParaphraseGPT

    method, pooling = case.split("-")
    model = ParaphraseGPT(GPT2Model.from_pretrained(options.model), pooling)
    if method == "lora":
        apply_lora(model, LoRAConfig())
        hold_frozen(model, dtype)
    model.to(device).train()
    data = PairsDataset(options.pairs, model.gpt)
    rows, lengths = chosen_rows(len(data)), data.lengths
    buckets = bucketed_batches([lengths[row] for row in rows], BATCH, seed=0, epoch=0)
    batches = [data.collate([rows[index] for index in bucket]) for bucket in buckets]
    return lambda batch: model.loss(**batch), [p for p in model.parameters() if p.requires_grad], batches


def transformers_step(case: str, dtype, device):
    """The same of transformers' classifier: the pairs in random order, the same prompt."""
    import torch
    from transformers import AutoTokenizer, GPT2ForSequenceClassification

    from datasets import bucketed_batches, prompt, read_pairs

    pairs = list(read_pairs(options.pairs, "check the path", []))
    order = chosen_rows(len(pairs))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.eos_token
    model = GPT2ForSequenceClassification.from_pretrained(
        options.model, num_labels=2, pad_token_id=tokenizer.eos_token_id, dtype=torch.float32
    )
    model.to(device).train()
    texts = [prompt(pairs[row].sentence1, pairs[row].sentence2) for row in order]
    buckets = [range(start, start + BATCH) for start in range(0, len(order), BATCH)]
    if case == "transformers-bucketed":
        buckets = bucketed_batches([len(ids) for ids in tokenizer(texts)["input_ids"]], BATCH, seed=0, epoch=0)
    batches = []
    for bucket in buckets:
        batch = tokenizer([texts[index] for index in bucket], return_tensors="pt", padding=True)
        batches.append({**batch, "labels": torch.tensor([pairs[order[index]].label for index in bucket])})
    return lambda batch: model(**batch).loss, list(model.parameters()), batches


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("pairs", help="a tab-separated file of pairs")
    options.set_defaults(steps=20)
    options = options.parse_args()
    rows = run(options, measure, CASES, "paraphrase")
    for dtype in options.dtypes:
        shown = (f"{case} {ratio(rows, dtype, case, 'transformers', 'pairs_s'):.2f}" for case in CASES[1:])
        print(f"{dtype}, pairs a second against transformers: {', '.join(shown)}")
        print(f"{dtype}, generalized / last, seconds a step: "
              f"{ratio(rows, dtype, 'full-generalized', 'full-last', 'step_s'):.3f}")  # fmt: skip
