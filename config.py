"""Settings as frozen dataclasses, presets of model sizes, and default learning rates."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BUNDLED_MODEL = ROOT / "data" / "tiny-gpt2"
# The linear layers of a block that LoRA can adapt.
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "interm_dense", "out_dense")
# Upper limits of the shape keep a malformed file from allocating a huge model.
SHAPE_LIMITS = {
    "n_layer": 2**8,
    "n_embd": 2**17,
    "n_head": 2**17,
    "vocab_size": 2**24,
    "n_positions": 2**24,
}


class InputError(Exception):
    """Unusable input. The message names the value and the way out; scripts exit with code 2."""


class Interrupted(Exception):  # noqa: N818 (not an error: the run can be resumed)
    """Training stopped after a signal and saved its state; args are a message and the signal."""


def check_number(name, value, at_least, below=math.inf, kind=(int, float)):
    """Raise InputError unless `value` is a number of type `kind` with at_least <= value < below."""
    if isinstance(value, bool) or not isinstance(value, kind) or not at_least <= value < below:
        number = "a whole number" if kind is int else "a number"
        limit = f" and below {below}" if below < math.inf else ""
        raise InputError(f"{name} must be {number} of at least {at_least}{limit}, not {value!r}")


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2 (Radford et al. 2019), with the field names of Hugging Face."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int = 50257
    n_positions: int = 1024
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | None = None  # ends training texts and stops generation

    def __post_init__(self):
        for name, below in SHAPE_LIMITS.items():
            check_number(name, getattr(self, name), 1, below, int)
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon"):
            check_number(name, getattr(self, name), 0, 1)
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.eos_token_id is not None:
            check_number("eos_token_id", self.eos_token_id, 0, self.vocab_size, int)

    @property
    def head_width(self):
        return self.n_embd // self.n_head

    @property
    def feed_forward_width(self):
        return 4 * self.n_embd


PRESETS = {
    "tiny": GPT2Config(4, 256, 4, 8192, 512, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0),
    "gpt2": GPT2Config(12, 768, 12),
    "gpt2-medium": GPT2Config(24, 1024, 16),
    "gpt2-large": GPT2Config(36, 1280, 20),
    "gpt2-xl": GPT2Config(48, 1600, 25),
}


def option(default, help, at_least=0, below=math.inf, **settings):
    """A dataclass field with the range of a number and argparse's settings of its option."""
    settings = {"help": help, "type": type(default), "metavar": "N"} | settings
    return field(default=default, metadata={"range": (at_least, below), "option": settings})


class Settings:
    """The base of dataclasses of options: raises InputError for a number out of its range."""

    prefix = ""  # of a field's name in errors

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            if entry.type in (int, float):
                kind = int if entry.type is int else (int, float)
                name, value = self.prefix + entry.name, getattr(self, entry.name)
                check_number(name, value, *entry.metadata["range"], kind)


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685)."""

    prefix = "lora_"
    rank: int = option(4, "rank r of the update B A", at_least=1)
    alpha: float = option(16.0, "the update is scaled by alpha / r", at_least=1e-6, below=1e6)
    dropout: float = option(0.05, "dropout on the input of the update", below=1)
    targets: tuple[str, ...] = option(
        ("q_proj", "v_proj", "interm_dense"),
        f"linear layers to adapt: all, or some of {', '.join(LINEARS)}",
        choices=("all", *LINEARS),
        type=str,
        nargs="+",
        metavar="NAME",
    )

    def __post_init__(self):
        super().__post_init__()
        targets = LINEARS if "all" in self.targets else self.targets
        if not targets or not set(targets) <= set(LINEARS):
            names, given = ", ".join(LINEARS), ", ".join(targets) or "empty"
            raise InputError(f"lora_targets must be all or some of {names}, not {given}")
        in_order = tuple(name for name in LINEARS if name in targets)
        object.__setattr__(self, "targets", in_order)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of the training loop, shared by both tasks."""

    prefix = "--"
    epochs: int = option(10, "passes over the training data; 0 only evaluates", below=2**31)
    lr: float = option(1e-5, "peak learning rate of AdamW; default by model", at_least=1e-12)
    batch_size: int = option(8, "examples per batch, over all processes", at_least=1)
    grad_accumulation: int = option(1, "batches per optimizer step", at_least=1)
    seed: int = option(11711, "seed of initialization, batches, dropout, sampling", below=2**63)
    schedule: str = option(
        "constant",
        "learning rate after warm-up",
        choices=("constant", "linear", "cosine"),
        metavar=None,
    )
    warmup: float = option(0.0, "share of all steps with a rising learning rate", below=1)
    max_grad_norm: float = option(0.0, "clip the gradient norm; 0 does not clip")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW")
    patience: int = option(0, "stop after this many epochs without a better dev result; 0: never")
    checkpoint_every: int = option(0, "also save the resume state every this many steps; 0: never")
    dtype: str = option(
        "auto",
        "precision of matrix multiplications",
        choices=("auto", "float32", "bfloat16", "float16"),
        metavar=None,
    )
    device: str = option(
        "auto", "auto uses CUDA if available; or cpu, cuda, cuda:1", metavar="NAME"
    )


@dataclass(frozen=True)
class SamplingConfig(Settings):
    """How new tokens are sampled."""

    temperature: float = option(0.9, "0 is greedy")
    top_p: float = option(
        0.9, "total probability of the tokens to sample from", at_least=1e-12, below=1 + 1e-12
    )
    top_k: int = option(0, "number of tokens to sample from; 0: no limit")
    max_new_tokens: int = option(200, "limit per text", at_least=1)


# Default learning rates of AdamW. tiny: chosen on dev (data/README.md). GPT-2 sizes: Li and Liang
# 2021 (arXiv 2101.00190) for full fine-tuning and Hu et al. 2021 (table 11) for LoRA.
LEARNING_RATES = {
    "gpt2": {"full": 5e-5, "lora": 2e-4},
    "report": {"full": 1e-5, "lora": 1e-4},
    "tiny sonnets": {"full": 1e-4, "lora": 1e-3},
    "tiny paraphrases": {"full": 5e-4, "lora": 2e-3},
}
