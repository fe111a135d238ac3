"""Write data/verses-{train,dev,test}.csv: are two sentences translations of the same Bible verse?

    python data/build/verses.py

A positive pair is one verse in two translations. A negative pair has the same first sentence and
a verse of the same book that shares about as many words, stems and characters with it. Among the
possible negatives, those are chosen that a regression on character n-grams scores like the
positive (adversarial filtering: Zellers et al. 2018, https://arxiv.org/abs/1808.05326).
"""

import argparse
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sparse
from baselines import ANALYZERS, CHARACTERS, cut_words, regression_features, words
from bibles import HELD_OUT, book_of, read_translation
from packages import DATA, write_text
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

# The number of first sentences per split and Testament; each makes a positive and a negative pair.
SIZES = {
    ("train", "old"): 1600,
    ("train", "new"): 2400,
    ("dev", "old"): 250,
    ("dev", "new"): 250,
    ("test", "old"): 250,
    ("test", "new"): 250,
}
USES = {"train": 2, "dev": 1, "test": 1}  # first sentences of a verse, in different translations
MATTHEW = 40
# Translations that differ; kjv, asv, dar and rwebster nearly repeat each other.
TRANSLATION_PAIRS = {
    "old": ("kjv ylt", "web ylt", "asv ylt", "dar ylt", "kjv web", "dar web"),
    "new": (
        *("kjv wmth", "kjv mont", "kjv oeb", "web wmth", "web mont", "web oeb"),
        *("ylt wmth", "ylt mont", "ylt oeb", "dar wmth", "dar mont", "dar oeb"),
        *("wmth mont", "wmth oeb", "mont oeb"),
    ),
}
NAMES = ("asv", "dar", "kjv", "mont", "oeb", "web", "wmth", "ylt")

WORDS = range(6, 61)
LOSING_SPEECH = ("oeb", "mont")  # these wheels lost the direct speech of some verses
PSALMS, LETTERED = 19, 19119  # the book; the chapter with a Hebrew letter above every eighth verse
# A note in oeb that a verse number may be wrong; text of other verses in mont.
_DAMAGED = re.compile(r"crosswire|;\d")
# In web, the heading of the Psalm or the letter that follows.
_HEADING = re.compile(r"(?: BOOK [IVX]+)? Psalm \d+.*$|(?<=[.?!\"'])(?: [A-Z]{2,})+$")
_SPEECHLESS = re.compile(r": [A-Z]|\b(?:said|saying|asked|answered|replied|reply)\W*$|:$")
_SPACE = re.compile(r"(?<=\() | (?=[,.;:)])")

# These have the same numbering. A verse must be nearest to its own number in the others.
REFERENCES = ("kjv", "web", "ylt", "dar")
SLIP = 3  # the largest error of a verse number
SAME = 0.3  # from this cosine of phrases on, two verses of one translation may mean the same
REPEATED = 0.45  # and from this one on, a verse of another split is dropped
LARGEST_RATIO = 0.55  # logarithm of the ratio of lengths; above, a text may lack a part
# The differences between a negative and its positive that count equally in the cost of a negative:
# Jaccard of words and stems; TF-IDF cosine of words, stems, characters, phrases; log length ratio.
TOLERANCES = np.array([0.05, 0.05, 0.06, 0.06, 0.05, 0.06, 0.6], dtype=np.float32)
LARGEST_DIFFERENCE = 4  # tolerances
NEGATIVES, LARGEST_COST = 5, 14.0  # how many are considered per first sentence, and which
ROUNDS, SCORE_WEIGHT = 2, 2.0  # of adversarial filtering


@dataclass(frozen=True)
class Option:
    """Hold a positive pair (a verse in two translations) and a verse for its negative pair."""

    names: tuple[str, str]
    verse: int
    other: int
    cost: float

    @property
    def group(self) -> tuple[str, str]:
        """Return the split and the Testament of the verse."""
        return split_of(self.verse), testament(book_of(self.verse))

    @property
    def texts(self) -> tuple[str, str, str]:
        """Return the first sentence, and the second one of the positive and the negative pair."""
        first, second = map(usable, self.names)
        return first[self.verse], second[self.verse], second[self.other]


