"""The committed pairs of verses: balanced, disjoint, and not to be classified by counting."""

import csv
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from datasets import read_pairs

DATA = Path(__file__).resolve().parent.parent / "data"
SIZES = {"train": 8000, "dev": 1000, "test": 1000}


def read(split):
    with open(DATA / f"verses-{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def splits():
    return {split: read(split) for split in SIZES}


def sentences(records):
    return [record[name] for record in records for name in ("sentence1", "sentence2")]


@pytest.mark.parametrize("split", SIZES)
def test_sizes_columns_and_labels(splits, split):
    """Ids are numbered, and half of the pairs are positive."""
    records, size = splits[split], SIZES[split]
    columns = ["id", "sentence1", "sentence2", "is_duplicate"]
    assert all(list(record) == columns for record in records)
    ids = [f"verse-{split}-{number:04}" for number in range(1, size + 1)]
    assert [record["id"] for record in records] == ids
    labels = Counter(record["is_duplicate"] for record in records)
    assert labels == {"1": size // 2, "0": size // 2}


@pytest.mark.parametrize("split", SIZES)
def test_sentences_are_complete(splits, split):
    """6 to 60 words with single spaces, without notes and headings; a pair has two sentences."""
    for text in sentences(splits[split]):
        assert 6 <= len(text.split()) <= 60
        assert text == " ".join(text.split())
        assert not re.search(r"crosswire|Psalm \d", text)
    assert all(record["sentence1"] != record["sentence2"] for record in splits[split])


def test_splits_share_no_text(splits):
    """No sentence of a split is in another one."""
    train, dev, test = (set(sentences(splits[split])) for split in SIZES)
    assert not train & dev
    assert not train & test
    assert not dev & test


@pytest.mark.parametrize("split", SIZES)
def test_each_first_sentence_is_in_both_classes_once(splits, split):
    """So the first sentence alone does not tell the label."""
    first = {"0": [], "1": []}
    for record in splits[split]:
        first[record["is_duplicate"]].append(record["sentence1"])
    assert sorted(first["0"]) == sorted(first["1"])
    assert len(set(first["1"])) == len(first["1"])


def test_counting_does_not_tell_the_label(monkeypatch, tmp_path):
    """On test, no similarity is correct for more than 65 %, and the regression for 72 %."""
    monkeypatch.syspath_prepend(DATA / "build")
    import baselines

    table = baselines.main([f"--out={tmp_path}"]).set_index("baseline")["test_accuracy"]
    assert table["majority class"] == 0.5
    assert table.iloc[1:-1].max() <= 0.65
    assert table.iloc[-1] <= 0.72
    committed = pd.read_csv(DATA.parent / "results" / "baselines-verses.csv", index_col="baseline")
    assert committed["test_accuracy"].to_dict() == pytest.approx(table.to_dict(), abs=0.01)


@pytest.mark.parametrize("split", SIZES)
def test_all_readers_agree(splits, split):
    """csv, pandas and read_pairs read the same records."""
    path = DATA / f"verses-{split}.csv"
    assert pd.read_csv(path, sep="\t").astype(str).to_dict("records") == splits[split]
    pairs = read_pairs(path)
    pairs["is_duplicate"] = pairs["label"].astype(int).astype(str)
    assert pairs[list(splits[split][0])].to_dict("records") == splits[split]
    assert pairs.index.tolist() == list(range(2, SIZES[split] + 2))
