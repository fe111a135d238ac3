"""Command-line options made from dataclass fields, and errors as one line and an exit code."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path

from config import (
    LEARNING_RATES,
    PRESETS,
    ROOT,
    SHAPE_LIMITS,
    InputError,
    Interrupted,
    LoRAConfig,
    TrainConfig,
)

RESUME_HINT = "saved files are intact (continue a run with --resume)"


@contextlib.contextmanager
def exit_cleanly():
    """Turn errors that a user can act on into one line and an exit code.

    Other exceptions are bugs and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # consoles without UTF-8 show ? instead of failing
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
        return
    except InputError as error:
        message, code = f"error: {error}", 2
    except Interrupted as stop:
        text, number = stop.args
        message, code = f"{text}; continue with: {resume_command()}", 128 + number
    except KeyboardInterrupt:
        message, code = f"stopped; {RESUME_HINT}", 130
    except FloatingPointError as error:
        message, code = f"error: {error}; saved files are intact", 1
    except OSError as error:
        reason = f"{error.filename or 'a file'}: {error.strerror or error}"
        message, code = f"error: {reason}; {RESUME_HINT}", 1
    except (RuntimeError, MemoryError) as error:
        bug = not re.search("out of memory|allocate memory", str(error))
        if isinstance(error, RuntimeError) and bug:
            raise
        advice = "use --gradient_checkpointing, --use_lora or --grad_accumulation"
        message, code = f"error: out of memory; {advice} with a smaller --batch_size", 1
    print(" ".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)


def resume_command():
    """The command that continues this run; with several nodes, each has its own."""
    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = "torchrun --nproc_per_node={LOCAL_WORLD_SIZE}"
        if os.environ["GROUP_WORLD_SIZE"] != "1":
            launcher += " --nnodes={GROUP_WORLD_SIZE} --node_rank={GROUP_RANK}"
            launcher += " --master_addr={MASTER_ADDR} --master_port={MASTER_PORT}"
        launcher = launcher.format(**os.environ)
    arguments = sys.argv if "--resume" in sys.argv else [*sys.argv, "--resume"]
    return f"{launcher} {shlex.join(arguments)}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except those that say nothing to a user."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        if hidden or str(action.default).startswith(str(ROOT)):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports an argument that cannot be parsed as an InputError."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message}; --help lists all options")


def add_options(parser, config_class, title, prefix=""):
    """Add one option per field of `config_class`."""
    group = parser.add_argument_group(title)
    for entry in dataclasses.fields(config_class):
        settings = entry.metadata["option"]
        group.add_argument(f"--{prefix}{entry.name}", default=entry.default, **settings)


def add_common_options(parser, task, **train_defaults):
    """Add the options that both task scripts share."""
    add = parser.add_argument_group("model and method").add_argument
    names = f"{', '.join(PRESETS)}, or the folder of a model"
    add("--model_size", default="tiny", metavar="NAME", help=names)
    add("--use_lora", action="store_true", help="train LoRA matrices only")
    add("--use_gpu", action="store_true", help="require CUDA")
    add("--preset", choices=["report"], help="settings of the student report")
    cost = "recompute activations: less memory, a third to a half more time"
    add("--gradient_checkpointing", action="store_true", help=cost)
    add("--compile", action="store_true", help="torch.compile the model; no faster on a CPU")
    add_options(parser, TrainConfig, "training")
    add_options(parser, LoRAConfig, "LoRA (with --use_lora)", prefix="lora_")
    add = parser.add_argument_group("run folder").add_argument
    add("--out_dir", metavar="DIR", help=f"run folder; default in runs/{task}")
    newest = "continue the newest unfinished run with the same options"
    add("--resume", action="store_true", help=newest)
    parser.set_defaults(lr=None, **train_defaults)


def parse(parser, arguments, task, report=None, only=None, unused=()):
    """Parse a script's options and derive `method` and, if it was not given, `lr`.

    `report` holds the defaults of --preset report. Raises InputError for an option that would have
    no effect: LoRA's without --use_lora and, with the flag `only`, training options and `unused`.
    """
    if parser.parse_known_args(arguments)[0].preset == "report":
        parser.set_defaults(**(report or {}))
    options = parser.parse_args(arguments)
    if not options.use_lora:
        lora_options = [f"lora_{name}" for name in vars(LoRAConfig())]
        reject_options(parser, options, lora_options, "without --use_lora")
    if only and getattr(options, only):
        names = sorted(vars(TrainConfig()).keys() - {"seed", "device", "dtype"})
        names += ["use_lora", "gradient_checkpointing", "compile", "out_dir", "resume", *unused]
        reject_options(parser, options, names, f"with --{only}")
    options.method = "lora" if options.use_lora else "full"
    if options.lr is None:
        tiny = preset_name(options.model_size) == "tiny"
        model = options.preset or (f"tiny {task}" if tiny else "gpt2")
        rates = LEARNING_RATES.get(model, LEARNING_RATES["gpt2"])  # a new task has none of its own
        options.lr = rates[options.method]
    return options


def preset_name(model):
    """The preset whose shape a model has, so that defaults do not depend on how it is spelled."""
    if model in PRESETS:
        return model
    try:
        settings = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        shape = [settings.get(name) for name in SHAPE_LIMITS]
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # the error comes when the model is loaded
    for preset, config in PRESETS.items():
        if shape == [getattr(config, name) for name in SHAPE_LIMITS]:
            return preset
    return None


def reject_options(parser, options, names, where):
    """Raise InputError for the first of `names` that was given and would have no effect."""
    for name in names:
        value = getattr(options, name)
        if value != parser.get_default(name):
            raise InputError(f"--{name} {value} has no effect {where}; remove one of the two")


def check_text(name, text):
    """Raise InputError for a text of option `name` that is blank or was not UTF-8."""
    if not text.strip():
        raise InputError(f"--{name} {text!r} is empty; give a text")
    if re.search("[\ud800-\udfff]", text):  # how Python keeps bytes that it cannot decode
        raise InputError(f"--{name} {text!r} is not UTF-8; save or type it as UTF-8")


def check_outputs(options, outputs, inputs):
    """Raise InputError for an output that is not a writable file or would replace an input."""
    taken = {Path(getattr(options, name)).resolve(): name for name in inputs}
    for name in outputs:
        path = Path(getattr(options, name)).resolve()
        parent = next(filter(Path.exists, path.parents), path)
        problem = f"is also the file of --{taken[path]}" if path in taken else ""
        if path.exists() and not path.is_file():
            problem = "is not a file"
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            problem = f"cannot be written: {parent} is not a writable folder"
        if problem:
            raise InputError(f"--{name} {path} {problem}; name another file")
        taken[path] = name


def from_options(config_class, options, prefix=""):
    """Make a `config_class` from parsed options; raises InputError for a value out of range."""
    names = vars(config_class())
    return config_class(**{name: getattr(options, prefix + name) for name in names})
