"""Settings as frozen dataclasses, and the command-line options made from them (no torch here: --help is instant)."""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import shlex
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HUGGING_FACE_LINEARS = {  # Hugging Face's, inside its h.N, and ours; c_attn fuses query, key and value
    "attn.c_attn": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.c_proj": ("attention.out_proj",),
    "mlp.c_fc": ("interm_dense",),
    "mlp.c_proj": ("out_dense",),
}
LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "interm_dense", "out_dense")  # what LoRA can adapt


class InputError(Exception):
    """Something the user gave can't be used. The message names the value and the way out; scripts exit with 2."""


class Interrupted(Exception):  # noqa: N818 (no error: a run that was asked to stop, and can go on later)
    """Training was stopped after a step, its state saved; holds a message and the signal's number."""


@contextlib.contextmanager
def exit_cleanly():
    """Turn what a user can act on into one line and an exit code; leave a traceback to what is our mistake."""
    for stream in (sys.stdout, sys.stderr):  # a console without UTF-8 shows a ? instead of failing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, where training does not do better
    try:
        yield
        return
    except InputError as error:
        message, code = f"error: {error}", 2
    except Interrupted as stop:
        text, number = stop.args
        resume = "" if "--resume" in sys.argv else " --resume"
        many = "TORCHELASTIC_RUN_ID" in os.environ
        launcher = f"torchrun --nproc_per_node={os.environ['WORLD_SIZE']}" if many else "python"
        message, code = f"{text}; go on with: {launcher} {shlex.join(sys.argv)}{resume}", 128 + number
    except KeyboardInterrupt:
        message, code = "stopped; what was saved before stands (a run goes on with --resume)", 130
    except FloatingPointError as error:
        message, code = f"error: {error}; what was saved before stands", 1
    except OSError as error:  # a full disk, a folder that can't be written
        reason = f"{error.filename or 'a file'}: {error.strerror or error}"
        message, code = f"error: {reason}; what was saved before stands (a run goes on with --resume)", 1
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        advice = "--gradient_checkpointing, --use_lora, or a smaller --batch_size with --grad_accumulation, takes less"
        message, code = f"error: out of memory; {advice}", 1
    print(" ".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)


