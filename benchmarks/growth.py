"""The time and memory of a LoRA step by length of texts, batch size and model, as a plot.

    python benchmarks/growth.py [--rounds 3]

Batches of 4 texts of 128 to 1,024 tokens; batches of 1 to 32 texts of 128 tokens; tiny, gpt2 and
gpt2-medium on batches of 8 texts of 128 tokens. Weights and tokens are random (those of tiny are
trained), in float32 with GPT-2's dropout. Writes growth.csv and growth.png to benchmarks/results.
"""

import torch
from harness import median, model_folder, parser, run, timed_steps

from config import LoRAConfig
from lora import apply_lora, cast_frozen_weights
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT

TOKENS = (128, 256, 512, 1024)
BATCHES = (1, 2, 4, 8, 16, 32)
MILLIONS = {"tiny": 5.4, "gpt2": 124.4, "gpt2-medium": 354.8}  # of parameters
PANELS = (  # label, cases, values on the horizontal axis
    ("tokens per text (batch of 4)", [f"gpt2, 4 x {tokens}" for tokens in TOKENS], TOKENS),
    ("texts of 128 tokens per batch", [f"gpt2, {batch} x 128" for batch in BATCHES], BATCHES),
    (
        "parameters, millions (8 x 128 tokens)",
        [f"{model}, 8 x 128" for model in MILLIONS],
        tuple(MILLIONS.values()),
    ),
)
CASES = list(dict.fromkeys(case for _, cases, _ in PANELS for case in cases))


def measure(options, case, device, dtype):
    """The metrics of one process."""
    size, shape = case.split(", ")
    batch, tokens = map(int, shape.split(" x "))
    torch.manual_seed(0)
    model = SonnetGPT(GPT2Model.from_pretrained("tiny" if size == "tiny" else model_folder(size)))
    cast_frozen_weights(apply_lora(model, LoRAConfig()), dtype)
    model.to(device).train()
    ids = torch.randint(0, 8000, (batch, tokens + 1))
    batches = [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}] * options.steps
    trained = [p for p in model.parameters() if p.requires_grad]
    return timed_steps(lambda batch: model.loss(**batch), trained, batches, device, dtype)


def draw(results, dtype, path):
    """Plot time and memory; the dotted line is proportional growth."""
    from matplotlib.figure import Figure  # its memory would be measured too

    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, 3, sharey="row")
    for (title, cases, positions), (time, memory) in zip(PANELS, panels.T, strict=True):
        for axes, metric in ((time, "step_s"), (memory, "peak_gb")):
            values = [median(results[dtype, case], metric) for case in cases]
            axes.plot(positions, values, color="#0072b2", marker="o", label="LoRA")
            axes.set_xscale("log")
            axes.set_xticks(positions, [f"{position:.0f}" for position in positions])
            if metric == "step_s":
                line = [values[-1] * position / positions[-1] for position in positions]
                axes.plot(positions, line, color="0.5", linestyle=":", label="proportional")
                axes.set_yscale("log")
            axes.minorticks_off()
        memory.set_xlabel(title)
    panels[0, 0].set_ylabel("seconds per step")
    panels[1, 0].set_ylabel("peak memory, GB")
    panels[0, 0].set_yticks((0.1, 1, 10), ("0.1", "1", "10"))
    panels[1, 0].set_ylim(bottom=0)
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    options = parser(__doc__)
    options.set_defaults(dtypes=["float32"], rounds=3, steps=2)
    options = options.parse_args()
    for size in ("gpt2", "gpt2-medium"):
        model_folder(size)  # is made before anything is measured
    results = run(options, measure, CASES, "growth")
    draw(results, options.dtypes[0], options.out_dir / "growth.png")
