"""Seconds a training step and peak memory of full fine-tuning and LoRA.

    python benchmarks/sonnets.py MODEL [--dtypes float32 bfloat16] [--rounds 5] [--steps 5]

The steps are those of sonnet_generation.py: batch 8 of the embedded sonnets, GPT-2's dropout, AdamW. Writes
benchmarks/results/sonnets.csv; medians over the rounds.
"""

from harness import HERE, parser, product_rate, ratio, run, timed_steps


def measure(method: str, dtype_name: str) -> dict[str, float]:
    """One process's median seconds a step, the first left out, and its peak memory in GB."""
    import torch

    from config import LoRAConfig
    from datasets import SonnetsDataset, bucketed_batches, read_sonnets
    from lora import apply_lora, hold_frozen
    from models.gpt2 import GPT2Model
    from models.sonnet_gpt import SonnetGPT

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    model = SonnetGPT(GPT2Model.from_pretrained(options.model)).train()
    if method == "lora":
        apply_lora(model, LoRAConfig())
        hold_frozen(model, dtype)
    model.to(device)
    data = SonnetsDataset(read_sonnets(HERE.parent / "data" / "Shakespeare_Sonnets_train.csv"), model.gpt)
    parameters = [p for p in model.parameters() if p.requires_grad]
    batches = [data.collate(rows) for rows in bucketed_batches(data.lengths, 8, seed=0, epoch=0)[: options.steps + 1]]
    loss_of = lambda batch: model.loss(batch["input_ids"], batch["labels"])  # noqa: E731 (the step's one line)
    figures = timed_steps(loss_of, parameters, batches, device, dtype)
    figures.pop("total_s")
    tokens = sum(map(data.targets, batches)) / len(batches)
    return {**figures, "tokens_a_step": tokens, "product_tflops": product_rate(device, dtype)}


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    rows = run(options, measure, ["full", "lora"], "sonnets")
    for dtype in options.dtypes:
        time_ratio, memory_ratio = (ratio(rows, dtype, "lora", "full", figure) for figure in ("step_s", "peak_gb"))
        print(f"{dtype}: LoRA / full: time {time_ratio:.2f}, memory {memory_ratio:.2f}")