def split_of(verse: int) -> str:
    """Return the split that a verse's book belongs to."""
    for split, books in HELD_OUT.items():
        if book_of(verse) in books.values():
            return split
    return "train"


def testament(book: int) -> str:
    """Return the book's Testament, "old" or "new"."""
    return "old" if book < MATTHEW else "new"


def clean(text: str) -> str:
    """Return a verse without headings and stray spaces."""
    return _SPACE.sub("", _HEADING.sub("", text))


def is_whole(name: str, verse: int, text: str) -> bool:
    """Return whether a verse has no heading, no damage and all of its direct speech."""
    if book_of(verse) == PSALMS and verse % 1000 == 1:
        return False
    if verse // 1000 == LETTERED and verse % 8 == 1:
        return False
    if name in LOSING_SPEECH and _SPEECHLESS.search(text):
        return False
    return not _DAMAGED.search(text)


@cache
def usable(name: str) -> dict[int, str]:
    """Return a translation's clean and whole verses of usual length."""
    verses = {verse: clean(text) for verse, text in read_translation(name).items()}
    return {
        verse: text
        for verse, text in verses.items()
        if len(text.split()) in WORDS and is_whole(name, verse, text)
    }


@cache
def vectorizers() -> dict[str, TfidfVectorizer]:
    """Fit TF-IDF vectorizers of words, stems, characters and phrases on all translations."""
    texts = [text for name in NAMES for text in usable(name).values()]
    settings = {"sublinear_tf": True, "dtype": np.float32}
    analyzers = {
        "words": {"analyzer": words, "min_df": 2},
        "stems": {"analyzer": cut_words, "min_df": 2},
        "characters": {**ANALYZERS[CHARACTERS], "min_df": 5},
        "phrases": {"ngram_range": (1, 2), "min_df": 2, "max_df": 0.1},
    }
    return {
        kind: TfidfVectorizer(**analyzer, **settings).fit(tqdm(texts, kind, leave=False))
        for kind, analyzer in analyzers.items()
    }


def phrase_cosines(first: list[str], second: list[str]) -> np.ndarray:
    """Return the TF-IDF cosine of words and word pairs of each first text with each second."""
    transform = vectorizers()["phrases"].transform
    return (transform(first) @ transform(second).T).toarray()


def measures(first: list[str], second: list[str]) -> np.ndarray:
    """Return all measures that a negative must match, for each first and second text: (N, M, 7)."""
    rows = {
        kind: [vectorizer.transform(texts) for texts in (first, second)]
        for kind, vectorizer in vectorizers().items()
    }
    jaccards = [jaccards_of(*rows[kind]) for kind in ("words", "stems")]
    cosines = [(ours @ theirs.T).toarray() for ours, theirs in rows.values()]
    lengths = [np.log([len(text.split()) for text in texts]) for texts in (first, second)]
    ratios = np.subtract.outer(*lengths)
    return np.stack([*jaccards, *cosines, ratios], axis=2).astype(np.float32)


def jaccards_of(first: sparse.csr_matrix, second: sparse.csr_matrix) -> np.ndarray:
    """Return the Jaccard index of the terms of each first and second row."""
    first, second = first.sign(), second.sign()
    shared = (first @ second.T).toarray()
    union = first.sum(axis=1).reshape(-1, 1) + second.sum(axis=1).reshape(1, -1) - shared
    return np.asarray(shared / np.maximum(union, 1))


