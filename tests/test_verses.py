"""The committed verse pairs: balanced, apart, and not to be told by counting; no test builds them anew."""

import csv
import io
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

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


def jaccard(row):
    first, second = (set(row[name].lower().split()) for name in ("sentence1", "sentence2"))
    return len(first & second) / len(first | second)


def test_sizes_columns_and_labels(splits):
    for split, rows in splits.items():
        assert len(rows) == SIZES[split]
        assert all(list(row) == ["id", "sentence1", "sentence2", "is_duplicate"] for row in rows)
        assert [row["id"] for row in rows] == [f"verse-{split}-{number:04}" for number in range(1, len(rows) + 1)]
        assert Counter(row["is_duplicate"] for row in rows) == {"1": len(rows) // 2, "0": len(rows) // 2}


def test_sentences_are_whole(splits):
    texts = [row[name] for rows in splits.values() for row in rows for name in ("sentence1", "sentence2")]
    assert all(6 <= len(text.split()) <= 60 and text == " ".join(text.split()) for text in texts)
    assert not [text for text in texts if re.search(r"crosswire|Psalm \d", text)]


def test_no_pair_repeats_a_sentence(splits):
    assert all(row["sentence1"] != row["sentence2"] for rows in splits.values() for row in rows)


def test_splits_share_no_text(splits):
    texts = {
        split: {row[name] for row in rows for name in ("sentence1", "sentence2")} for split, rows in splits.items()
    }
    assert not texts["train"] & texts["dev"]
    assert not texts["train"] & texts["test"]
    assert not texts["dev"] & texts["test"]


def test_each_first_sentence_stands_once_in_either_class(splits):
    for rows in splits.values():
        first = {label: [row["sentence1"] for row in rows if row["is_duplicate"] == label] for label in "01"}
        assert sorted(first["0"]) == sorted(first["1"])
        assert len(set(first["1"])) == len(first["1"])


def test_order_does_not_tell_the_label(splits):
    for rows in splits.values():
        follows = sum(a["is_duplicate"] == b["is_duplicate"] for a, b in pairwise(rows))
        assert abs(follows / (len(rows) - 1) - 0.5) < 0.06


@pytest.mark.parametrize("split", ["dev", "test"])
def test_word_overlap_does_not_tell_the_label(splits, split):
    scores, gold = [jaccard(row) for row in splits[split]], [row["is_duplicate"] == "1" for row in splits[split]]
    best = max(sum((score > t / 50) == label for score, label in zip(scores, gold, strict=True)) for t in range(51))
    assert best / len(gold) <= 0.58


@pytest.mark.parametrize("split", SIZES)
def test_csv_and_pandas_read_the_same(splits, split):
    import pandas
    frame = pandas.read_csv(DATA / f"verses-{split}.csv", sep="\t")
    assert frame.astype(str).to_dict("records") == splits[split]


@pytest.mark.parametrize("split", SIZES)
def test_files_have_plain_line_ends(split):
    content = (DATA / f"verses-{split}.csv").read_bytes()
    assert b"\r" not in content
    assert content.count(b"\n") == SIZES[split] + 1


def test_clean_drops_headings_and_stray_spaces(build_verses):
    assert build_verses.clean("Selah. BOOK II Psalm 42 For the Chief Musician.") == "Selah."
    assert build_verses.clean("Blessed are they ( who walk ) in it . BETH") == "Blessed are they (who walk) in it."


def test_likenesses_of_small_texts(build_verses):
    overlap = build_verses.jaccards(["a b c", "d"], ["A b", "x y d d"])
    assert overlap.tolist() == [[pytest.approx(2 / 3), 0], [0, pytest.approx(1 / 3)]]
    measures = build_verses.likenesses(overlap, overlap, ["a b", "a"], ["a", "a b"])
    assert measures[:, :, 2].tolist() == [[pytest.approx(0.6931, abs=1e-4), 0], [0, pytest.approx(-0.6931, abs=1e-4)]]


def test_table_reads_back_with_quotes(build_verses):
    pair = build_verses.Pair('"Go," he said', "a\ttab", 1, (1, 1), ("kjv", "ylt"), (0.0, 0.0, 0.0))
    rows = list(csv.DictReader(io.StringIO(build_verses.table("dev", [pair])), delimiter="\t"))
    assert rows == [{"id": "verse-dev-0001", "sentence1": pair.sentence1, "sentence2": "a\ttab", "is_duplicate": "1"}]


def test_choose_balances_and_says_what_is_missing(build_verses, monkeypatch):
    monkeypatch.setattr(build_verses, "usable", lambda name: {verse: f"{name} {verse}" for verse in range(6)})
    monkeypatch.setattr(build_verses, "LARGEST_SHARE", 1)
    like = (0.2, 0.1, 0.0)
    anchors = [
        build_verses.Anchor(v, ("kjv", "ylt"), like, [((v + 1) % 6, like), ((v + 2) % 6, (0.15, 0.1, 0.0))])
        for v in range(6)
    ]
    pairs = build_verses.choose(anchors, 8, 1, {}, random.Random(0))
    assert [pair.label for pair in pairs] == [1, 0] * 4
    assert all((pair.verses[0] == pair.verses[1]) == pair.label for pair in pairs)
    assert len({pair.verses[1] for pair in pairs if not pair.label}) == 4
    with pytest.raises(ValueError, match="TOLERANCE"):
        build_verses.choose(anchors, 14, 1, {}, random.Random(0))
