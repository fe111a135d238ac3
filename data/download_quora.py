"""Write data/quora-{train,dev,test-student}.csv, in the course's format, from GLUE's archive.

    python data/download_quora.py      # --source FILE reads an archive that is already here

The file of a pair depends only on its two texts, so the same pair of texts is never in two files.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import os
import sys
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from cli import HelpFormatter, exit_cleanly
from config import InputError

SOURCE = "https://dl.fbaipublicfiles.com/glue/data/QQP-clean.zip"
MEMBERS = ("QQP/train.tsv", "QQP/dev.tsv")  # GLUE's own test set has no labels
HEADER = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
COLUMNS = ["", "id", "sentence1", "sentence2", "is_duplicate"]  # the first is an index
SHARES = (("train", 0.7), ("dev", 0.1), ("test-student", 0.2))  # of the course's 404,298 pairs
LABELS = {"0": "0.0", "1": "1.0"}
MOST_LINES = 20  # of a record whose questions contain line breaks
READ_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    RuntimeError,
    zlib.error,
)  # Runtime: encrypted
SHOWN = 5  # line numbers that are printed per reason for dropping
LICENCE = (
    "The text is Quora's: for non-commercial use, under Quora's terms of service, not this "
    "repository's licence."
)


def blocks(url: str) -> Iterator[bytes]:
    """Yield the contents of an address, with a progress bar.

    Raises InputError for an error or an incomplete download.
    """
    way_out = "try again, or download the archive by other means and give the file as --source"
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            settings = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
            with tqdm(total=total, desc="downloading", **settings) as bar:
                while block := response.read(1 << 16):
                    received += len(block)
                    bar.update(len(block))
                    yield block
    except (OSError, HTTPException, ValueError) as error:
        reason = str(error).strip("<>")
        raise InputError(f"{url} cannot be downloaded ({reason}); {way_out}") from error
    if total not in (None, received):
        raise InputError(f"{url} ended after {received:,} of {total:,} bytes; {way_out}")


@contextlib.contextmanager
def atomic_files(paths: list[Path], mode: str, **settings):
    """Yield an open file for each path; they replace all paths, or none after an error."""
    temporaries = [path.with_name(f"{path.stem}.partial{path.suffix}") for path in paths]
    with contextlib.ExitStack() as stack:
        for path in temporaries:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(path.unlink, missing_ok=True)
        files = [stack.enter_context(open(path, mode, **settings)) for path in temporaries]
        yield files
        for file in files:
            file.close()
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)


def locate(source: str, cache: Path) -> tuple[Path, str]:
    """The archive's path and the way out if it is bad; an address is downloaded to `cache` once."""
    if not source.lower().startswith(("http://", "https://")):
        way_out = f"give GLUE's QQP archive as --source, or leave that out to download {SOURCE}"
        return Path(source), way_out
    digest = hashlib.sha256(source.encode()).hexdigest()  # one archive per address
    path = cache / f"quora-{digest[:12]}.zip"
    if path.is_file():
        print(f"using {path}, downloaded before")
    else:
        with atomic_files([path], "wb") as (file,):
            for block in blocks(source):
                file.write(block)
    return path, "delete it and run again to download it anew"


