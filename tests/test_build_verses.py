"""The builder of verse pairs on a synthetic Bible, and the baselines on easy pairs."""

import csv
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

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


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(BUILD)
    import baselines

    return baselines


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
    """Each first sentence has its own verse and another verse of the same book."""
    verses, bible = small
    verses.main([f"--out={tmp_path}"])
    numbers = {text: verse for texts in bible.values() for verse, text in texts.items()}
    for split, book in (("train", GENESIS), ("dev", JOB), ("test", PROVERBS)):
        pairs = read(tmp_path / f"verses-{split}.csv")
        assert [pair["id"] for pair in pairs][:2] == [f"verse-{split}-0001", f"verse-{split}-0002"]
        firsts = {"0": [], "1": []}
        for pair in pairs:
            first, second = numbers[pair["sentence1"]], numbers[pair["sentence2"]]
            assert first // 1_000_000 == second // 1_000_000 == book
            assert (first == second) == (pair["is_duplicate"] == "1")
            firsts[pair["is_duplicate"]].append(pair["sentence1"])
        assert len(set(firsts["1"])) == len(firsts["1"]) == SIZES[split, "old"]
        assert sorted(firsts["0"]) == sorted(firsts["1"])


def test_two_builds_are_equal(small, tmp_path):
    """The builder uses no random state but that of a split."""
    verses, _ = small
    for folder in ("a", "b"):
        verses.main([f"--out={tmp_path / folder}"])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_negatives_are_as_similar_as_positives(small):
    """No measure differs by more than the largest difference, and the cost is their sum."""
    verses, _ = small
    options = verses.book_options(GENESIS, set())
    assert options
    for option in options[:20]:
        first, same, other = option.texts
        measured = verses.measures([first], [same, other])[0]
        differences = np.abs(measured[0] - measured[1]) / verses.TOLERANCES
        assert differences.max() <= verses.LARGEST_DIFFERENCE
        assert differences.sum() == pytest.approx(option.cost, abs=1e-4)
        assert abs(option.verse - option.other) > 1


def test_filtering_reduces_what_the_regression_sees(small):
    """The regression of the unfiltered pairs separates the filtered ones less."""
    verses, _ = small
    options = [o for book in (GENESIS, JOB, PROVERBS) for o in verses.book_options(book, set())]
    before = verses.select(options, np.array([option.cost for option in options]))
    scores = dict(zip(options, verses.Scorer(options).differences(before, options), strict=True))
    after = verses.choose_pairs(options)
    assert np.abs([scores[o] for o in after]).mean() < np.abs([scores[o] for o in before]).mean()


def test_select_uses_a_verse_once(small):
    """A verse is in one negative pair; too few options are an error."""
    verses, _ = small
    options = [o for book in (GENESIS, JOB, PROVERBS) for o in verses.book_options(book, set())]
    chosen = verses.select(options, np.array([option.cost for option in options]))
    assert len({option.other for option in chosen}) == len(chosen) == sum(SIZES.values())
    with pytest.raises(ValueError, match="LARGEST_COST"):
        verses.select(options[:1], np.zeros(1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Selah. BOOK II Psalm 42 For the Chief Musician.", "Selah."),
        ("Blessed are they ( who walk ) in it . BETH", "Blessed are they (who walk) in it."),
    ],
)
def test_clean_removes_headings_and_stray_spaces(verses, text, expected):
    """Headings of Psalms and of letters are no part of a verse."""
    assert verses.clean(text) == expected


def test_jaccards_by_hand(verses, baselines):
    """All pairs of rows in the builder, the same rows in the baselines."""
    first, second = (
        csr_matrix([[1, 2, 1, 0], [0, 0, 0, 1]]),
        csr_matrix([[1, 1, 0, 0], [0, 0, 1, 3]]),
    )
    assert verses.jaccards_of(first, second) == pytest.approx(np.array([[2 / 3, 0.25], [0, 0.5]]))
    assert baselines.jaccard(first, second) == pytest.approx([2 / 3, 0.5])


@pytest.mark.parametrize(
    ("scores", "above"), [([0.1, 0.2, 0.6, 0.8], True), ([0.8, 0.6, 0.2, 0.1], False)]
)
def test_threshold_by_hand(baselines, scores, above):
    """Scores above 0.4 are those of one class, in either direction."""
    labels = np.array([0, 0, 1, 1])
    assert baselines.fit_threshold(np.array(scores), labels) == (pytest.approx(0.4), above)


def test_words_and_stems(baselines):
    """Punctuation, case and inflection disappear."""
    assert baselines.words("The Lord's lips.") == ["the", "lords", "lips"]
    assert baselines.cut_words("answered, Answers") == ["answ", "answ"]


def test_baselines_of_easy_pairs(baselines, tmp_path):
    """Repeated sentences are positive: similarities are always correct."""
    chance = random.Random(0)
    vocabulary = [f"{a}{b}{a}" for a in ("kal", "mer", "tos", "vin") for b in ("u", "i", "o")]
    paths = {}
    for split, count in (("train", 60), ("dev", 20), ("test", 20)):
        lines = ["\tid\tsentence1\tsentence2\tis_duplicate"]  # the index column of Quora's files
        for number in range(count):
            first, other = (" ".join(chance.sample(vocabulary, 4)) for _ in range(2))
            label = number % 2
            lines.append(
                f"{number}\t{split}{number}\t{first}\t{first if label else other}\t{label}.0"
            )
        paths[split] = tmp_path / f"{split}.csv"
        paths[split].write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = [f"--{split}={path}" for split, path in paths.items()]
    baselines.main([*files, "--name=easy", f"--out={tmp_path}"])
    table = pd.read_csv(tmp_path / "baselines-easy.csv", index_col="baseline")
    assert list(table) == ["dev_accuracy", "test_accuracy"]
    assert len(table) == 8
    assert table.loc["majority class"].tolist() == [0.5, 0.5]
    assert (table.iloc[1:-1] == 1).all(axis=None)
    assert (table.iloc[-1] >= 0.9).all()
