"""Write data/verses-{train,dev,test}.csv: are two sentences translations of the same Bible verse?

    python data/build_verses.py

A positive pair is one verse in two translations; a negative pair is two similar verses of one book.
Each first sentence occurs once in each class, with the same two translations and about the same
overlap, cosine and lengths, so that neither counting shared words nor knowing the translations
should reveal the label. The script prints how well they predict it.
"""

import csv
import io
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import scipy.sparse as sparse
from bibles import BOOKS, HELD_OUT, HELD_OUT_BOOKS, book_of, read_translation
from build_corpus import NEAR_COSINE, dropped_verses
from packages import DATA, write_text
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

# Pairs from the Old and New Testament. Few old verses differ as much as these pairs must.
SIZES = {
    "train": {"old": 3200, "new": 4800},
    "dev": {"old": 500, "new": 500},
    "test": {"old": 500, "new": 500},
}
# The number of times that a verse may be an anchor, each time in other translations.
USES = {"train": 2, "dev": 1, "test": 1}
MATTHEW = 40

OLDER, MODERN = ("kjv", "web", "ylt", "dar"), ("wmth", "mont", "oeb")
# Translations that differ; kjv, asv, dar and rwebster nearly repeat each other.
TRANSLATION_PAIRS = {
    "old": [
        ("kjv", "ylt"),
        ("web", "ylt"),
        ("asv", "ylt"),
        ("dar", "ylt"),
        ("kjv", "web"),
        ("dar", "web"),
    ],
    "new": [(a, b) for a in OLDER for b in MODERN]
    + [("wmth", "mont"), ("wmth", "oeb"), ("mont", "oeb")],
}
NAMES = sorted({name for pairs in TRANSLATION_PAIRS.values() for pair in pairs for name in pair})
LARGEST_SHARE = 0.25  # of a Testament's pairs that one ordered pair of translations may have

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
# Of a positive pair: below, a reader may not recognize it; above, it is nearly a copy.
LEAST_COSINE, MOST_JACCARD = 0.03, 0.6
MOST_RATIO = 0.55  # logarithm of the ratio of lengths: above, one text may lack a part
SAME = 0.3  # from this cosine on, two verses of one translation may mean the same
# Largest differences in Jaccard, cosine and lengths between a negative and a positive pair.
TOLERANCE = np.array([0.06, 0.08, 0.3])
# A single text says something about the label: words on which translations differ ("thou") are
# rarer in a verse that is similar to many others. So pairs are chosen again this many times, with
# negatives whose second text looks as much like a positive's as that of the positive itself.
ROUNDS, LEAN_WEIGHT = 2, 2.0

Likeness = tuple[float, float, float]  # Jaccard, TF-IDF cosine, logarithm of the ratio of lengths
# Of translation and verse: how much the text alone looks like the second text of a positive pair.
Lean = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Pair:
    """Two sentences and their sources, which are not in the files."""

    sentence1: str
    sentence2: str
    label: int
    verses: tuple[int, int]
    names: tuple[str, str]
    likeness: Likeness


@dataclass(frozen=True)
class Anchor:
    """A verse in two translations, and the verses that make equally similar negatives."""

    verse: int
    names: tuple[str, str]
    likeness: Likeness
    others: list[tuple[int, Likeness]]


def testament(book: int) -> str:
    """The book's Testament, "old" or "new"."""
    return "old" if book < MATTHEW else "new"


@cache
def vectorizer() -> TfidfVectorizer:
    """TF-IDF of words and word pairs over all translations that are used."""
    texts = [text for name in NAMES for text in read_translation(name).values()]
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, dtype=np.float32)
    return vectors.fit(tqdm(texts, desc="TF-IDF", leave=False))


def clean(text: str) -> str:
    """A verse without headings and stray spaces."""
    return _SPACE.sub("", _HEADING.sub("", text))


