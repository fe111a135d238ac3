"""The folder of a run: its settings, the resume state, the best model and the results."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import shutil
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from config import ROOT, InputError

PACKAGES = ("torch", "transformers", "numpy", "pandas", "safetensors", "sacrebleu")
# Data files; they and the model are compared by their contents.
FILE_OPTIONS = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
FILE_OPTIONS += ("para_train", "para_dev", "para_test")
# What else does not change what is trained, besides environment()
NOT_COMPARED = {"options", "resumed", "out_dir", "resume", "model_size", "device", "use_gpu"}
NOT_COMPARED |= {"checkpoint_every", "gradient_checkpointing", *FILE_OPTIONS}
NOT_COMPARED |= {"sonnet_out", "para_dev_out", "para_test_out"}
locks = []  # kept alive, so that they are released when the process ends


class Run:
    """runs/<task>/<name>, or --out_dir; --resume continues it."""

    def __init__(
        self, task: str, name: str, options: dict[str, Any], inputs: dict[str, Any]
    ) -> None:
        """Open and lock the folder and write config.json.

        `inputs` are what a result depends on besides the options.
        Raises InputError for a folder with another run, or one that another process is writing.
        """
        self.resume = options["resume"]
        self.folder = self.choose_folder(ROOT / "runs" / task, name, options["out_dir"])
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{self.folder} is a file, or inside of one; name a folder") from None
        lock(self.folder)
        for leftover in list(self.folder.rglob(".*.tmp")):  # of a process that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        path = self.folder / "config.json"
        config = json.loads(json.dumps({"options": options, **inputs, **environment()}))
        if path.is_file():
            config = self.continued(json.loads(path.read_text("utf-8")), config)
        write_json(path, config)
        self.best = self.folder / "best"  # the best model
        absolute = self.folder.resolve()
        # For the screen: relative to the project if it is inside
        self.shown = absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else self.folder
        self.title = name  # for the screen and plots
        self.summary: dict[str, Any] = {}  # the first entries of summary.json

    def choose_folder(self, parent: Path, name: str, out_dir: str | None) -> Path:
        """--out_dir, or the first free name of name, name-2, ...; --resume: the last used one."""
        if out_dir:
            return Path(out_dir)
        folders = [parent / name]
        while (folders[-1] / "config.json").exists():
            folders.append(parent / f"{name}-{len(folders) + 1}")
        return folders[-2] if self.resume and len(folders) > 1 else folders[-1]

    def continued(self, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """The config.json of a resumed run; raises InputError if it is another run.

        Other code or packages are noted.
        """
        if not self.resume:
            raise InputError(f"{self.folder} holds a run: --resume it, or name another --out_dir")
        # An option of the same name as an input, the dtype, counts by the input.
        before, now = ({**config["options"], **config} for config in (old, new))
        different = (name for name, value in now.items() if before.get(name) != value)
        changed = {name: now[name] for name in different if name not in NOT_COMPARED}
        for name in changed.keys() - environment().keys():
            shown = f"{before.get(name)}, not {now[name]}"
            raise InputError(f"{self.folder} has another {name} ({shown}): cannot resume it")
        if changed:
            print(f"note: resumed with another {', '.join(changed)}")
            old["resumed"] = [*old.get("resumed", []), changed]
        return old

    def save_best(self, save: Callable[[Path], None]) -> None:
        """Replace best/ by what save(folder) writes."""
        fresh = temporary(self.best)
        save(fresh)
        shutil.rmtree(self.best, ignore_errors=True)
        fresh.replace(self.best)

    def save_state(self, state: dict[str, Any]) -> None:
        """Replace the resume state."""
        with atomic_path(self.folder / "state.pt") as path:
            torch.save(state, path)

    def load_state(self) -> dict[str, Any] | None:
        """The resume state, or None; raises InputError if it cannot be read."""
        path = self.folder / "state.pt"
        if not path.is_file():
            return None
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # unpickling a broken file raises almost anything
            raise InputError(f"{path} cannot be read ({error!r}); delete it") from error


def lock(folder: Path) -> None:
    """Lock a run until this process ends; raises InputError if another process has the lock."""
    path = folder.resolve() / ".lock"
    run_lock = FileLock(path, is_singleton=True)  # one process may lock it twice
    try:
        locks.append(run_lock.acquire(timeout=0))
    except Timeout:
        config = folder / "config.json"
        host = json.loads(config.read_text("utf-8")).get("host") if config.exists() else "unknown"
        message = f"{path} is locked by a process on the host {host}, which writes this run"
        raise InputError(f"{message}: wait for it") from None
    except (OSError, NotImplementedError) as error:  # if nothing can be written, writing says so
        print(f"note: this disk has no locks; do not start two runs in {folder} ({error})")


def temporary(path: Path) -> Path:
    """A unique path beside another one."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = temporary(path)
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with atomic_path(Path(path)) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, records: list[dict[str, Any]] | pd.DataFrame) -> None:
    write_text(path, pd.DataFrame(records).to_csv(index=False, lineterminator="\n"))


def environment() -> dict[str, Any]:
    """The host, the packages and the commit, with a + if tracked files were edited."""
    command = 'git describe --always --dirty=+ --exclude="*" --abbrev=12'
    git = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or None,  # None: no repository or no git
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
    }


def file_sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
