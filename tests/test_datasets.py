"""Sonnets: files to frames, frames to batches, and the order of an epoch."""

import dataclasses

import pytest
import torch

from config import ROOT, InputError
from datasets import (
    IGNORE_INDEX,
    SonnetsDataset,
    bucketed_batches,
    continuation,
    read_sonnets,
    sonnet_prompt,
    verse_lines,
)

BUNDLED = {"train": range(1, 132), "dev": range(132, 144), "test": range(144, 155)}
NUMBERED = """THE SONNETS

by William Shakespeare


1

From fairest creatures we desire increase,
That thereby beauty's rose might never die,
  Pity the world, or else this glutton be,

2

When forty winters shall besiege thy brow,

"""


@pytest.fixture
def read(tmp_path):
    """Write a file and read its sonnets as pairs of id and text."""

    def run(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        sonnets = read_sonnets(path)
        return list(zip(sonnets["id"], sonnets["text"], strict=True))

    return run


@pytest.mark.parametrize("split", BUNDLED)
def test_bundled_files(split):
    """All sonnets are complete: 99 and 126 have 15 and 12 lines, couplets except 25's indents."""
    sonnets = read_sonnets(ROOT / "data" / f"Shakespeare_Sonnets_{split}.csv")
    assert sonnets["id"].tolist() == list(BUNDLED[split])
    for number, text in zip(sonnets["id"], sonnets["text"], strict=True):
        lines = verse_lines(text)
        assert len(lines) == {99: 15, 126: 12}.get(number, 14)
        assert [line.startswith("  ") for line in lines[-2:]] == [number != 25] * 2
        assert not any(line.startswith(" ") for line in lines[:3])


def test_prompt_and_continuation():
    """The prompt is the first three lines; together with the continuation it is the sonnet."""
    text = "one\ntwo\nthree\nfour\n  five"
    assert sonnet_prompt(text) == "one\ntwo\nthree\n"
    assert continuation(text) == "four\n  five"
    assert continuation("one\n\ntwo\nthree\n\nfour\n  five\n") == "four\n  five"  # no empty lines
    assert continuation("one\ntwo\nthree\n") == ""


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\r\n", 7).encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text[text.index("1\n") :].encode("utf-8-sig"),
        lambda text: text.replace(",\n", ", \t\n").encode(),
    ],
    ids=["as is", "CRLF", "CR", "mixed", "BOM", "BOM before the number", "space at line ends"],
)
def test_numbered_text_is_read(read, encode):
    """The course's format, as any editor may have saved it: header, number, empty line, lines."""
    assert read("sonnets.txt", encode(NUMBERED)) == [
        (1, NUMBERED[NUMBERED.index("From") : NUMBERED.index("\n\n2\n")]),
        (2, "When forty winters shall besiege thy brow,"),
    ]


def test_text_before_the_first_number_is_named(read, capsys):
    """A title, or a sonnet whose number is missing, which must not be lost silently."""
    read("sonnets.txt", "When forty winters\nshall besiege\n\n2\n\nabc\n")
    expected = "not read: When forty winters shall besiege\n"
    assert capsys.readouterr().out.endswith(expected)
    read("sonnets.txt", "\n1\n\nabc\n")
    assert capsys.readouterr().out == ""


def test_csv_with_quotes_commas_and_line_breaks(read):
    """Line breaks inside a quoted field belong to the text; other columns are ignored."""
    content = b'\xef\xbb\xbfnote,id,text\r\n,5,"He said ""so"",\r\n  and went"\r\n\r\nx, 6 ,a "b"\n'
    assert read("sonnets.CSV", content) == [(5, 'He said "so",\n  and went'), (6, 'a "b"')]


