"""Seconds a training step and peak memory of full fine-tuning and LoRA, each in a process of its own, alternating.

    python benchmarks/sonnets.py MODEL [--dtypes float32 bfloat16] [--rounds 3]

MODEL is a size name or a folder. The steps are those of sonnet_generation.py: batch 8 of the embedded sonnets,
GPT-2's dropout, AdamW. Writes benchmarks/results/sonnets.csv; medians over the rounds.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def measure(model_name: str, method: str, dtype_name: str, steps: int) -> dict[str, float]:
    """One process's median seconds a step, the first left out, and its peak memory in GB."""
    import torch

    from config import LoRAConfig
    from datasets import SonnetsDataset, bucketed_batches, read_sonnets
    from lora import apply_lora, hold_frozen
    from models.gpt2 import GPT2Model
    from models.sonnet_gpt import SonnetGPT
    from runs import peak_memory_gb

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    model = SonnetGPT(GPT2Model.from_pretrained(model_name)).train()
    if method == "lora":
        apply_lora(model, LoRAConfig())
        if dtype != torch.float32:
            hold_frozen(model, dtype)
    model.to(device)
    data = SonnetsDataset(read_sonnets(HERE.parent / "data" / "Shakespeare_Sonnets_train.csv"), model.gpt)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    seconds, tokens = [], 0
    for rows in bucketed_batches(data.lengths, 8, seed=0, epoch=0)[: steps + 1]:
        batch = {name: value.to(device) for name, value in data.collate(rows).items() if name != "characters"}
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model.loss(batch["input_ids"], batch["labels"])
        loss.backward()
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
        tokens += data.targets(batch)
    return {"step_s": statistics.median(seconds[1:]), "peak_gb": peak_memory_gb(device), "tokens": tokens / (steps + 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, *options.one, options.steps)))
        return
    rows = []
    for dtype in options.dtypes:
        runs = {"full": [], "lora": []}
        for _ in range(options.rounds):
            for method, found in runs.items():
                command = [
                    sys.executable,
                    __file__,
                    options.model,
                    "--steps",
                    str(options.steps),
                    "--one",
                    method,
                    dtype,
                ]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        for method, found in runs.items():
            steps = [run["step_s"] for run in found]
            rows.append({
                "dtype": dtype, "method": method, "rounds": len(found), "step_s": round(statistics.median(steps), 3),
                "step_s_least": round(min(steps), 3), "step_s_most": round(max(steps), 3),
                "peak_gb": round(statistics.median(run["peak_gb"] for run in found), 3),
                "tokens_a_step": round(found[0]["tokens"]),
            })  # fmt: skip
            print(rows[-1], flush=True)
        full, lora = rows[-2:]
        time_ratio, memory_ratio = lora["step_s"] / full["step_s"], lora["peak_gb"] / full["peak_gb"]
        print(f"{dtype}: LoRA / full: time {time_ratio:.2f}, memory {memory_ratio:.2f}", flush=True)
    path = HERE / "results" / "sonnets.csv"
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
