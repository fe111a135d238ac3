"""The folder of a run: its settings, the resume state, the best model and the results."""

import contextlib
import importlib.metadata
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from config import ROOT, InputError

PACKAGES = ("torch", "transformers", "numpy", "pandas", "safetensors", "sacrebleu")
# Data files; they and the model are compared by their contents.
FILE_OPTIONS = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
FILE_OPTIONS += ("para_train", "para_dev", "para_test")
OUTPUT_OPTIONS = ("sonnet_out", "para_dev_out", "para_test_out")
# What does not change what is trained, or is compared in another way
NOT_COMPARED = {"out_dir", "resume", "model_size", "device", "gradient_checkpointing"}
NOT_COMPARED |= {*FILE_OPTIONS, *OUTPUT_OPTIONS}
locks = []  # kept alive, so that they are released when the process ends


def open_run(task: str, name: str, settings: dict[str, Any]) -> Path:
    """Lock runs/<task>/<name>, or --out_dir, and write config.json; returns the folder.

    `settings` are all options, and what else a result depends on. A resumed run must have the same;
    `resumed` lists the commits that it had before. Raises InputError for a folder with another run,
    or one that another process is writing.
    """
    named = settings["out_dir"]
    folder = Path(named) if named else choose_folder(Path("runs", task, name), settings["resume"])
    lock(folder)
    for leftover in folder.glob(".unfinished-*"):  # of a process that was killed
        shutil.rmtree(leftover)
    path = folder / "config.json"
    now = environment()
    config = json.loads(json.dumps(settings | now))
    if path.exists():
        old = json.loads(path.read_text("utf-8"))
        if not settings["resume"]:
            raise InputError(f"{folder} holds a run: --resume it, or name another --out_dir")
        for key in settings:
            if key not in NOT_COMPARED and old.get(key) != config[key]:
                values = f"{old.get(key)}, not {config[key]}"
                raise InputError(f"{folder} has another {key} ({values}): cannot resume it")
        if any(old[key] != value for key, value in now.items()):
            print("note: resumed with other code or packages")
        config["resumed"] = [*old.get("resumed", []), old["commit"]]
    elif (folder / "best").exists():
        raise InputError(f"{folder}/best is not of a run; name another --out_dir")
    write_json(path, config)
    return folder


def choose_folder(first: Path, resume: bool) -> Path:
    """The first free one of NAME, NAME-2, ...; to resume, the last one that holds a run."""
    folders = [first]
    while (folders[-1] / "config.json").exists():
        folders.append(first.with_name(f"{first.name}-{len(folders) + 1}"))
    return folders[-2] if resume and len(folders) > 1 else folders[-1]


def lock(folder: Path) -> None:
    """Make and lock a run's folder until this process ends; raises InputError if it cannot."""
    try:  # one process may lock it twice
        locks.append(FileLock(folder / ".lock", is_singleton=True).acquire(timeout=0))
    except OSError as error:
        raise InputError(f"{folder} is a file, or another process writes it ({error})") from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file or folder replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as folder:
        fresh = Path(folder, path.name)
        yield fresh
        if fresh.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        fresh.replace(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with atomic_path(Path(path)) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path: Path, records: list[dict[str, Any]] | pd.DataFrame) -> None:
    write_text(path, pd.DataFrame(records).to_csv(index=False, lineterminator="\n"))


def environment() -> dict[str, Any]:
    """The packages and the commit, with a + if code was edited; None without git."""
    command = 'git rev-parse --short=12 HEAD && (git diff --quiet HEAD -- "*.py" || echo +)'
    git = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    packages = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"commit": "".join(git.stdout.split()) or None, "packages": packages}