def read_lines(archive: Path, way_out: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each member's name and its lines below the header.

    Raises InputError for any other kind of file.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            for name in sorted(set(MEMBERS) - set(file.namelist())):
                raise InputError(f"{archive} contains no {name}; {way_out}")
            for name in MEMBERS:
                with io.TextIOWrapper(file.open(name), encoding="utf-8-sig", newline="\n") as text:
                    header, *lines = [line.rstrip("\r\n") for line in text] or [""]
                if header.split("\t") != HEADER:
                    raise InputError(
                        f"{archive}: {name} begins with {header[:80]!r}, not {HEADER}; {way_out}"
                    )
                yield name, lines
    except UnicodeDecodeError as error:
        raise InputError(f"{archive}: {name} is not UTF-8 ({error.reason}); {way_out}") from error
    except READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        problem = f"cannot be read as a zip archive ({reason})"
        raise InputError(f"{archive} {problem}; {way_out}") from error


def parse(text: str) -> list[str] | None:
    """The six fields of a record, as CSV or else with quotes as characters; None if not six."""
    try:
        fields = next(csv.reader([text], delimiter="\t", strict=True))
    except csv.Error:
        fields = []
    if len(fields) != len(HEADER) and "\n" not in text:
        fields = text.split("\t")
    return fields if len(fields) == len(HEADER) else None


def parse_records(lines: list[str]) -> Iterator[tuple[int, list[str] | None]]:
    """Yield the line number and fields of each record; None for a line that is not in a record.

    An open quote only affects its own record. A record continues in the following lines if they
    complete it and are not records themselves.
    """
    start = 0
    while start < len(lines):
        fields, end = parse(lines[start]), start + 1
        while (
            fields is None
            and end < min(start + MOST_LINES, len(lines))
            and parse(lines[end]) is None
        ):
            end += 1
            fields = parse("\n".join(lines[start:end]))
        yield start + 2, fields
        start = end if fields else start + 1


def clean(text: str) -> str:
    """The text as one line: tabs and line breaks become spaces."""
    return " ".join(text.replace("\t", " ").replace("\0", " ").splitlines()).strip()


def split_of(first: str, second: str) -> str:
    """The file of a pair of texts, which does not depend on their order, case and white space."""
    key = "\n".join(sorted(" ".join(text.casefold().split()) for text in (first, second)))
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    for name, share in SHARES[:-1]:
        if point < share:
            return name
        point -= share
    return SHARES[-1][0]


def read_pairs(
    members: Iterable[tuple[str, list[str]]], dropped: dict[str, list[str]]
) -> Iterator[tuple]:
    """Yield (id, question, question, label); `dropped` receives the places of other records."""
    seen = set()
    for name, lines in members:
        for number, fields in parse_records(lines):
            record = [clean(field) for field in fields or [""] * len(HEADER)]
            identity, _, _, first, second, label = record
            faults = {
                "without six fields": fields is None,
                "without an id": not identity,
                "with an empty question": not (first and second),
                "with a label other than 0 and 1": label not in LABELS,
                "with the id of a record above": identity in seen,
            }
            fault = next((fault for fault, applies in faults.items() if applies), None)
            if fault:
                dropped[fault].append(f"{name}:{number}")
                continue
            seen.add(identity)
            yield identity, first, second, label


def write_splits(pairs: Iterable[tuple], paths: dict[str, Path]) -> dict[str, Counter]:
    """Write the three files, all or none; returns each one's counts of labels.

    Raises InputError if there is no pair.
    """
    counts = {split: Counter() for split in paths}
    with atomic_files(list(paths.values()), "w", encoding="utf-8", newline="") as files:
        writers = {
            split: csv.writer(file, delimiter="\t", lineterminator="\n")
            for split, file in zip(paths, files, strict=True)
        }
        # Test pairs have no labels.
        widths = {split: 4 if split == "test-student" else 5 for split in paths}
        for split, writer in writers.items():
            writer.writerow(COLUMNS[: widths[split]])
        for identity, first, second, label in pairs:
            split = split_of(first, second)
            record = [counts[split].total(), identity, first, second, LABELS[label]]
            writers[split].writerow(record[: widths[split]])
            counts[split][label] += 1
        if not any(counts.values()):
            raise InputError("the archive contains no question pair; give another as --source")
    return counts


def main() -> None:
    """Download, split and write; print what was written and what was dropped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--source", default=SOURCE, help="GLUE's QQP archive: a file or an http(s) address"
    )
    text = "folder of the three files; downloads go to cache/ in it (default: data/)"
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help=text)
    options = parser.parse_args()

    dropped = defaultdict(list)
    paths = {split: options.out / f"quora-{split}.csv" for split, _ in SHARES}
    archive, way_out = locate(options.source, options.out / "cache")
    counts = write_splits(read_pairs(read_lines(archive, way_out), dropped), paths)
    for split, path in paths.items():
        total = counts[split].total()
        share = f"{counts[split]['1'] / max(total, 1):.1%} duplicates"
        labels = "no labels" if split == "test-student" else share
        print(f"{path}: {total:,} pairs, {labels}")
    print(f"dropped: {sum(map(len, dropped.values())):,} records")
    for fault, places in dropped.items():
        more = ", ..." if len(places) > SHOWN else ""
        print(f"  {len(places):,} {fault}: {', '.join(places[:SHOWN])}{more}")
    print(LICENCE)


if __name__ == "__main__":
    with exit_cleanly():
        main()
