"""Atomic writing: interrupted at any moment, a path has its old or its new content."""

import contextlib
import errno
import json
import os
import shutil

import pandas as pd
from safetensors import SafetensorError


@contextlib.contextmanager
def atomic_write(path):
    """Yield a binary file that replaces `path` if the block succeeds."""
    temporary = path.with_name(f"{path.name}.tmp")
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)  # or a full disk would stay full
            raise
        temporary.replace(path)
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(folder):
    """Yield an empty folder that replaces `folder` if the block succeeds.

    A folder cannot replace another in one step. Between the two renames only the `.old` folder
    exists, and `restore_folder` brings it back.
    """
    fresh, old = folder.with_name(f"{folder.name}.tmp"), folder.with_name(f"{folder.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with named_errors(folder):
        fresh.mkdir(parents=True)
        yield fresh
        for path in fresh.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(fresh)
        if folder.exists():
            folder.replace(old)
        fresh.replace(folder)
        sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(folder):
    """Undo an atomic_folder that was killed between its two renames."""
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        old.replace(folder)


@contextlib.contextmanager
def named_errors(path):
    """Raise errors of the disk as an OSError that names `path`; torch and safetensors hide it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise OSError(errno.EIO, str(cause), str(path)) from error


def sync_folder(folder):
    """Make a rename survive a power failure, where the system can sync folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_csv(path, records, columns=None):
    """Write records (or a frame); nothing if there are none."""
    if len(records):
        frame = pd.DataFrame(records, columns=columns)
        write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