BROKEN = {
    "empty": ("x.txt", "", "no sonnet"),
    "no number": ("x.txt", "a line\nanother\n", "no sonnet"),
    "empty csv": ("x.csv", "", "no column id, text"),
    "white space csv": ("x.csv", " \n", "no column id, text"),
    "header alone": ("x.csv", "id,text\n", "no sonnet"),
    "missing column": ("x.csv", "id,sonnet\n1,abc\n", "no column text.*id, sonnet"),
    "id column twice": ("x.csv", "id,id,text\n1,1,abc\n", "id"),
    "text column twice": ("x.csv", "id,text,text\n1,abc,def\n", "text"),
    "not a number": ("x.csv", "id,text\n1,abc\none,abc\n", "id 'one' is not the number"),
    "fewer fields": ("x.csv", "id,text\n1,abc\n2\n", "line 3: 1 fields.*header has 2"),
    "comma without quotes": ("x.csv", "id,text\n1,abc, def\n", "line 2: 3 fields"),
    "open quote": ("x.csv", 'id,text\n1,"abc\n', "line 2.*quote"),
    "quote of another sonnet": ("x.csv", 'id,text\n1,"abc\n2,"def"\n', "line 3.*quote"),
    "text after a quote": ("x.csv", 'id,text\n1,"abc" def\n', "line 2.*quote"),
    "not utf-8": ("x.txt", b"1\n\ncaf\xe9\n", "not UTF-8 .byte 6"),
    "nul": ("x.txt", b"1\n\nab\0c\n", "NUL"),
    "nul in csv": ("x.csv", b"id,text\n1,ab\0c\n", "NUL"),
    "utf-16": ("x.txt", "1\n\nabc\n".encode("utf-16"), "not UTF-8"),
    "utf-16 without a mark": ("x.txt", "1\n\nabc\n".encode("utf-16-le"), "NUL"),
    "no text": ("x.txt", "1\n\n2\n\nabc\n", "sonnet 1 has 0 characters"),
    "blank text": ("x.csv", "id,text\n1,  \n", "sonnet 1 has 0 characters"),
    "twice": ("x.txt", "1\n\nabc\n\n1\n\ndef\n", "id 1 occurs more than once"),
    "twice in csv": ("x.csv", "id,text\n1,abc\n01,def\n", "id 1 occurs more than once"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_rejected(read, name, content, message):
    """No sonnet is dropped silently: the message names the file, and the line if there is one."""
    with pytest.raises(InputError, match=rf"{name}.*{message}"):
        read(name, content)


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_missing_files_are_named(tmp_path, name):
    """The message also says what to use instead."""
    with pytest.raises(InputError, match=r"cannot be read.*bundled sonnets"):
        read_sonnets(tmp_path / name)


TEXTS = ("From fairest", "But as the riper should by time decease", "thy brow,\n  And dig")


@pytest.fixture
def make(tmp_path, gpt):
    """Make a SonnetsDataset of texts, numbered from 1."""

    def run(*texts):
        path = tmp_path / "sonnets.txt"
        path.write_text("".join(f"{number}\n{text}\n" for number, text in enumerate(texts, 1)))
        return SonnetsDataset(read_sonnets(path), gpt)

    return run


def test_labels_are_the_next_tokens_and_the_end_of_text(gpt, make):
    """The end-of-text token is the last target of each text; padding is never a target."""
    data = make(*TEXTS)
    batch = data.collate([1, 0, 2])
    encoded = gpt.encode([TEXTS[1], TEXTS[0], TEXTS[2]])
    width = max(map(len, encoded))
    for index, ids in enumerate(encoded):
        padding = width - len(ids)
        targets = [*ids[1:], gpt.end_of_text]
        assert batch["input_ids"][index, : len(ids)].tolist() == ids
        assert batch["labels"][index].tolist() == targets + [IGNORE_INDEX] * padding
    assert batch.keys() == {"input_ids", "labels"}  # what the loss needs
    assert batch["input_ids"].shape == batch["labels"].shape == (3, width)
    assert data.num_targets([1, 0, 2]) == sum(map(len, encoded))
    assert data.num_targets([2]) == (data.collate([2])["labels"] != IGNORE_INDEX).sum()
    assert data.lengths == [len(ids) + 1 for ids in gpt.encode(list(TEXTS))]


def test_characters_are_those_of_the_targets(gpt, make):
    """Bits per character exclude the first token and count the end of the text as one."""
    data = make(*TEXTS)
    batch = data.collate([0, 2])
    texts = [gpt.decode(labels[labels != IGNORE_INDEX]) for labels in batch["labels"]]
    for text, target in zip((TEXTS[0], TEXTS[2]), texts, strict=True):
        assert gpt.decode(gpt.encode([text])[0][:1]) + target == text
    assert [data.characters[0], data.characters[2]] == [len(text) + 1 for text in texts]


def test_sonnets_that_are_too_long_are_named(make):
    """64 positions hold 64 tokens, the last of which predicts the end-of-text token."""
    assert make("z" * 64).collate([0])["input_ids"].shape == (1, 64)
    with pytest.raises(InputError, match=r"sonnet 2 has 65 tokens.*64"):
        make("z", "z" * 65)


def test_models_without_an_end_of_text_token_are_rejected(gpt, make):
    """Nothing would teach such a model to stop; neither config.json nor the tokenizer has one."""
    gpt.config = dataclasses.replace(gpt.config, eos_token_id=None)
    gpt.tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"no end-of-text token.*eos_token_id"):
        make(*TEXTS)


LENGTHS = torch.randint(1, 200, (131,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("batch_size", [1, 8, 131, 200])
def test_an_epoch_is_a_permutation(batch_size):
    """Every index occurs exactly once, and all batches except one are full."""
    batches = bucketed_batches(LENGTHS, batch_size, seed=3, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(131))
    sizes = sorted(map(len, batches), reverse=True)
    assert sizes[:-1] == [batch_size] * (len(batches) - 1)


def test_order_is_a_function_of_seed_and_epoch():
    """A resumed run rebuilds an epoch's order from these; global random state has no effect."""
    torch.manual_seed(0)
    first = bucketed_batches(LENGTHS, 8, seed=3, epoch=5)
    torch.manual_seed(1)
    assert bucketed_batches(LENGTHS, 8, seed=3, epoch=5) == first
    assert bucketed_batches(LENGTHS, 8, seed=3, epoch=6) != first
    assert bucketed_batches(LENGTHS, 8, seed=4, epoch=5) != first


def test_bucketing_saves_padding():
    """Batches of similar lengths have less than half of the padding of batches in order."""

    def padding(batches):
        return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in batches)

    in_order = [LENGTHS[start : start + 8] for start in range(0, 131, 8)]
    bucketed = bucketed_batches(LENGTHS, 8, seed=0, epoch=0)
    assert padding([[LENGTHS[i] for i in batch] for batch in bucketed]) < padding(in_order) / 2
