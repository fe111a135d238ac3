"""Command-line options made from dataclass fields, the hardware that they choose, and errors."""

import contextlib
import dataclasses
import difflib
import re
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from config import InputError, LoRAConfig, TrainConfig, check_number
from models.hugging_face import BUNDLED_MODEL, SIZES
from training import distributed

# Default learning rates of AdamW: Li and Liang 2021 (arXiv 2101.00190) for full fine-tuning, Hu et
# al. 2021 (table 11) for LoRA; and those of the report.
GPT2_RATES = {"full": 5e-5, "lora": 2e-4}
REPORT_RATES = {"full": 1e-5, "lora": 1e-4}
Config = TypeVar("Config")


class Parser(ArgumentParser):
    """Reports an argument that cannot be parsed as an InputError, with the nearest option."""

    def __init__(self, description: str | None) -> None:
        settings = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **settings)

    def error(self, message: str) -> NoReturn:
        options = [name for action in self._actions for name in action.option_strings]
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        nearest = difflib.get_close_matches(unknown[1].split("=")[0], options) if unknown else []
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise InputError(f"{message}; {hint}--help lists all options")


def add_options(parser: Parser, config_class: type, title: str, prefix: str = "") -> None:
    """Add one option per field of `config_class`."""
    group = parser.add_argument_group(title)
    for entry in dataclasses.fields(config_class):
        settings = {"default": entry.default} | entry.metadata["option"]
        settings["help"] += " (default: %(default)s)"
        group.add_argument(f"--{prefix}{entry.name}", **settings)


def from_options(config_class: type[Config], options: Namespace, prefix: str = "") -> Config:
    """Make a `config_class` from parsed options; raises InputError for a value out of range."""
    names = [entry.name for entry in dataclasses.fields(config_class)]
    return config_class(**{name: vars(options)[prefix + name] for name in names})


def task_parser(description: str | None, **defaults: Any) -> Parser:
    """A parser with the options that both tasks share."""
    parser = Parser(description)
    add = parser.add_argument_group("model and method").add_argument
    names = f"tiny (default), {', '.join(SIZES)}, or a folder"
    add("--model_size", default="tiny", metavar="NAME", help=names)
    add("--use_lora", action="store_true", help="train LoRA matrices only")
    add("--dropout", type=float, metavar="P", help="instead of the rates in config.json")
    add("--preset", choices=["report"], help="settings of the student report")
    add_options(parser, TrainConfig, "training")
    add_options(parser, LoRAConfig, "LoRA (with --use_lora)", prefix="lora_")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", metavar="NAME", help="auto: CUDA if available; cpu, cuda:1")
    add("--use_gpu", action="store_true", help="require CUDA")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="precision of matrix multiplications")
    add("--gradient_checkpointing", action="store_true", help="less memory, up to half more time")
    add("--compile", action="store_true", help="torch.compile the model; no faster on a CPU")
    add("--plain", action="store_true", help="without the faster parts of speed/: the same result")
    add = parser.add_argument_group("run folder").add_argument
    add("--out_dir", metavar="DIR", help="folder of the run; default in runs/")
    add("--resume", action="store_true", help="continue the last run with these options")
    parser.set_defaults(lr=None, **defaults)
    return parser


def parse(
    parser: Parser, arguments: list[str] | None, report: dict[str, Any], rates: dict[str, float]
) -> Namespace:
    """Parse options, with the defaults of `report` if --preset report is among them.

    Adds `method`, full or lora, and its default learning rate, which is in `rates` for tiny.
    """
    if parser.parse_known_args(arguments)[0].preset == "report":
        parser.set_defaults(**report)
    options = parser.parse_args(arguments)
    if options.dropout is not None:
        check_number("dropout", options.dropout, (0, 1), float)
    options.method = "lora" if options.use_lora else "full"
    if options.preset == "report":
        rates = REPORT_RATES
    elif not is_tiny(options.model_size):
        rates = GPT2_RATES
    if options.lr is None:
        options.lr = rates[options.method]
    return options


def is_tiny(model: str) -> bool:
    """Whether a name or folder is the bundled model, however it is spelled."""
    return model == "tiny" or Path(model).resolve() == BUNDLED_MODEL.resolve()


@dataclass(frozen=True)
class Hardware:
    """A device, and the precision of its matrix multiplications."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """A context in which matrix multiplications have `dtype`; sums and norms stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_hardware(options: Namespace) -> Hardware:
    """The Hardware of --device, --use_gpu and --dtype; joins the processes of torchrun.

    `auto` is CUDA if available, and bfloat16 if the hardware multiplies it, else float16 on CUDA,
    else float32. Raises InputError for a device that is not there.
    """
    name = options.device
    if name == "auto":
        name = "cuda" if options.use_gpu or torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name) or (options.use_gpu and name == "cpu"):
        raise InputError(f"--device {name} is not possible here; use auto, cpu, or cuda")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {name} here; remove --use_gpu and --device")
    device = distributed.init(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or pinned memory and precision would ask the first GPU
        is_fast, slow = torch.cuda.is_bf16_supported(including_emulation=False), torch.float16
    elif options.dtype == "float16":
        raise InputError("--dtype float16 needs CUDA; use auto, bfloat16 or float32")
    else:
        # torch has no public function for this; emulation takes several times as long
        is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        slow = torch.float32
    auto = torch.bfloat16 if is_fast else slow
    return Hardware(device, auto if options.dtype == "auto" else vars(torch)[options.dtype])


@contextlib.contextmanager
def exit_cleanly() -> Iterator[None]:
    """Turn errors that a user can act on into one line and an exit code.

    Other exceptions are bugs and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # consoles without UTF-8 show ? instead of failing
    try:
        yield
    except KeyboardInterrupt:
        stop(130, "stopped; repeat the command with --resume to continue")
    except InputError as error:
        stop(2, f"error: {error}")
    except FloatingPointError as error:
        stop(1, f"error: {error}; saved files are intact")
    except OSError as error:
        reason = f"{error.filename or 'a file'}: {error.strerror or error}"
        stop(1, f"error: {reason}; saved files are intact (--resume continues)")
    except (RuntimeError, MemoryError) as error:
        if not re.search("(?i)out of memory|alloc|MemoryError", repr(error)):
            raise
        advice = "use a smaller --batch_size, --gradient_checkpointing or --use_lora in training"
        stop(1, f"error: out of memory; {advice}, and fewer or shorter prompts")


def stop(code: int, message: str) -> NoReturn:
    """End the process with a line on the screen."""
    print(" ".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)