def aligned(name: str, book: int) -> dict[int, str]:
    """Return a translation's usable verses of a book that are numbered as in the references."""
    verses = {verse: text for verse, text in usable(name).items() if book_of(verse) == book}
    if not verses:
        return {}
    others = [read_translation(other) for other in REFERENCES if other != name]
    numbers = np.array([verse for verse in others[0] if book_of(verse) == book])
    references = [" ".join(texts.get(verse, "") for texts in others) for verse in numbers]
    cosines = phrase_cosines(list(verses.values()), references)
    cosines[np.abs(np.subtract.outer(list(verses), numbers)) > SLIP] = -1
    nearest = dict(zip(verses, numbers[cosines.argmax(axis=1)], strict=True))
    return {verse: text for verse, text in verses.items() if nearest[verse] == verse}


def may_mean_the_same(numbers: list[int]) -> np.ndarray:
    """Return which pairs of verses are neighbours, or similar in some translation."""
    similar = np.abs(np.subtract.outer(numbers, numbers)) <= 1  # wrong numbers shift the texts
    for name in NAMES:
        texts = [usable(name).get(number, "") for number in numbers]
        similar |= phrase_cosines(texts, texts) >= SAME
    return similar


def repeated_verses() -> set[int]:
    """Return verses that nearly repeat a verse of a split that comes later in train, test, dev."""
    repeated = set()
    for name in tqdm(NAMES, "repeats"):
        texts = {"train": {}, "dev": {}, "test": {}}
        for verse, text in usable(name).items():
            texts[split_of(verse)][verse] = text
        held_out = texts["dev"] | texts["test"]
        for ours, theirs in ((texts["train"], held_out), (texts["test"], texts["dev"])):
            for start in range(0, len(ours), 1000):
                part = dict(list(ours.items())[start : start + 1000])
                cosines = phrase_cosines(list(part.values()), list(theirs.values())).max(axis=1)
                repeated |= {
                    verse for verse, cosine in zip(part, cosines, strict=True) if cosine >= REPEATED
                }
    return repeated


def book_options(book: int, dropped: set[int]) -> list[Option]:
    """Return the best negatives of a book's verses, per pair of translations in both orders."""
    texts = {name: aligned(name, book) for name in NAMES}
    numbers = sorted(set().union(*texts.values()) - dropped)
    unfit = may_mean_the_same(numbers)
    options = []
    for pair in TRANSLATION_PAIRS[testament(book)]:
        for first, second in permutations(pair.split()):
            rows = [i for i, v in enumerate(numbers) if v in texts[first] and v in texts[second]]
            if rows:
                verses = [numbers[row] for row in rows]
                measured = measures(*([texts[n][v] for v in verses] for n in (first, second)))
                options += best_options(
                    (first, second), verses, measured, unfit[np.ix_(rows, rows)]
                )
    return options


def best_options(
    names: tuple[str, str], verses: list[int], measured: np.ndarray, unfit: np.ndarray
) -> list[Option]:
    """Return the NEGATIVES cheapest options per verse, from the measures of all pairs of verses."""
    own = measured.diagonal().T  # (N, 7)
    differences = np.abs(measured - own[:, None]) / TOLERANCES  # (N, N, 7)
    cost = differences.sum(axis=2)
    cost[unfit | (differences.max(axis=2) > LARGEST_DIFFERENCE)] = np.inf
    cost[np.abs(measured[..., -1]) > LARGEST_RATIO] = np.inf
    cost[np.abs(own[:, -1]) > LARGEST_RATIO] = np.inf
    options = []
    for row, columns in enumerate(cost.argsort(axis=1)[:, :NEGATIVES]):
        for column in columns:
            if cost[row, column] <= LARGEST_COST:
                price = float(cost[row, column])
                options.append(Option(names, verses[row], verses[column], price))
    return options


