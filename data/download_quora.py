"""Write data/quora-{train,dev,test-student}.csv, in the course's format, from GLUE's archive.

    python data/download_quora.py              # 70, 10 and 20 % of all pairs, test without labels
    python data/download_quora.py --small      # 14,000, 2,000 and 2,000 pairs, all with labels

The full split of a pair depends only on its two texts.
"""

import argparse
import csv
import hashlib
import sys
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path
from zipfile import BadZipFile, ZipFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd

from config import ROOT, InputError

SOURCE = "https://dl.fbaipublicfiles.com/glue/data/QQP-clean.zip"
ARCHIVE = ROOT / "data" / "cache" / "QQP-clean.zip"
MEMBERS = ("QQP/train.tsv", "QQP/dev.tsv")  # GLUE's own test set has no labels
HEADER = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
SMALL_TRAIN, SMALL_DEV, SMALL_TEST = 14_000, 2_000, 2_000
SMALL_HELP = (
    f"{SMALL_TRAIN:,} / {SMALL_DEV:,} / {SMALL_TEST:,} pairs, all with labels: the first of the "
    "full train file, the first of the full dev file, and the last of the full train file as test"
)
WAY_OUT = "give GLUE's QQP archive as --source"
LICENCE = (
    "The text is Quora's: for non-commercial use, under Quora's terms of service, not this "
    "repository's licence."
)


def download() -> Path:
    """Return the path of the archive in data/cache, where it is downloaded once.

    Raises InputError if the download fails or is incomplete.
    """
    if ARCHIVE.is_file():
        print(f"using {ARCHIVE}; delete it to download it again")
        return ARCHIVE
    print(f"downloading {SOURCE}")
    try:
        with urllib.request.urlopen(SOURCE, timeout=30) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        raise InputError(
            f"{SOURCE} cannot be downloaded ({error}); try again, or {WAY_OUT}"
        ) from error
    ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
    ARCHIVE.write_bytes(content)
    return ARCHIVE


def read_lines(archive: Path) -> list[str]:
    """Return the lines of both members of the archive, without their headers.

    Raises InputError for any other kind of file.
    """
    lines = []
    try:
        with ZipFile(archive) as file:
            for name in MEMBERS:
                text = file.read(name).decode("utf-8-sig").replace("\r\n", "\n")
                header, *rest = text.removesuffix("\n").split("\n")
                if header.split("\t") != HEADER:
                    raise ValueError(f"{name} begins with {header[:80]!r}")
                lines += rest
    except (BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, ValueError) as error:
        advice = f"delete a damaged download, or {WAY_OUT}"
        raise InputError(f"{archive} is not GLUE's QQP archive ({error}); {advice}") from error
    return lines


def parse(line: str) -> list[str]:
    """Return a line's fields: as CSV if that gives six, else with quotes as ordinary characters."""
    try:
        fields = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        fields = []
    return fields if len(fields) == len(HEADER) else line.split("\t")


def pair_key(first: str, second: str) -> str:
    """Join two texts into one that does not depend on their order, case and white space."""
    return "\n".join(sorted(" ".join(text.casefold().split()) for text in (first, second)))


def split_of(key: str) -> str:
    """Return the split of a pair by a hash of its texts, with the shares of the course.

    These are 70 % train, 10 % dev and 20 % test.
    """
    fraction = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    if fraction < 0.7:
        return "train"
    if fraction < 0.8:
        return "dev"
    return "test-student"


def to_pairs(lines: list[str]) -> pd.DataFrame:
    """Return the pairs as a table with `id`, `sentence1`, `sentence2`, `is_duplicate` and `key`.

    Lines without six fields, an id, two questions and a label are left out. Of lines with the same
    id or the same two texts, the first is kept.
    """
    records = [fields for fields in map(parse, lines) if len(fields) == len(HEADER)]
    pairs = pd.DataFrame(records, columns=HEADER, dtype=str).drop(columns=["qid1", "qid2"])
    pairs = pairs.set_axis(["id", "sentence1", "sentence2", "is_duplicate"], axis="columns")
    pairs = pairs.replace(r"[\0\t\r]", " ", regex=True)
    pairs = pairs.apply(lambda column: column.str.strip())
    is_usable = pairs.ne("").all(axis="columns") & pairs["is_duplicate"].isin(["0", "1"])
    pairs = pairs[is_usable].astype({"is_duplicate": float})
    pairs["key"] = list(map(pair_key, pairs["sentence1"], pairs["sentence2"]))
    return pairs.drop_duplicates("id").drop_duplicates("key")


def small_splits(train: pd.DataFrame, dev: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the three tables of --small, taken from the full train and dev tables."""
    if len(train) < SMALL_TRAIN + SMALL_TEST or len(dev) < SMALL_DEV:
        found = f"{len(train):,} pairs in train and {len(dev):,} in dev"
        raise InputError(f"{found} are too few for --small; {WAY_OUT}")
    return {
        "train": train.head(SMALL_TRAIN),
        "dev": dev.head(SMALL_DEV),
        "test-student": train.tail(SMALL_TEST),
    }


def write(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write a file for each table."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in tables.items():
        path = folder / f"quora-{split}.csv"
        table.reset_index(drop=True).to_csv(path, sep="\t", lineterminator="\n")
        labels = "no labels"
        if "is_duplicate" in table:
            labels = f"{table['is_duplicate'].mean():.1%} duplicates"
        print(f"{path}: {len(table):,} pairs, {labels}")


def main(argv: list[str] | None = None) -> None:
    """Download, split and write; print what was written and what was dropped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="GLUE's QQP archive; default: download it")
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="folder (default: data/)")
    parser.add_argument("--small", action="store_true", help=SMALL_HELP)
    options = parser.parse_args(argv)

    lines = read_lines(options.source or download())
    pairs = to_pairs(lines)
    if pairs.empty:
        raise InputError(f"the archive contains no question pair; {WAY_OUT}")
    splits = pairs.pop("key").map(split_of)
    tables = {split: pairs[splits == split] for split in ("train", "dev", "test-student")}
    if options.small:
        tables = small_splits(tables["train"], tables["dev"])
    else:
        tables["test-student"] = tables["test-student"].drop(columns="is_duplicate")
    write(tables, options.out)
    print(f"left out: {len(lines) - len(pairs):,} lines that are not complete or repeat a pair")
    print(LICENCE)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
