"""The committed pairs of verses: balanced, disjoint, and not to be classified by counting."""

import csv
import io
import math
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
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


@pytest.fixture
def build_verses(monkeypatch):
    monkeypatch.syspath_prepend(DATA)
    import build_verses

    return build_verses


def sentences(records):
    return [record[name] for record in records for name in ("sentence1", "sentence2")]


def jaccard(record):
    first, second = (set(text.lower().split()) for text in sentences([record]))
    return len(first & second) / len(first | second)


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


@pytest.mark.parametrize("split", SIZES)
def test_order_does_not_tell_the_label(splits, split):
    """A pair has the label of its predecessor about half of the time."""
    records = splits[split]
    same = sum(a["is_duplicate"] == b["is_duplicate"] for a, b in pairwise(records))
    assert abs(same / (len(records) - 1) - 0.5) < 0.06


@pytest.mark.parametrize("split", ["dev", "test"])
def test_word_overlap_does_not_tell_the_label(splits, split):
    """The best threshold on the Jaccard index is correct for at most 58 %."""
    overlaps = [jaccard(record) for record in splits[split]]
    labels = [record["is_duplicate"] == "1" for record in splits[split]]
    pairs = list(zip(overlaps, labels, strict=True))
    best = max(sum((overlap > t / 50) == label for overlap, label in pairs) for t in range(51))
    assert best / len(labels) <= 0.58


@pytest.mark.parametrize("split", SIZES)
def test_all_readers_agree(splits, split):
    """csv, pandas and read_pairs read the same records."""
    path = DATA / f"verses-{split}.csv"
    assert pd.read_csv(path, sep="\t").astype(str).to_dict("records") == splits[split]
    pairs = read_pairs(path)
    pairs["is_duplicate"] = pairs["label"].astype(int).astype(str)
    assert pairs[list(splits[split][0])].to_dict("records") == splits[split]
    assert pairs["line"].tolist() == list(range(2, SIZES[split] + 2))


@pytest.mark.parametrize("split", SIZES)
def test_line_ends(split):
    """Only newlines, one per record and one for the header."""
    content = (DATA / f"verses-{split}.csv").read_bytes()
    assert b"\r" not in content
    assert content.count(b"\n") == SIZES[split] + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Selah. BOOK II Psalm 42 For the Chief Musician.", "Selah."),
        ("Blessed are they ( who walk ) in it . BETH", "Blessed are they (who walk) in it."),
    ],
)
def test_clean_removes_headings_and_stray_spaces(build_verses, text, expected):
    """Headings of Psalms and of letters are no part of a verse."""
    assert build_verses.clean(text) == expected


def test_likenesses_by_hand(build_verses):
    """Jaccard indices ignore case; lengths are compared by the logarithm of their ratio."""
    overlap = build_verses.jaccards(["a b c", "d"], ["A b", "x y d d"])
    assert overlap == pytest.approx(np.array([[2 / 3, 0], [0, 1 / 3]]))
    measures = build_verses.likenesses(overlap, overlap, ["a b", "a"], ["a", "a b"])
    assert measures[:, :, 2] == pytest.approx(np.array([[math.log(2), 0], [0, -math.log(2)]]))


def test_tables_are_csv(build_verses):
    """Quotes and tabs survive."""
    texts = ('"Go," he said', "a\ttab")
    pair = build_verses.Pair(*texts, 1, (1, 1), ("kjv", "ylt"), (0.0, 0.0, 0.0))
    table = io.StringIO(build_verses.table("dev", [pair]))
    assert list(csv.reader(table, delimiter="\t")) == [
        ["id", "sentence1", "sentence2", "is_duplicate"],
        ["verse-dev-0001", *texts, "1"],
    ]


def test_choose_balances_the_classes(build_verses, monkeypatch):
    """A verse is the second one of at most one negative pair; too few verses are an error."""
    texts = {verse: f"text {verse}" for verse in range(6)}
    monkeypatch.setattr(build_verses, "usable", lambda name: texts)
    monkeypatch.setattr(build_verses, "LARGEST_SHARE", 1)
    like = (0.2, 0.1, 0.0)
    anchors = []
    for verse in range(6):
        others = [((verse + 1) % 6, like), ((verse + 2) % 6, (0.15, 0.1, 0.0))]
        anchors.append(build_verses.Anchor(verse, ("kjv", "ylt"), like, others))
    pairs = build_verses.choose(anchors, 8, 1, {}, random.Random(0))
    assert [pair.label for pair in pairs] == [1, 0] * 4
    assert all((pair.verses[0] == pair.verses[1]) == pair.label for pair in pairs)
    assert len({pair.verses[1] for pair in pairs if not pair.label}) == 4
    with pytest.raises(ValueError, match="TOLERANCE"):
        build_verses.choose(anchors, 14, 1, {}, random.Random(0))
