"""What a run leaves on disk, each file whole or not at all: its folder, options, metrics, best model, resume state."""

import contextlib
import csv
import errno
import glob
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors import SafetensorError

from config import ROOT, InputError

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "sacrebleu", "pronouncing")
# options that do not change what is computed
NOT_COMPARED = {
    "resume", "out_dir", "use_gpu", "checkpoint_every", "gradient_checkpointing", "sonnet_out", "para_dev_out",
    "para_test_out",
}  # fmt: skip


@contextlib.contextmanager
def replacing_file(path: Path):
    """Yield a file to write; a kill at any instant leaves the old content under `path`, or all of the new."""
    temporary = path.with_name(path.name + ".tmp")
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # half a file would keep a full disk full
            temporary.unlink(missing_ok=True)
            raise
        os.replace(temporary, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _named(path: Path):
    """Raise what a full or failed disk raises as an OSError that names `path`; torch and safetensors hide it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise OSError(errno.EIO, str(cause), str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut, where a folder can be opened and synced: not on Windows, nor on any mount."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_csv(path: Path, rows: list[dict]) -> None:
    """A line a row, with every name that any of them has; what a row lacks is empty."""
    writer = csv.DictWriter(buffer := io.StringIO(), dict.fromkeys(name for row in rows for name in row), "", "raise",
                            lineterminator="\n")  # fmt: skip
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def include_tables(document: Path) -> None:
    """Put FILE's Nth paragraph between the document's marks <!-- FILE N --> and <!-- end -->, where there is one."""

    def paragraph(marks: re.Match) -> str:
        source = ROOT / marks[2]
        parts = source.read_text(encoding="utf-8").strip().split("\n\n") if source.is_file() else []
        chosen = parts[int(marks[3]) - 1 : int(marks[3])]
        return "\n".join([marks[1], *chosen, "<!-- end -->"]) if chosen else marks[0]

    text = document.read_text(encoding="utf-8")
    fresh = re.sub(r"(<!-- (\S+) (\d+) -->)\n.*?<!-- end -->", paragraph, text, flags=re.DOTALL)
    if fresh != text:
        write_text(document, fresh)


@contextlib.contextmanager
def replacing_folder(folder: Path):
    """Yield an empty folder to fill; it takes the place of `folder` when the block ends without an error."""
    fresh, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with _named(folder):
        fresh.mkdir(parents=True)
        yield fresh
        for path in fresh.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(fresh)
        if folder.exists():
            os.replace(folder, old)  # a folder can't be replaced in one step: --resume undoes a half
        os.replace(fresh, folder)
        _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


class Run:
    """A run's folder, `runs/<task>/<name>` unless named; with `--resume` the newest unfinished one of equal options."""

    def __init__(self, task: str, name: str, options: dict, facts: dict):
        """Open the folder and write config.json. Raises InputError for a named folder that holds another run."""
        self.options = options
        named = Path(options["out_dir"]) if options["out_dir"] else None
        parent = ROOT / "runs" / task
        self.resumed = False
        if options["resume"]:
            found = [named] if named else parent.glob(f"{glob.escape(name)}*")
            unfinished = [path for path in found if self._unfinished(path, facts)]
            if unfinished:
                self.folder, self.resumed = max(unfinished, key=lambda path: (path.stat().st_mtime, path.name)), True
                old = self.best.with_name("best.old")
                if old.exists() and not self.best.exists():  # killed between the renames of replacing_folder
                    os.replace(old, self.best)
                return
        self.folder = named or parent / name
        ours = ("config.json", "resume", "best", "summary.json", "metrics.csv")
        if named and any((named / part).exists() for part in ours):
            raise InputError(f"{named} already holds a run; name another --out_dir. (--resume goes on with an "
                             "unfinished run of the same options, data and precision.)")  # fmt: skip
        for counter in itertools.count(2):
            try:
                self.folder.mkdir(parents=True, exist_ok=named is not None)
                break
            except (FileExistsError, NotADirectoryError) as error:
                if named or isinstance(error, NotADirectoryError):
                    raise InputError(f"--out_dir {self.folder} is a file, or below one; name a folder") from None
                self.folder = parent / f"{name}-{counter}"
        write_json(self.folder / "config.json", {"options": self.options, **facts})

    def _unfinished(self, folder: Path, facts: dict) -> bool:
        """Whether the folder's run has no summary yet, and the same options, data and precision."""
        wanted = json.loads(json.dumps({"options": self.options, **facts}))
        try:
            known = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            for name in NOT_COMPARED:
                known["options"].pop(name, None), wanted["options"].pop(name, None)
            same = all(known.get(key) == wanted.get(key) for key in ("options", "data_sha256", "device_type", "dtype"))
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            return False
        return same and not (folder / "summary.json").exists()

    @property
    def best(self) -> Path:
        return self.folder / "best"

    @property
    def state_path(self) -> Path:
        return self.folder / "resume" / "state.pt"

    def save_state(self, state: dict) -> None:
        (self.folder / "config.json").stat()  # fails where the folder has vanished: it must not be made anew in silence
        with replacing_file(self.state_path) as file:
            torch.save(state, file)

    def load_state(self) -> dict | None:
        """The state that save_state wrote, or None; raises InputError for a file that is not one."""
        if not self.state_path.is_file():
            return None
        try:
            return torch.load(self.state_path, weights_only=True, map_location="cpu")
        except Exception as error:  # unpickling a broken file raises almost anything
            reason = type(error).__name__
            raise InputError(f"{self.state_path} can't be read ({reason}); delete it to start over") from error

    def finish(self, title: str, figures: dict) -> None:
        """Write the best model's card and, last, summary.json: a run that has one is complete."""
        if self.best.exists():
            write_text(self.best / "README.md", model_card(title, self.options, figures))
        write_json(self.folder / "summary.json", figures)

    def write_metrics(self, rows: list[dict]) -> None:
        """metrics.csv, a row an epoch."""
        if rows:
            write_csv(self.folder / "metrics.csv", rows)


def facts(device: torch.device, dtype: torch.dtype, files: list[Path]) -> dict:
    """What a result depends on besides the options: versions, commit, device, precision, the data's SHA-256."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "data_sha256": {str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in files},
    }


def commit() -> str | None:
    """The commit of the code that runs, with a + where Python files differ from it; None where git knows of none."""
    if not shutil.which("git"):
        return None
    known, edited = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno", "--", "*.py"))
    )
    return known + "+" * bool(edited) or None


def model_card(title: str, options: dict, figures: dict) -> str:
    """The README.md of weights that travel, as model hubs show it: what they are, how to load them, their figures."""
    size, adapter = options["model_size"], options["use_lora"]
    load = f'GPT2LMHeadModel.from_pretrained("{size if adapter else "this folder"}")'
    settings = ("epochs", "lr", "batch_size", "grad_accumulation", "schedule", "seed")
    shown = [
        f"| {name.replace('_', ' ')} | {value:{'.4f' if isinstance(value, float) else ','}} |"
        for name, value in figures.items()
        if name.startswith(("trainable", "best_epoch", "base", "dev", "test"))
    ]
    lines = [
        "---", f"library_name: {'peft' if adapter else 'transformers'}",
        *[f"base_model: {size}"] * (adapter and size.startswith("gpt2")), "---", "", f"# {title}", "",
        f"The best epoch, by dev figures, of {', '.join(f'{name} {options[name]}' for name in settings)}.", "",
        "```python", f'PeftModel.from_pretrained({load}, "this folder")' if adapter else load, "```", "",
        "| figure | of this run |", "|---|---|", *shown,
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def peak_memory_gb(device: torch.device) -> float | None:
    """Largest memory so far in GB: the allocator's on CUDA, else this process's; None where the system won't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # POSIX only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if platform.system() == "Darwin" else peak * 1024 / 1e9


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """How many parameters train, and how many there are; a tied one counts once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {
        "trainable_parameters": sum(n for n, trains in sizes if trains),
        "total_parameters": sum(n for n, _ in sizes),
    }


def summary(task: str, options, counts: dict[str, int], progress) -> dict:
    """The part of summary.json that every task shares, from a run's Progress; times are of training alone."""
    rows = progress.rows
    about = {"task": task, "model": options.model_size, "method": options.method, "seed": options.seed, **counts}
    peaks = [row["peak_memory_gb"] for row in rows if row["peak_memory_gb"] is not None]
    shared = {**about, "epochs": len(rows), "best_epoch": progress.best_epoch,
              "peak_memory_gb": max(peaks, default=None)}  # fmt: skip
    if rows:
        seconds = sum(row["seconds"] for row in rows)
        shared |= {
            "first_train_loss": rows[0]["train_loss"],
            "final_train_loss": rows[-1]["train_loss"],
            "best_dev_loss": rows[progress.best_epoch - 1]["dev_loss"],
            "train_seconds": round(seconds, 3),
            "seconds_per_epoch": round(seconds / len(rows), 3),
            "tokens_per_second": round(sum(row["tokens_per_second"] * row["seconds"] for row in rows) / seconds, 1),
        }
    return shared