def check(name: str, value, least: float, below: float = math.inf, kind=int | float) -> None:
    """Raise InputError, naming the setting, unless its value is such a number, at least `least` and below `below`."""
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value < below:
        limit = f" and below {below}" if below < math.inf else ""
        raise InputError(f"{name} must be a {'whole ' * (kind is int)}number of at least {least}{limit}, not {value!r}")


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2 (Radford et al. 2019); every other width follows from these."""

    layers: int
    width: int
    heads: int
    vocab_size: int = 50257
    positions: int = 1024
    dropout: float = 0.1
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        # a file that claims more would have us build it before its weights are looked at
        for name, most in (("layers", 10), ("width", 17), ("heads", 17), ("vocab_size", 24), ("positions", 24)):
            check(f"a model's {name}", getattr(self, name), 1, 2**most, int)
        for name in ("dropout", "layer_norm_eps"):
            check(f"a model's {name}", getattr(self, name), 0, 1)
        if self.width % self.heads:
            raise InputError(f"width {self.width} does not divide into {self.heads} heads")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def feed_forward_width(self) -> int:
        return 4 * self.width


PRESETS = {
    # pretrained without dropout, and tuned better and faster without (data/README.md)
    "tiny": GPT2Config(layers=4, width=256, heads=4, vocab_size=8192, positions=512, dropout=0.0),
    "gpt2": GPT2Config(layers=12, width=768, heads=12),
    "gpt2-medium": GPT2Config(layers=24, width=1024, heads=16),
    "gpt2-large": GPT2Config(layers=36, width=1280, heads=20),
    "gpt2-xl": GPT2Config(layers=48, width=1600, heads=25),
}


def option(default, help, **settings):
    """A dataclass field that also describes its command-line option."""
    return field(default=default, metadata={"help": help, **settings})


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): which linears, and how large an update."""

    rank: int = option(4, "rank r of the update B A")
    alpha: float = option(16.0, "scale: the update is multiplied by alpha / r")
    dropout: float = option(0.05, "dropout on the update's input")
    targets: tuple[str, ...] = option(
        ("q_proj", "v_proj", "interm_dense"), f"the linears that get an update: {', '.join(LINEARS)}", choices=LINEARS
    )

    def __post_init__(self):
        check("LoRA's rank", self.rank, 1, kind=int)
        check("LoRA's alpha", self.alpha, 1e-6, 1e6)
        check("LoRA's dropout", self.dropout, 0, 1)
        unknown = sorted(set(self.targets) - set(LINEARS))
        if unknown or not self.targets:
            raise InputError(f"LoRA's targets {unknown or 'are empty'}: choose from {', '.join(LINEARS)}")
        object.__setattr__(self, "targets", tuple(name for name in LINEARS if name in self.targets))  # one order


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; the same for every task."""

    epochs: int = option(10, "passes over the training data; 0 evaluates only")
    lr: float = option(1e-5, "AdamW's (largest) learning rate; by default one for the model and method")
    batch_size: int = option(8, "examples a batch, of all processes together")
    grad_accumulation: int = option(1, "batches whose gradients make one step: as one batch so many times larger")
    seed: int = option(11711, "fixes initialisation, order of batches, dropout and sampling")
    schedule: str = option("constant", "the learning rate after warm-up", choices=("constant", "linear", "cosine"))
    warmup: float = option(0.0, "share of all steps over which the learning rate rises from 0")
    max_grad_norm: float = option(0.0, "clip the gradient's norm at this; 0 does not clip")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay")
    patience: int = option(0, "stop after this many epochs without a better dev result; 0 never stops early")
    checkpoint_every: int = option(0, "save the resume state every this many steps besides each epoch's end; 0: not")
    dtype: str = option("auto", "precision of matrix products", choices=("auto", "float32", "bfloat16", "float16"))
    device: str = option("auto", "auto takes CUDA where there is one; or cpu, cuda, cuda:1")

    def __post_init__(self):
        least = {"batch_size": 1, "grad_accumulation": 1, "lr": 1e-12}
        below = {"seed": 2**63, "warmup": 1, "epochs": 2**31}
        for entry in dataclasses.fields(self):
            if not isinstance(entry.default, str):
                value = getattr(self, entry.name)
                check(f"--{entry.name}", value, least.get(entry.name, 0), below.get(entry.name, math.inf))


# AdamW's learning rates. For tiny, the best on dev of the sweep in data/README.md (sonnets), or good first choices
# (paraphrases; `experiments.py paraphrase_learning_rate` compares others). For the GPT-2 sizes, from papers and
# untested here: Li and Liang 2021 (arXiv 2101.00190) for all weights, Hu et al. 2021 (table 11) for LoRA.
_GPT2_RATES = {"full": 5e-5, "lora": 2e-4}
LEARNING_RATES = {
    "sonnets": {"tiny": {"full": 1e-4, "lora": 1e-3}, "report": {"full": 1e-5, "lora": 1e-4}},
    "paraphrases": {"tiny": {"full": 5e-4, "lora": 2e-3}, "report": {"full": 1e-5, "lora": 1e-4}},
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds each option's default to its help, where it has one to show."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False or str(action.default).startswith(str(ROOT))
        return action.help if hidden else super()._get_help_string(action)


def add_options(parser: argparse.ArgumentParser, config_class, title: str, prefix: str = "", **defaults) -> None:
    """Add one option a field of `config_class`; `defaults` replace the fields' own (None: decided later)."""
    group = parser.add_argument_group(title)
    for entry in dataclasses.fields(config_class):
        default = defaults.get(entry.name, entry.default)
        many = isinstance(entry.default, tuple)
        choices = entry.metadata.get("choices")
        group.add_argument(f"--{prefix}{entry.name}", type=str if many else type(entry.default), default=default,
                           nargs="+" if many else None, choices=choices, help=entry.metadata["help"],
                           metavar=None if choices and not many else "NAME" if many else "N")  # fmt: skip


