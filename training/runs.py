"""The folder of a run: its settings, the resume state, the best model and the results."""

import contextlib
import errno
import hashlib
import importlib.metadata
import itertools
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
# Other options that do not change what is trained
NOT_COMPARED = {"out_dir", "resume", "model_size", "device", "use_gpu", "checkpoint_every"}
NOT_COMPARED |= {"gradient_checkpointing", "dtype", "sonnet_out", "para_dev_out", "para_test_out"}
NOT_COMPARED |= set(FILE_OPTIONS)
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
        self.config = config
        self.title = name  # for the screen and plots
        self.summary: dict[str, Any] = {}  # the first entries of summary.json

    def choose_folder(self, parent: Path, name: str, out_dir: str | None) -> Path:
        """--out_dir, or the first free name of name, name-2, ...; --resume: the last used one."""
        if out_dir:
            return Path(out_dir)
        names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
        used = list(itertools.takewhile(lambda n: (parent / n / "config.json").exists(), names))
        if self.resume and used:
            return parent / used[-1]
        return parent / (f"{name}-{len(used) + 1}" if used else name)

    def continued(self, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """The config.json of a resumed run; raises InputError if it is another run.

        Other code or packages are noted.
        """
        if not self.resume:
            raise InputError(f"{self.folder} holds a run: --resume it, or name another --out_dir")
        now = environment()
        for name in (old.keys() | new.keys()) - now.keys() - {"options", "resumed"}:
            if old.get(name) != new.get(name):
                shown = f"{old.get(name)}, not {new.get(name)}"
                raise InputError(f"{self.folder} has another {name} ({shown}): cannot resume it")
        for name, value in new["options"].items():
            if name not in NOT_COMPARED and old["options"].get(name) != value:
                shown = f"{old['options'].get(name)}, not {value}"
                raise InputError(f"{self.folder} has --{name} {shown}: resume with the same")
        changed = {name: value for name, value in now.items() if old.get(name) != value}
        if changed:
            print(f"note: resumed with another {', '.join(changed)}")
            old["resumed"] = [*old.get("resumed", []), changed]
        return old

    @property
    def best(self) -> Path:
        """The folder of the best model."""
        return self.folder / "best"

    @property
    def shown(self) -> Path:
        """The folder for the screen: relative to the project if it is inside."""
        path = self.folder.resolve()
        return path.relative_to(ROOT) if path.is_relative_to(ROOT) else self.folder

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
            raise InputError(
                f"{path} cannot be read ({error!r}); delete it to start over"
            ) from error


def lock(folder: Path) -> None:
    """Lock a run until this process ends; raises InputError if another process has the lock."""
    path = folder.resolve() / ".lock"
    run_lock = FileLock(path, is_singleton=True)  # one process may lock it twice
    try:
        locks.append(run_lock.acquire(timeout=0))
    except Timeout:
        config = folder / "config.json"
        host = json.loads(config.read_text("utf-8")).get("host") if config.exists() else "unknown"
        raise InputError(
            f"{path} is locked by a process on the host {host}, which writes this run: wait for it"
        ) from None
    except (OSError, NotImplementedError) as error:
        no_locks = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
        if isinstance(error, OSError) and error.errno not in no_locks:
            raise
        print(f"note: this disk has no locks; do not start two runs in {folder}")


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
    command = "git describe --always --dirty=+ --exclude=* --abbrev=12"
    commit = None
    with contextlib.suppress(OSError):  # there is no git
        result = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True)
        commit = result.stdout.strip() or None
    return {
        "commit": commit,
        "packages": {package: importlib.metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "host": socket.gethostname(),
    }


def file_sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
