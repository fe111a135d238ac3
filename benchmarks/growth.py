"""How a LoRA step's time and memory grow with the length of texts, the batch and the model; a figure.

    python benchmarks/growth.py [--rounds 3]

Batch 4 of 128 to 1,024 tokens; batches of 1 to 32 texts of 128 tokens; tiny, gpt2 and gpt2-medium on a batch of 8 texts
of 128 tokens. Random weights and random tokens in float32, GPT-2's dropout. Writes benchmarks/results/growth.csv and
growth.png.
"""

import statistics

from harness import HERE, device_and_dtype, folder_of, parser, run, timed_steps

TOKENS = [f"gpt2, 4 x {tokens}" for tokens in (128, 256, 512, 1024)]
BATCHES = [f"gpt2, {batch} x 128" for batch in (1, 2, 4, 8, 16, 32)]
MODELS = [f"{model}, 8 x 128" for model in ("tiny", "gpt2", "gpt2-medium")]
CASES = list(dict.fromkeys(TOKENS + BATCHES + MODELS))


def measure(case: str, dtype_name: str) -> dict[str, float]:
    """One process's seconds a step and peak memory."""
    import torch

    from config import LoRAConfig
    from lora import apply_lora, hold_frozen
    from models.gpt2 import GPT2Model
    from models.sonnet_gpt import SonnetGPT

    size, shape = case.split(", ")
    batch, tokens = map(int, shape.split(" x "))
    device, dtype = device_and_dtype(dtype_name)
    torch.manual_seed(0)
    model = SonnetGPT(GPT2Model.from_pretrained("tiny" if size == "tiny" else folder_of(size)))
    hold_frozen(apply_lora(model, LoRAConfig()), dtype)
    model.to(device).train()
    ids = torch.randint(0, 8000, (batch, tokens + 1))
    batches = [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}] * options.steps
    trained = [p for p in model.parameters() if p.requires_grad]
    return timed_steps(lambda batch: model.loss(**batch), trained, batches, device, dtype)


def draw(found: dict, dtype: str) -> None:
    """Time and memory over tokens a text, texts a batch and parameters; dotted: growth in proportion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, 3, sharey="row")
    columns = (
        ("tokens a text (batch of 4)", TOKENS, (128, 256, 512, 1024)),
        ("texts of 128 tokens a batch", BATCHES, (1, 2, 4, 8, 16, 32)),
        ("parameters, millions (8 x 128 tokens)", MODELS, (5.4, 124.4, 354.8)),
    )
    for row, (name, label) in enumerate((("step_s", "seconds a step"), ("peak_gb", "peak memory, GB"))):
        for axes, (title, cases, places) in zip(panels[row], columns, strict=True):
            values = [statistics.median(run[name] for run in found[dtype, case]) for case in cases]
            axes.plot(places, values, color="#0072b2", marker="o", label="LoRA")
            if name == "step_s":
                straight = [values[-1] * place / places[-1] for place in places]
                axes.plot(places, straight, color="0.5", linestyle=":", label="in proportion")
                axes.set_yscale("log")
            axes.set_xscale("log", base=2 if places[0] != 5.4 else 10)
            axes.set_xticks(places, [f"{place:.0f}" for place in places])
            axes.minorticks_off()
            axes.set_xlabel(title if row else "")
        panels[row, 0].set_ylabel(label)
    panels[0, 0].set_yticks((0.1, 1, 10), ("0.1", "1", "10"))
    panels[1, 0].set_ylim(bottom=0)
    panels[0, 0].legend(frameon=False)
    figure.savefig(HERE / "results" / "growth.png", dpi=150)


if __name__ == "__main__":
    options = parser(__doc__)
    options.set_defaults(dtypes=["float32"], rounds=3, steps=2)
    options = options.parse_args()
    for size in ("gpt2", "gpt2-medium"):
        folder_of(size)  # made before anything is measured
    found = run(options, measure, CASES, "growth")
    draw(found, options.dtypes[0])