def shared_options(parser: argparse.ArgumentParser, task: str, **train_defaults) -> tuple:
    """Add the options of every task script; returns the groups of what is trained and of files, for the task's own."""
    what = parser.add_argument_group("what to train, on what")
    what.add_argument("--model_size", default="tiny", metavar="NAME", help=f"{', '.join(PRESETS)}, or a model's folder")
    what.add_argument("--use_lora", action="store_true", help="train LoRA's low-rank matrices instead of all weights")
    what.add_argument("--use_gpu", action="store_true", help="insist on CUDA")
    what.add_argument("--preset", choices=["report"], help="report: the settings of the student report before this")
    add_options(parser, TrainConfig, "training", lr=None, **train_defaults)
    add_options(parser, LoRAConfig, "LoRA (with --use_lora)", prefix="lora_")
    about = "keep no activations but each layer's input: less memory, a third to a half more time"
    what.add_argument("--gradient_checkpointing", action="store_true", help=about)
    files = parser.add_argument_group("files")
    files.add_argument("--out_dir", metavar="DIR", help=f"the run's folder, instead of one in runs/{task}")
    files.add_argument("--resume", action="store_true", help="go on with the newest unfinished run of these options")
    return what, files


class Parser(argparse.ArgumentParser):
    """Says in one line, as all our errors do, what can't be parsed."""

    def error(self, message: str):
        raise InputError(f"{message}; --help lists what can be given")


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace, names, where: str) -> None:
    """Raise InputError for the first of these options that was given: where it is, it would be ignored unsaid."""
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            raise InputError(f"--{name} {getattr(options, name)} has no effect {where}; leave one of the two out")


def check_outputs(options: argparse.Namespace, outputs: tuple[str, ...], inputs: tuple[str, ...]) -> None:
    """Raise InputError for a path that can't be written to, or would replace an input or another output."""
    taken = {Path(getattr(options, name)).resolve(): name for name in inputs}
    for name in outputs:
        path = Path(getattr(options, name)).resolve()
        above = next(folder for folder in (*path.parents, path) if os.path.exists(folder))
        problem = f"is the file of --{taken[path]} too" if path in taken else ""
        if path.exists() and not path.is_file():  # a device, too, would be replaced by a file
            problem = "is a folder" if path.is_dir() else "is no regular file"
        if not (above.is_dir() and os.access(above, os.W_OK)):
            problem = f"can't be written: {above} is no folder that may be written to"
        if problem:
            raise InputError(f"--{name} {path} {problem}; name another file")
        taken[path] = name


def parse(parser: Parser, arguments, task: str, report: dict, only: str, unused: tuple) -> argparse.Namespace:
    """Parse a task script's options; `method` and, where it was not given, `lr` follow from the others.

    Raises InputError for an option that LoRA alone has, given without it, and in the mode `only`, which trains
    nothing, for one of training or among `unused`.
    """
    if parser.parse_known_args(arguments)[0].preset == "report":
        parser.set_defaults(**report)
    options = parser.parse_args(arguments)
    if not options.use_lora:
        refuse(parser, options, [f"lora_{item.name}" for item in dataclasses.fields(LoRAConfig)], "without --use_lora")
    if getattr(options, only):
        names = sorted({entry.name for entry in dataclasses.fields(TrainConfig)} - {"seed", "device", "dtype"})
        names += ["use_lora", "gradient_checkpointing", "out_dir", "resume", *unused]
        refuse(parser, options, names, f"with --{only}")
    options.method = "lora" if options.use_lora else "full"
    if options.lr is None:
        rates = LEARNING_RATES[task].get("report" if options.preset else options.model_size, _GPT2_RATES)
        options.lr = rates[options.method]
    return options


def from_options(config_class, options: argparse.Namespace, prefix: str = ""):
    """Make a `config_class` from parsed options; raises InputError for a value out of range."""
    values = {entry.name: getattr(options, prefix + entry.name) for entry in dataclasses.fields(config_class)}
    return config_class(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
