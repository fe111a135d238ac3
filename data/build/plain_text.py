"""Give all text one format: ASCII quotes, "--" for dashes, no trailing spaces, one blank line."""

import re
from collections.abc import Iterable, Iterator

# Single quotes, double quotes with guillemets, and the no-break space; "_" and "\r" are removed.
CHARACTERS = str.maketrans(
    "\u2018\u2019`\u201c\u201d\u00ab\u00bb\u00a0", '\'\'\'"""" ', "_\r"
) | str.maketrans({"\u2013": "--", "\u2014": "--", "\u2026": "..."})


def plain(text: str) -> str:
    """Return the text in the sonnets' format: lines and indents are kept, underscores removed."""
    text = re.sub(r"[ \t]+$", "", text.translate(CHARACTERS), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def one_line(text: str) -> str:
    """Return the text as a single plain line."""
    return " ".join(plain(text).split())


def words(text: str) -> list[str]:
    """Return lower-case words without punctuation; editions with other commas become comparable."""
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    """Return the set of n-grams of a text's words, with n = `size`."""
    run = words(text)
    return {tuple(run[i : i + size]) for i in range(len(run) - size + 1)}


def pack(pieces: Iterable[str], separator: str, limit: int) -> Iterator[str]:
    """Join successive pieces into documents of at most `limit` characters.

    A longer piece is not split.
    """
    document = []
    length = 0
    for piece in pieces:
        if document and length + len(piece) > limit:
            yield separator.join(document)
            document, length = [], 0
        document.append(piece)
        length += len(piece) + len(separator)
    if document:
        yield separator.join(document)
