"""Write data/cache/corpus/*.jsonl: the texts for pretraining and validating the bundled model.

    python data/build_corpus.py

Whole books of the Bible, verses similar to theirs, and eight successive words of a sonnet are
excluded.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import modern
import numpy as np
import shakespeare_text
from bibles import BOOKS, HELD_OUT_BOOKS, TRANSLATIONS, book_of, read_translation
from build_sonnets import read_sonnets
from packages import CACHE, write_text
from plain_text import grams, words
from sklearn.feature_extraction.text import TfidfVectorizer

CORPUS = CACHE / "corpus"
GROUPS = ("shakespeare", "bible", "modern")
HELD_OUT_TRANSLATIONS = ("kjv", "web", "wmth")  # old, modern and idiomatic English
NEAR_COSINE, NEAR_JACCARD = 0.45, 0.45  # below, most pairs only share stock phrases
COMPARED = ("kjv", "web", "dr")  # two wordings of one numbering, and the numbering of the Vulgate
GRAM = 8  # successive words that make a line a copy

Document = dict[str, str]  # "source" and "text"


def near_duplicates(name: str) -> list[tuple[float, float, int, int]]:
    """(cosine, Jaccard, verse, held-out verse) of verses that repeat a held-out verse.

    Cosine is that of TF-IDF over words and word pairs, Jaccard that of the sets of words; one of
    them is enough.
    """
    verses = read_translation(name)
    kept = [verse for verse in verses if book_of(verse) not in HELD_OUT_BOOKS]
    held = [verse for verse in verses if book_of(verse) in HELD_OUT_BOOKS]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    vectorizer.fit(verses.values())
    target = vectorizer.transform(verses[verse] for verse in held).T.tocsc()
    found = []
    for start in range(0, len(kept), 2000):
        part = kept[start : start + 2000]
        scores = (vectorizer.transform(verses[verse] for verse in part) @ target).tocoo()
        for row, column, cosine in zip(scores.row, scores.col, scores.data, strict=True):
            if cosine < 0.4:
                continue
            ours, theirs = set(words(verses[part[row]])), set(words(verses[held[column]]))
            jaccard = len(ours & theirs) / len(ours | theirs)
            if cosine >= NEAR_COSINE or jaccard >= NEAR_JACCARD:
                found.append((float(cosine), jaccard, part[row], held[column]))
    return found


def dropped_verses() -> set[int]:
    """Verses outside the held-out books that are dropped from every translation.

    Prints counts and examples.
    """
    dropped: set[int] = set()
    for name in COMPARED:
        found, verses = near_duplicates(name), read_translation(name)
        new = {verse for _, _, verse, _ in found} - dropped
        dropped |= new
        print(
            f"near-duplicates in {name}: {len(found)} pairs, {len(new)} verses not dropped before"
        )
        for cosine, jaccard, verse, held in sorted(found)[:: max(len(found) // 6, 1)]:
            shown = [f"{number} {verses[number][:90]}" for number in (verse, held)]
            print(f"  {cosine:.2f} {jaccard:.2f} | {' | '.join(shown)}")
    return dropped


def chapters(name: str, books: set[int] | frozenset[int], dropped: set[int]) -> Iterator[Document]:
    """A translation's chapters of the books, one line per verse, without verse numbers."""
    lines: dict[int, list[str]] = {}
    for verse, text in read_translation(name).items():
        if book_of(verse) in books and verse not in dropped:
            lines.setdefault(verse // 1000, []).append(text)
    for chapter in lines.values():
        yield {"source": name, "text": "\n".join(chapter)}


def held_out_grams(name: str) -> set[tuple[str, ...]]:
    """Word n-grams of a translation's held-out verses, which other books may quote."""
    verses = read_translation(name)
    return set().union(
        *(grams(verses[verse], GRAM) for verse in verses if book_of(verse) in HELD_OUT_BOOKS)
    )


def in_hundredth(text: str) -> bool:
    """Whether a document is among the 1 % held out, by its hash: the same in every rebuild."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100 == 0


def without_copies(documents: list[Document], banned: set[tuple[str, ...]]) -> list[Document]:
    """The documents without lines that contain, or end, a banned n-gram; prints those lines."""
    clean = []
    for document in documents:
        lines = document["text"].split("\n")
        while True:
            text = "\n".join(lines)
            hits = grams(text, GRAM) & banned
            if not hits:
                break
            guilty = max(range(len(lines)), key=lambda i: _overlap(lines, i, hits))
            print(f"  dropped from {document['source']}: {lines.pop(guilty)[:110]!r}")
        if text.strip():
            clean.append({**document, "text": text})
    return clean


def _overlap(lines: list[str], i: int, hits: set[tuple[str, ...]]) -> int:
    """The number of word pairs of line i that are also in the n-grams."""
    pairs = {pair for hit in hits for pair in pairwise(hit)}
    run = words(lines[i])
    return sum(pair in pairs for pair in pairwise(run))


def write_documents(name: str, documents: list[Document]) -> None:
    """Write a JSON-lines file and print the documents and characters of its sources."""
    write_text(
        CORPUS / f"{name}.jsonl",
        "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents),
    )
    count, size = Counter(), Counter()
    for document in documents:
        count[document["source"]] += 1
        size[document["source"]] += len(document["text"])
    for source in count:
        print(f"{name:15} {source:15} {count[source]:7,} documents {size[source]:12,} characters")


def main() -> None:
    """Build every group, remove what is held out, decontaminate, and write."""
    dropped = dropped_verses()
    print(f"{len(dropped)} verses dropped from all translations")
    kept_books = set(range(1, BOOKS + 1)) - HELD_OUT_BOOKS
    bible = [d for name in TRANSLATIONS for d in chapters(name, kept_books, dropped)]
    held_out_bible = [
        d for name in HELD_OUT_TRANSLATIONS for d in chapters(name, HELD_OUT_BOOKS, set())
    ]
    plays = [{"source": "shakespeare", "text": text} for text in shakespeare_text.documents()]
    prose = [
        {"source": source, "text": text}
        for source in modern.SOURCES
        for text in modern.documents(source)
    ]

    sonnets = set().union(*(grams(sonnet, GRAM) for sonnet in read_sonnets().values()))
    verses = {verse for name in TRANSLATIONS for verse in held_out_grams(name)}
    print(f"lines with {GRAM} successive words of a sonnet or (not Bibles) of a held-out verse:")
    plays, prose = (without_copies(documents, sonnets | verses) for documents in (plays, prose))
    bible = without_copies(bible, sonnets)
    write_documents("shakespeare", plays)
    write_documents("bible", bible)
    write_documents("modern", [d for d in prose if not in_hundredth(d["text"])])
    write_documents("heldout_modern", [d for d in prose if in_hundredth(d["text"])])
    write_documents("heldout_bible", held_out_bible)


if __name__ == "__main__":
    main()