def select(options: list[Option], costs: np.ndarray) -> list[Option]:
    """Return the options with the lowest costs that fill SIZES.

    A verse is in one negative pair, and a first sentence occurs in one option. Raises ValueError if
    there are too few options.
    """
    selected, uses, firsts, others = Counter(), Counter(), set(), set()
    chosen = []
    for index in np.argsort(costs, kind="stable"):
        option = options[index]
        first = option.texts[0]
        if (
            selected[option.group] < SIZES[option.group]
            and uses[option.verse] < USES[option.group[0]]
            and first not in firsts
            and option.other not in others
        ):
            chosen.append(option)
            selected[option.group] += 1
            uses[option.verse] += 1
            firsts.add(first)
            others.add(option.other)
    missing = {group: size - selected[group] for group, size in SIZES.items()}
    if any(missing.values()):
        raise ValueError(f"options are missing: {missing}; raise LARGEST_COST or lower SIZES")
    return chosen


class Scorer:
    """Score pairs with a logistic regression on character n-grams, as in baselines.py."""

    def __init__(self, options: list[Option]) -> None:
        texts = sorted({text for option in options for text in option.texts})
        vectorizer = TfidfVectorizer(**ANALYZERS[CHARACTERS], min_df=4, sublinear_tf=True)
        self.vectors = vectorizer.fit_transform(texts).astype(np.float32)
        self.rows = {text: row for row, text in enumerate(texts)}

    def features(self, options: list[Option], second: int) -> sparse.csr_matrix:
        """Return the features of the positive (second=1) or negative (second=2) pairs."""
        sides = [[self.rows[option.texts[side]] for option in options] for side in (0, second)]
        return regression_features(*(self.vectors[side] for side in sides))

    def differences(self, chosen: list[Option], options: list[Option]) -> np.ndarray:
        """Return each positive's score minus its negative's, by a regression fit on `chosen`."""
        train = [option for option in chosen if option.group[0] == "train"]
        features = sparse.vstack([self.features(train, 1), self.features(train, 2)])
        labels = np.repeat([1, 0], len(train))
        model = LogisticRegression(solver="liblinear").fit(features, labels)
        scores = []
        for start in range(0, len(options), 5000):
            part = options[start : start + 5000]
            positive, negative = (model.decision_function(self.features(part, s)) for s in (1, 2))
            scores.append(positive - negative)
        return np.concatenate(scores)


def choose_pairs(options: list[Option]) -> list[Option]:
    """Choose options that fill SIZES, with pairs similar by the measures and by the regression."""
    costs = np.array([option.cost for option in options])
    scorer = Scorer(options)
    differences = np.zeros(len(options))
    chosen = select(options, costs)
    for _ in tqdm(range(ROUNDS), "filtering"):
        differences += scorer.differences(chosen, options)
        chosen = select(options, costs + SCORE_WEIGHT * np.abs(differences))
    return chosen


def write_split(path: Path, split: str, chosen: list[Option]) -> None:
    """Write the pairs of a split in random order, tab-separated."""
    pairs = []
    for option in chosen:
        if option.group[0] == split:
            first, same, other = option.texts
            pairs += [(first, same, 1), (first, other, 0)]
    random.Random(f"verses {split}").shuffle(pairs)
    table = pd.DataFrame(pairs, columns=["sentence1", "sentence2", "is_duplicate"])
    table.insert(0, "id", [f"verse-{split}-{number:04}" for number in range(1, len(pairs) + 1)])
    write_text(path, table.to_csv(sep="\t", index=False, lineterminator="\n"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=DATA, type=Path, metavar="DIR")
    out = parser.parse_args(arguments).out
    dropped = repeated_verses()
    print(f"{len(dropped)} verses dropped that nearly repeat a verse of another split")
    options = []
    for book in tqdm(sorted({book_of(verse) for verse in usable("kjv")}), "books"):
        options += book_options(book, dropped)
    chosen = choose_pairs(options)
    for split in USES:
        write_split(out / f"verses-{split}.csv", split, chosen)
        counts = Counter(" ".join(o.names) for o in chosen if o.group[0] == split)
        print(f"{split}:", ", ".join(f"{names} {count}" for names, count in counts.most_common()))


if __name__ == "__main__":
    main()