@cache
def usable(name: str) -> dict[int, str]:
    """A translation's clean verses of usual length.

    Verses that may contain headings or lack direct speech are left out.
    """
    verses = {
        verse: clean(text)
        for verse, text in read_translation(name).items()
        if not _DAMAGED.search(text)
    }
    unsure = {verse for verse in verses if book_of(verse) == PSALMS and verse % 1000 == 1}
    unsure |= {verse for verse in verses if verse // 1000 == LETTERED and verse % 8 == 1}
    if name in LOSING_SPEECH:
        unsure |= {verse for verse, text in verses.items() if _SPEECHLESS.search(text)}
    return {
        verse: text
        for verse, text in verses.items()
        if verse not in unsure and len(text.split()) in WORDS
    }


def cosines(first: list[str], second: list[str]) -> np.ndarray:
    """TF-IDF cosine of each first text with each second."""
    return (vectorizer().transform(first) @ vectorizer().transform(second).T).toarray()


def jaccards(first: list[str], second: list[str]) -> np.ndarray:
    """Jaccard index of the lower-case, space-separated words of each first and second text."""
    counter = CountVectorizer(
        tokenizer=str.split, token_pattern=None, binary=True, dtype=np.float64
    )
    counter.fit(first + second)
    ours, theirs = counter.transform(first), counter.transform(second)
    shared = (ours @ theirs.T).toarray()
    return shared / (np.asarray(ours.sum(1)) + np.asarray(theirs.sum(1)).T - shared)


def likenesses(
    overlap: np.ndarray, cosine: np.ndarray, first: list[str], second: list[str]
) -> np.ndarray:
    """All measures that a negative must match, as (first, second, measure)."""
    lengths = [np.log([len(text.split()) for text in texts]) for texts in (first, second)]
    return np.stack([overlap, cosine, lengths[0][:, None] - lengths[1]], axis=2)


def aligned(name: str, book: int) -> dict[int, str]:
    """A translation's usable verses of a book that have the number of the references."""
    verses = {verse: text for verse, text in usable(name).items() if book_of(verse) == book}
    others = [read_translation(other) for other in REFERENCES if other != name]
    numbers = np.array([verse for verse in others[0] if book_of(verse) == book])
    if not verses:
        return {}
    near = cosines(
        list(verses.values()),
        [" ".join(texts.get(v, "") for texts in others) for v in numbers.tolist()],
    )
    near[np.abs(np.subtract.outer(list(verses), numbers)) > SLIP] = -1
    nearest = numbers[near.argmax(1)].tolist()
    return {
        verse: text
        for (verse, text), number in zip(verses.items(), nearest, strict=True)
        if number == verse
    }


def unfit(numbers: list[int]) -> np.ndarray:
    """The pairs of verses that make no negative.

    These are neighbours, because wrong numbers shift their texts, and verses that are too similar.
    """
    banned = np.abs(np.subtract.outer(numbers, numbers)) <= 1
    for name in NAMES:
        texts = [usable(name).get(number, "") for number in numbers]
        banned |= cosines(texts, texts) >= SAME
    return banned


def book_anchors(book: int, dropped: set[int]) -> list[Anchor]:
    """All anchors of a book, with each pair of translations in both orders."""
    numbers = [
        verse
        for verse in read_translation("kjv")
        if book_of(verse) == book and verse not in dropped
    ]
    banned, texts = unfit(numbers), {name: aligned(name, book) for name in NAMES}
    anchors = []
    for names in TRANSLATION_PAIRS[testament(book)]:
        kept = [i for i, verse in enumerate(numbers) if all(verse in texts[name] for name in names)]
        if kept:
            verses, allowed = [numbers[i] for i in kept], ~banned[np.ix_(kept, kept)]
            first, second = ([texts[name][verse] for verse in verses] for name in names)
            overlap, cosine = jaccards(first, second), cosines(first, second)
            anchors += _anchors(verses, names, likenesses(overlap, cosine, first, second), allowed)
            anchors += _anchors(
                verses, names[::-1], likenesses(overlap.T, cosine.T, second, first), allowed
            )
    return anchors


def _anchors(
    verses: list[int], names: tuple[str, str], likeness: np.ndarray, allowed: np.ndarray
) -> list[Anchor]:
    """Anchors of one ordered pair of translations."""
    own = likeness.diagonal().T
    allowed = (
        allowed
        & (np.abs(likeness - own[:, None]) <= TOLERANCE).all(2)
        & (np.abs(likeness[..., 2]) <= MOST_RATIO)
    )
    fair = (
        (own[:, 0] <= MOST_JACCARD)
        & (own[:, 1] >= LEAST_COSINE)
        & (np.abs(own[:, 2]) <= MOST_RATIO)
    )
    anchors = []
    for i in np.flatnonzero(fair & allowed.any(1)):
        others = [(verses[j], tuple(likeness[i, j].tolist())) for j in np.flatnonzero(allowed[i])]
        anchors.append(Anchor(verses[i], names, tuple(own[i].tolist()), others))
    return anchors


def badness(anchor: Anchor, lean: Lean, other: tuple[int, Likeness]) -> float:
    """The cost of a verse as an anchor's negative: less similarity, or a different lean."""
    verse, likeness = other
    overlap, cosine = (np.subtract(anchor.likeness, likeness) / TOLERANCE)[:2]
    name = anchor.names[1]
    return (
        overlap
        + cosine
        + LEAN_WEIGHT * abs(lean.get((name, verse), 0.0) - lean.get((name, anchor.verse), 0.0))
    )


def choose(
    anchors: list[Anchor], count: int, uses: int, lean: Lean, chance: random.Random
) -> list[Pair]:
    """Make `count` pairs, half of them positive, from random anchors.

    A verse is the second one of at most one negative pair. Raises ValueError if there are too few
    anchors.
    """
    taken, used, firsts, share, pairs = Counter(), set(), set(), Counter(), []
    for anchor in chance.sample(anchors, len(anchors)):
        if len(pairs) == count:
            break
        free = [other for other in anchor.others if other[0] not in used]
        if (
            not free
            or taken[anchor.verse] >= uses
            or share[anchor.names] >= LARGEST_SHARE * count / 2
        ):
            continue
        text = usable(anchor.names[0])[anchor.verse]
        if text in firsts:
            continue
        firsts.add(text)
        taken[anchor.verse] += 1
        best = min(free, key=partial(badness, anchor, lean))
        used.add(best[0])
        share[anchor.names] += 1
        for label, (verse, likeness) in ((1, (anchor.verse, anchor.likeness)), (0, best)):
            texts = (
                usable(name)[v] for name, v in zip(anchor.names, (anchor.verse, verse), strict=True)
            )
            pairs.append(Pair(*texts, label, (anchor.verse, verse), anchor.names, likeness))
    if len(pairs) < count:
        raise ValueError(f"only {len(pairs)} pairs of {count}; loosen TOLERANCE")
    return pairs


def repeats(books: list[int], others: list[int]) -> set[int]:
    """Verses of the books that (nearly) repeat a verse of the other books in some translation."""
    repeated: set[int] = set()
    for name in NAMES:
        theirs = [text for verse, text in usable(name).items() if book_of(verse) in others]
        for book in books:
            ours = {verse: text for verse, text in usable(name).items() if book_of(verse) == book}
            if ours and theirs:
                near = cosines(list(ours.values()), theirs).max(1)
                repeated |= {
                    verse for verse, cosine in zip(ours, near, strict=True) if cosine >= NEAR_COSINE
                }
    return repeated


def verses_to_drop() -> set[int]:
    """Verses of train and test that are too close to those of another split; prints counts."""
    dev, test = (list(HELD_OUT[split].values()) for split in ("dev", "test"))
    dropped = dropped_verses()  # also excluded from pretraining
    print(f"{len(dropped)} verses close to a held-out one, as in build_corpus.py")
    for book in tqdm(range(1, BOOKS + 1), desc="repeats"):
        if book not in HELD_OUT_BOOKS:
            dropped |= repeats([book], dev + test)
    print(f"{len(dropped)} with those close to one in any of the translations")
    return dropped | repeats(test, dev)


def select(anchors: dict[str, dict[str, list[Anchor]]], lean: Lean) -> dict[str, list[Pair]]:
    """Shuffled pairs of each split."""
    selected = {}
    for split, sizes in SIZES.items():
        chance = random.Random(f"verses {split}")  # so that splits are independent
        pairs = [
            p
            for part, size in sizes.items()
            for p in choose(anchors[split][part], size, USES[split], lean, chance)
        ]
        selected[split] = chance.sample(pairs, len(pairs))
    return selected


def leaning(pairs: list[Pair], before: Lean) -> Lean:
    """`before` plus the score of every text in a regression on second sentences alone."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    seen = vectors.fit_transform(pair.sentence2 for pair in pairs)
    model = LogisticRegression(max_iter=500).fit(seen, [pair.label for pair in pairs])
    texts = {(name, verse): text for name in NAMES for verse, text in usable(name).items()}
    scores = model.decision_function(vectors.transform(texts.values()))
    return {
        key: score + before.get(key, 0.0) for key, score in zip(texts, scores.tolist(), strict=True)
    }


def build(dropped: set[int]) -> dict[str, list[Pair]]:
    """Shuffled pairs of each split, without the dropped verses."""
    splits = {book: split for split, books in HELD_OUT.items() for book in books.values()}
    anchors: dict[str, dict[str, list[Anchor]]] = {split: {"old": [], "new": []} for split in SIZES}
    for book in tqdm(range(1, BOOKS + 1), desc="books"):
        anchors[splits.get(book, "train")][testament(book)] += book_anchors(book, dropped)
    lean: Lean = {}
    pairs = select(anchors, lean)
    for _ in range(ROUNDS):
        lean = leaning(pairs["train"], lean)
        pairs = select(anchors, lean)
    return pairs


def table(split: str, pairs: list[Pair]) -> str:
    """Tab-separated CSV with the columns of question-pair files."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["id", "sentence1", "sentence2", "is_duplicate"])
    for number, pair in enumerate(pairs, 1):
        writer.writerow([f"verse-{split}-{number:04}", pair.sentence1, pair.sentence2, pair.label])
    return text.getvalue()


def threshold_accuracy(scores: list[float], labels: list[int]) -> float:
    """The highest accuracy of calling every pair above some score positive."""
    scores, gold = np.array(scores), np.array(labels) == 1
    return max(float(((scores > threshold) == gold).mean()) for threshold in np.linspace(0, 1, 51))


def _length_features(pairs: list[Pair]) -> np.ndarray:
    sizes = np.log([[len(pair.sentence1.split()), len(pair.sentence2.split())] for pair in pairs])
    ratio = sizes[:, :1] - sizes[:, 1:]
    return np.hstack([sizes, ratio, np.abs(ratio)])


def shortcuts(train: list[Pair]) -> dict[str, Callable[[list[Pair]], object]]:
    """Features that should hardly predict the label, and all TF-IDF features."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectors.fit([pair.sentence1 for pair in train] + [pair.sentence2 for pair in train])
    translations = sorted({pair.names for pair in train})

    def both(pairs: list[Pair]) -> sparse.csr_matrix:
        first, second = (
            vectors.transform([getattr(p, f"sentence{side}") for p in pairs]) for side in (1, 2)
        )
        overlap = np.array([[pair.likeness[0]] for pair in pairs])
        product = first.multiply(second)
        return sparse.hstack(
            [product, abs(first - second), np.asarray(product.sum(1)), overlap]
        ).tocsr()

    return {
        "translations": lambda pairs: np.array(
            [[pair.names == names for names in translations] for pair in pairs], float
        ),
        "lengths": _length_features,
        "sentence1": lambda pairs: vectors.transform([pair.sentence1 for pair in pairs]),
        "sentence2": lambda pairs: vectors.transform([pair.sentence2 for pair in pairs]),
        "all TF-IDF": both,
    }


def report(splits: dict[str, list[Pair]]) -> None:
    """Print how similar the classes are, and the accuracy of simple features.

    Thresholds are chosen on the split itself; regressions are trained on train.
    """
    labels = {split: [pair.label for pair in pairs] for split, pairs in splits.items()}
    for split, pairs in splits.items():
        verses = {verse for pair in pairs for verse in pair.verses}
        print(f"{split}: {len(pairs):,} pairs, {len(verses):,} verses")
        for label in (1, 0):
            numbers = np.array([pair.likeness for pair in pairs if pair.label == label])
            deciles = [np.percentile(numbers[:, i], [10, 50, 90]).round(2).tolist() for i in (0, 1)]
            print(f"  label {label}: Jaccard at 10, 50, 90 % {deciles[0]}, cosine {deciles[1]}")
        for i, name in ((0, "Jaccard"), (1, "cosine")):
            accuracy = threshold_accuracy([pair.likeness[i] for pair in pairs], labels[split])
            print(f"  {name} alone: accuracy {accuracy:.3f}")
        counts = Counter(" ".join(pair.names) for pair in pairs if pair.label)
        print("  anchors:", ", ".join(f"{names} {count}" for names, count in counts.most_common()))
    for name, features in shortcuts(splits["train"]).items():
        model = LogisticRegression(max_iter=300).fit(features(splits["train"]), labels["train"])
        accuracies = [
            f"{split} {model.score(features(splits[split]), labels[split]):.3f}"
            for split in ("dev", "test")
        ]
        print(f"accuracy of logistic regression on {name}: {', '.join(accuracies)}")


def main() -> None:
    """Write the three files and print their metrics."""
    dropped = verses_to_drop()
    print(f"{len(dropped)} verses dropped, with those of test close to dev")
    splits = build(dropped)
    for split, pairs in splits.items():
        write_text(DATA / f"verses-{split}.csv", table(split, pairs))
    report(splits)


if __name__ == "__main__":
    main()
