"""One format for all text: ASCII quotes, "--" for dashes, no trailing spaces, one blank line."""

import re
from collections.abc import Iterable, Iterator

_CHARACTERS = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "`": "'",  # single quotes
        "\u201c": '"',
        "\u201d": '"',
        "\u00ab": '"',
        "\u00bb": '"',  # double quotes, guillemets too
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "_": None,
        "\r": None,
    }
)


def plain(text: str) -> str:
    """The text in the format of the sonnets: lines and indents are kept, underscores removed."""
    text = text.translate(_CHARACTERS)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def one_line(text: str) -> str:
    """The text as a single plain line."""
    return " ".join(plain(text).split())


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, so that editions with other commas are comparable."""
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    """The word n-grams of a text, with n = `size`."""
    run = words(text)
    return {tuple(run[i : i + size]) for i in range(len(run) - size + 1)}


def pack(pieces: Iterable[str], separator: str, limit: int) -> Iterator[str]:
    """Join successive pieces into documents of at most `limit` characters.

    A longer piece is not split.
    """
    document: list[str] = []
    length = 0
    for piece in pieces:
        if document and length + len(piece) > limit:
            yield separator.join(document)
            document, length = [], 0
        document.append(piece)
        length += len(piece) + len(separator)
    if document:
        yield separator.join(document)


def sentences(text: str) -> list[str]:
    """Split prose where the end of a sentence is followed by a capital letter."""
    return re.split(r"(?<=[.?!])\s+(?=[A-Z\"'])", text)
