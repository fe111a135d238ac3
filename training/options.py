"""Command-line options made from dataclass fields, the hardware that they choose, and errors."""

import contextlib
import dataclasses
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from config import InputError, LoRAConfig, TrainConfig, check_range
from models.hugging_face import BUNDLED_MODEL, SIZES
from training import distributed
from training.runs import FILE_OPTIONS, OUTPUT_OPTIONS

# Default learning rates of AdamW: Li and Liang 2021 (arXiv 2101.00190) for full fine-tuning, Hu et
# al. 2021 (table 11) for LoRA; for a frozen GPT-2 that of results/frozen.md; those of the report.
GPT2_RATES = {"full": 5e-5, "lora": 2e-4, "frozen": 1e-3}
REPORT_RATES = {"full": 1e-5, "lora": 1e-4, "frozen": 1e-3}
Config, Rates = TypeVar("Config"), dict[str, float]  # a dataclass; method -> learning rate


def add_options(parser: ArgumentParser, config_class: type, title: str, prefix: str = "") -> None:
    """Add one option per field of `config_class`."""
    add = parser.add_argument_group(title).add_argument
    for entry in dataclasses.fields(config_class):
        add(f"--{prefix}{entry.name}", default=entry.default, **entry.metadata["option"])


def from_options(config_class: type[Config], options: Namespace, prefix: str = "") -> Config:
    """Make a `config_class` from parsed options; raises InputError for a value out of range."""
    names = [entry.name for entry in dataclasses.fields(config_class)]
    return config_class(**{name: vars(options)[prefix + name] for name in names})


def task_parser(description: str | None, **defaults: Any) -> ArgumentParser:
    """A parser with the options that both tasks share."""
    settings = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = ArgumentParser(usage="%(prog)s [options]", description=description, **settings)
    add = parser.add_argument_group("model and method").add_argument
    names = f"tiny (default), {', '.join(SIZES)}, or a folder"
    add("--model_size", default="tiny", metavar="NAME", help=names)
    add("--use_lora", action="append_const", dest="methods", const="lora", help="train only LoRA")
    add("--dropout", type=float, metavar="P", help="instead of the rates in config.json")
    add("--preset", choices=["report"], help="settings of the student report")
    add_options(parser, TrainConfig, "training")
    add_options(parser, LoRAConfig, "LoRA (with --use_lora)", prefix="lora_")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", metavar="NAME", help="auto: CUDA if available; cpu, cuda:1")
    add("--use_gpu", action="store_const", const="cuda", dest="device", help="require CUDA")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=dtypes, help="precision of matrix multiplications")
    add("--gradient_checkpointing", action="store_true", help="less memory, up to half more time")
    add("--compile", action="store_true", help="torch.compile the model; no faster on a CPU")
    add("--plain", action="store_true", help="without speed/; rounding and dropout differ")
    add = parser.add_argument_group("run folder").add_argument
    add("--out_dir", metavar="DIR", help="folder of the run; default in runs/")
    add("--resume", action="store_true", help="continue the last run with these options")
    parser.set_defaults(lr=None, **defaults)
    return parser


def parse(
    parser: ArgumentParser, arguments: list[str] | None, report: dict[str, Any], rates: Rates
) -> Namespace:
    """Parse options, with the defaults of `report` if --preset report is among them.

    Adds the `method`, full fine-tuning unless an option names one, and its default learning rate,
    which is in `rates` for tiny.
    """
    if parser.parse_known_args(arguments)[0].preset == "report":
        parser.set_defaults(**report)
        rates = REPORT_RATES
    options = parser.parse_args(arguments)
    check_range("dropout", options.dropout or 0, (0, 1))
    options.method, *others = dict.fromkeys(vars(options).pop("methods") or ["full"])
    if others:
        raise InputError(
            f"the methods {options.method} and {others[0]} exclude each other: use one"
        )
    if options.preset is None and not is_tiny(options.model_size):
        rates = GPT2_RATES
    if options.lr is None:
        options.lr = rates[options.method]
    from_options(TrainConfig, options)  # or bad values would be found later
    return options


def check_options(options: Namespace) -> None:
    """Raise InputError for options that do not go together.

    Own texts need a model, and no output may replace an input, a folder or another output.
    """
    values = vars(options)
    for given, needed in (("prompt", "generate"), ("pair", "predict")):
        if values.get(given) and values[needed] is None:
            raise InputError(f"--{given} needs --{needed} DIR, a trained model")
    taken = [Path(values[name]).resolve() for name in FILE_OPTIONS if values.get(name)]
    for name in [name for name in OUTPUT_OPTIONS if name in values]:
        path = Path(values[name]).resolve()
        if path in taken or path.is_dir():
            raise InputError(f"--{name} {path} is an input, a folder or taken; name another file")
        taken.append(path)


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


def choose_hardware(name: str = "auto", dtype: str = "auto") -> Hardware:
    """The Hardware of --device and --dtype; joins the processes of torchrun.

    `auto` is CUDA if available, and bfloat16 if the hardware multiplies it, else float16 on CUDA,
    else float32. Raises InputError for a device that is not there.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    names = {"auto": gpus[0] if gpus else "cpu", "cuda": "cuda:0"}
    name = names.get(name, name)
    if name not in ("cpu", *gpus):
        raise InputError(f"there is no device {name} here; --device is auto, cpu or cuda:N")
    device = distributed.init(torch.device(name))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or is_bf16_supported would ask the first GPU
        # cuDNN plans for each new shape; batches, and each token that is decoded, have a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
        is_fast, slow = torch.cuda.is_bf16_supported(including_emulation=False), torch.float16
    else:
        # torch has no public function for this; emulation takes several times as long
        is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        slow = torch.float32
    auto = torch.bfloat16 if is_fast else slow
    return Hardware(device, auto if dtype == "auto" else vars(torch)[dtype])


@contextlib.contextmanager
def exit_cleanly() -> Iterator[None]:
    """Turn errors that a user can act on into one line and an exit code.

    Other exceptions are bugs and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # consoles without UTF-8 show ? instead of failing
    try:
        yield
        return
    except KeyboardInterrupt:
        code, message = 130, "stopped; --resume continues a run, and --continue a table"
    except InputError as error:
        code, message = 2, f"error: {error}"
    except (OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        code, message = 1, f"error: {error}; saved files are intact (--resume continues)"
    print(" ".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)
