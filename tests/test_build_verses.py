"""The builder of verse pairs on a synthetic Bible."""

import csv
import random
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parent.parent / "data" / "build"
GENESIS, JOB, PROVERBS = 1, 18, 20
SIZES = {("train", "old"): 8, ("dev", "old"): 4, ("test", "old"): 4}


@pytest.fixture
def verses(monkeypatch):
    monkeypatch.syspath_prepend(BUILD)
    import verses

    verses.usable.cache_clear()
    verses.vectorizers.cache_clear()
    yield verses
    verses.usable.cache_clear()
    verses.vectorizers.cache_clear()


def synthetic_bible():
    """Two translations with the same word for every third concept, and 60 verses per book."""
    chance = random.Random(0)
    syllables = ["ba", "do", "ki", "lu", "me", "no", "pa", "ri", "su", "te", "va", "zo"]
    bible = {"kjv": {}, "web": {}}
    shared, kjv, web = (
        ["".join(chance.choices(syllables, k=4)) for _ in range(60)] for _ in range(3)
    )
    for book in (GENESIS, JOB, PROVERBS):
        for number in range(1, 61):
            concepts = chance.sample(range(60), 9)
            for name, own in (("kjv", kjv), ("web", web)):
                text = [shared[c] if c % 3 == 0 else own[c] for c in concepts]
                bible[name][book * 1_000_000 + 1000 + number] = " ".join(text).capitalize() + "."
    return bible


@pytest.fixture
def small(verses, monkeypatch):
    """The builder with a synthetic Bible."""
    bible = synthetic_bible()
    monkeypatch.setattr(verses, "read_translation", lambda name: bible[name])
    monkeypatch.setattr(verses, "NAMES", ("kjv", "web"))
    monkeypatch.setattr(verses, "REFERENCES", ("kjv", "web"))
    monkeypatch.setattr(verses, "TRANSLATION_PAIRS", {"old": ("kjv web",)})
    monkeypatch.setattr(verses, "SIZES", SIZES)
    monkeypatch.setattr(verses, "SAME", 0.5)
    return verses, bible


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_pairs_of_a_synthetic_bible(small, tmp_path):
    """Each first sentence has its own verse and another of the same book; two builds are equal."""
    verses, bible = small
    verses.main([f"--out={tmp_path}"])
    verses.main([f"--out={tmp_path / 'again'}"])
    numbers = {text: verse for texts in bible.values() for verse, text in texts.items()}
    for split, book in (("train", GENESIS), ("dev", JOB), ("test", PROVERBS)):
        path = tmp_path / f"verses-{split}.csv"
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        pairs = read(path)
        assert [pair["id"] for pair in pairs][:2] == [f"verse-{split}-0001", f"verse-{split}-0002"]
        firsts = {"0": [], "1": []}
        for pair in pairs:
            first, second = numbers[pair["sentence1"]], numbers[pair["sentence2"]]
            assert first // 1_000_000 == second // 1_000_000 == book
            assert (first == second) == (pair["is_duplicate"] == "1")
            firsts[pair["is_duplicate"]].append(pair["sentence1"])
        assert len(set(firsts["1"])) == len(firsts["1"]) == SIZES[split, "old"]
        assert sorted(firsts["0"]) == sorted(firsts["1"])
        negatives = {pair["sentence2"] for pair in pairs if pair["is_duplicate"] == "0"}
        assert len(negatives) == SIZES[split, "old"]
