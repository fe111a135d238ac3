"""Settings as frozen dataclasses; all but GPT2Config's fields are also options."""

import dataclasses
import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
# The linear layers of a GPT-2 layer, which LoRA can adapt.
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "interm_dense", "out_dense")
SCHEDULES = ("constant", "linear", "cosine")


class InputError(Exception):
    """Unusable input. The message names the value and the way out; scripts exit with code 2."""


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2 (Radford et al. 2019), with the field names of Hugging Face."""

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    vocab_size: int = 50257
    n_positions: int = 1024
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | None = None  # ends training texts and stops generation

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")


def check_range(name: str, value: float, limits: tuple[float, float]) -> None:
    """Raise InputError unless low <= value < high for `limits` (low, high)."""
    low, high = limits
    if not low <= value < high:
        raise InputError(f"{name} must be at least {low:g} and below {high:.10g}, not {value!r}")


def seed_from(*values: object) -> int:
    """A seed of 63 bits that depends on all values and is the same on every machine."""
    text = repr(values).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1


def option(
    default: Any, help: str, limits: tuple[float, float] = (0, math.inf), **settings: Any
) -> Any:
    """A field with its range, if it is a number, and argparse's settings of its option."""
    settings = {"help": f"{help} (default: %(default)s)", "type": type(default)} | settings
    return field(default=default, metadata={"limits": limits, "option": settings})


class Settings:
    """Base of the dataclasses below: raises InputError for a number out of its range."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            if entry.type in (int, float):
                check_range(entry.name, vars(self)[entry.name], entry.metadata["limits"])


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = option(4, "rank r of the update B A", (1, 2**16))
    alpha: float = option(16.0, "the update is scaled by alpha / r", (1e-6, 1e6))
    dropout: float = option(0.05, "dropout on the input of the update", (0, 1))
    targets: tuple[str, ...] = option(
        ("q_proj", "v_proj", "interm_dense"),
        f"linear layers to adapt: all, or some of {', '.join(LINEARS)}",
        choices=("all", *LINEARS),
        type=str,
        nargs="+",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = LINEARS if "all" in self.targets else self.targets
        if not targets or not set(targets) <= set(LINEARS):
            raise InputError(f"lora_targets must be all or some of {LINEARS}, not {targets}")
        object.__setattr__(self, "targets", tuple(name for name in LINEARS if name in targets))


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of the training loop."""

    epochs: int = option(10, "passes over the training data; 0 only evaluates", (0, 2**31))
    lr: float = option(1e-5, "peak learning rate of AdamW; None: by model and method", (1e-12, 1e3))
    batch_size: int = option(8, "examples per batch, over all processes", (1, 2**31))
    grad_accumulation: int = option(1, "batches of batch_size per optimizer step", (1, 2**31))
    seed: int = option(11711, "seed of initialization, batches, dropout, sampling", (0, 2**63))
    schedule: str = option("constant", "learning rate after warm-up", choices=SCHEDULES)
    warmup: float = option(0.0, "share of all steps with a rising learning rate", (0, 1))
    max_grad_norm: float = option(0.0, "clip the gradient norm; 0 does not clip")
    weight_decay: float = option(0.0, "decay of AdamW, of the matrices of linear layers only")
    patience: int = option(0, "stop after this many epochs without a better dev result; 0: never")


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How new tokens are sampled, and when a text ends."""

    temperature: float = option(0.9, "0 is greedy")
    top_p: float = option(0.9, "total probability of the tokens to sample from", (1e-12, 1 + 1e-9))
    top_k: int = option(0, "number of tokens to sample from; 0: no limit")
    max_new_tokens: int = option(0, "limit per text; 0: as far as the model's positions reach")
    max_lines: int = option(14, "limit of lines per text, with those of the prompt; 0: no limit")
