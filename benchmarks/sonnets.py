"""Seconds per training step and peak memory on sonnets, compared with transformers and PEFT.

    python benchmarks/sonnets.py [MODEL] [--dtypes float32 bfloat16] [--rounds 5] [--steps 3]
    python benchmarks/sonnets.py --cases "ours, LoRA" "ours, LoRA, compiled"  # on CUDA: --compile

All cases use the same sonnets in batches of 8, GPT-2's dropout and fused AdamW. Baselines pad
batches in file order, as their users do, and exclude padding from the loss; ours are the batches of
sonnet_generation.py. bfloat16 is autocast over float32 weights or, as a further case, PEFT over a
base in bfloat16. The limit is arithmetic: 6 N FLOPs per token for full fine-tuning and 4 N for
LoRA, at the rate of matrix multiplications in the same process.
"""

import torch
from harness import add_peft_lora, matmul_tflops, model_folder, parser, report, run, timed_steps

from config import ROOT, LoRAConfig
from datasets import SonnetsDataset, bucketed_batches, read_sonnets
from lora import apply_lora, cast_frozen_weights
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from modules.loss import IGNORE_INDEX

FULL, LORA = "ours, full", "ours, LoRA"
FULL_BASELINE, LORA_BASELINE = "transformers, full", "PEFT, LoRA"
BFLOAT16_BASELINE = "PEFT, LoRA over a bfloat16 base"
FULL_COMPILED, LORA_COMPILED = f"{FULL}, compiled", f"{LORA}, compiled"  # only with --cases
CASES = (FULL_BASELINE, FULL, LORA_BASELINE, LORA, BFLOAT16_BASELINE)
BATCH = 8


def measure(options, case, device, dtype):
    """The metrics of one process."""
    if case == BFLOAT16_BASELINE and dtype != torch.bfloat16:
        return {}
    torch.manual_seed(0)
    sonnets = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_train.csv")
    sonnets = sonnets.head(BATCH * options.steps)
    make = ours if case.startswith("ours") else baseline
    model, loss_of, batches = make(case, model_folder(options.model), sonnets, dtype)
    model.to(device).train()
    if case in (FULL_COMPILED, LORA_COMPILED):
        model.gpt.compile(dynamic=True, backend=options.backend)
    total = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    metrics = timed_steps(loss_of, trained, batches, device, dtype)
    tokens = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches) / len(batches)
    tflops = matmul_tflops(device, dtype)
    limit = (6 if "full" in case else 4) * total * tokens / (1e12 * tflops)
    return {
        **metrics,
        "tokens_per_step": tokens,
        "matmul_tflops": tflops,
        "limit_s": limit,
        "share_of_limit": limit / metrics["step_s"],
    }


def ours(case, folder, sonnets, dtype):
    """Model, loss and batches of sonnet_generation.py."""
    model = SonnetGPT(GPT2Model.from_pretrained(folder))
    if case in (LORA, LORA_COMPILED):
        cast_frozen_weights(apply_lora(model, LoRAConfig()), dtype)
    dataset = SonnetsDataset(sonnets, model.gpt)
    batches = [
        dataset.collate(indices)
        for indices in bucketed_batches(dataset.lengths, BATCH, seed=0, epoch=0)
    ]
    return model, lambda batch: model.loss(batch["input_ids"], batch["labels"]), batches


def baseline(case, folder, sonnets, dtype):
    """Model, loss and batches of transformers and PEFT."""
    from transformers import AutoTokenizer, GPT2LMHeadModel  # slow to import

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"
    weights = dtype if case == BFLOAT16_BASELINE else torch.float32
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=weights)
    if case != FULL_BASELINE:
        model = add_peft_lora(model, "CAUSAL_LM")
    texts, batches = sonnets["text"].tolist(), []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return model, lambda batch: model(**batch).loss, batches


if __name__ == "__main__":
    options = parser(__doc__)
    text = "of torch.compile; eager compiles nothing and only shows that it runs"
    options.add_argument("--backend", default="inductor", help=text)
    options = options.parse_args()
    results = run(options, measure, CASES, "sonnets")
    columns = {
        "step_s": "seconds per step",
        "first_step_s": "seconds of the first step",
        "limit_s": "limit",
        "share_of_limit": "share of the limit",
        "peak_gb": "peak memory, GB",
        "matmul_tflops": "matrix multiplications, TFLOP/s",
    }
    lora_baselines = [LORA_BASELINE, BFLOAT16_BASELINE]
    comparisons = [
        ("LoRA step / the best baseline's", LORA, lora_baselines, "step_s"),
        ("full step / the baseline's", FULL, [FULL_BASELINE], "step_s"),
        ("LoRA step / our full step", LORA, [FULL], "step_s"),
        ("LoRA memory / the best baseline's", LORA, lora_baselines, "peak_gb"),
        ("LoRA memory / our full memory", LORA, [FULL], "peak_gb"),
        ("full memory / the baseline's", FULL, [FULL_BASELINE], "peak_gb"),
        ("compiled LoRA step / LoRA step", LORA_COMPILED, [LORA], "step_s"),
        ("compiled full step / full step", FULL_COMPILED, [FULL], "step_s"),
        ("compiled LoRA memory / LoRA memory", LORA_COMPILED, [LORA], "peak_gb"),
        ("compiled full memory / full memory", FULL_COMPILED, [FULL], "peak_gb"),
    ]
    report(options, results, "sonnets", columns, comparisons)
