"""Files to sonnets, sonnets to batches: what is read, what is refused, and what a batch holds."""

import pytest
import torch

from config import ROOT, InputError
from datasets import IGNORED, Sonnet, SonnetsDataset, bucketed_batches, read_sonnets

EMBEDDED = {"train": (131, 1, 131), "dev": (12, 132, 143), "test": (11, 144, 154)}
NUMBERED = """THE SONNETS

by William Shakespeare


1

From fairest creatures we desire increase,
That thereby beauty's rose might never die,
  Pity the world, or else this glutton be,

2

When forty winters shall besiege thy brow,

"""


@pytest.mark.parametrize("split", EMBEDDED)
def test_embedded_files(split):
    """The course's split; 99 and 126 have 15 and 12 lines, and all couplets but 25's keep their indent."""
    count, first, last = EMBEDDED[split]
    sonnets = read_sonnets(ROOT / "data" / f"Shakespeare_Sonnets_{split}.csv")
    assert [sonnet.number for sonnet in sonnets] == list(range(first, last + 1))
    assert len(sonnets) == count
    assert all(len(sonnet.lines) == {99: 15, 126: 12}.get(sonnet.number, 14) for sonnet in sonnets)
    assert all(line.startswith("  ") == (sonnet.number != 25) for sonnet in sonnets for line in sonnet.lines[-2:])
    assert not any(line.startswith(" ") for sonnet in sonnets for line in sonnet.lines[:3])


def test_prompt_and_continuation():
    """A prompt is the first three lines, the third one ended; both together are the sonnet."""
    sonnet = Sonnet(7, "one\ntwo\nthree\nfour\n  five")
    assert sonnet.prompt == "one\ntwo\nthree\n"
    assert sonnet.continuation == "four\n  five"
    assert sonnet.prompt + sonnet.continuation == sonnet.text
    assert Sonnet(7, "one\n\ntwo\nthree\n\nfour\n  five\n").continuation == "four\n  five"  # empty lines are no lines
    assert Sonnet(7, "one\ntwo\nthree\n").continuation == ""


@pytest.mark.parametrize("encode", [
    lambda text: text.encode(),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace("\n", "\r").encode(),
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.removeprefix("THE SONNETS\n\nby William Shakespeare\n\n\n").encode("utf-8-sig"),
    lambda text: text.replace(",\n", ", \t\n").encode(),
], ids=["as is", "CRLF", "CR", "BOM", "BOM before the number", "space at line ends"])  # fmt: skip
def test_numbered_text_is_read(tmp_path, encode):
    """The course's format: a header, then number, empty line, lines; as any editor may have saved it."""
    path = tmp_path / "sonnets.txt"
    path.write_bytes(encode(NUMBERED))
    first, second = read_sonnets(path)
    assert (first.number, second.number) == (1, 2)
    assert first.lines[0] == "From fairest creatures we desire increase,"
    assert first.text.endswith("die,\n  Pity the world, or else this glutton be,")
    assert second.text == "When forty winters shall besiege thy brow,"


def test_csv_with_quotes_commas_and_crlf(tmp_path):
    """Line breaks inside a quoted field belong to the text."""
    path = tmp_path / "sonnets.CSV"
    path.write_bytes(b'\xef\xbb\xbfid,text\r\n5,"He said ""so"",\r\n  and went"\r\n')
    assert read_sonnets(path) == [Sonnet(5, 'He said "so",\n  and went')]


BROKEN = {
    "empty": ("x.txt", b"", "no sonnet"),
    "no number": ("x.txt", b"a line\nanother\n", "no sonnet"),
    "empty csv": ("x.csv", b"", "no sonnet"),
    "header alone": ("x.csv", b"id,text\n", "no sonnet"),
    "missing column": ("x.csv", b"id,sonnet\n1,abc\n", "no column text.*id, sonnet"),
    "not a number": ("x.csv", b"id,text\n1,abc\none,abc\n", "row 3: id 'one'"),
    "short row": ("x.csv", b"id,text\n1\n", "row 2: id '1'"),
    "open quote": ("x.csv", b'id,text\n1,"abc\n', "not a CSV file"),
    "not utf-8": ("x.txt", b"1\n\ncaf\xe9\n", "not UTF-8 .byte 6"),
    "nul": ("x.txt", b"1\n\nab\0c\n", "NUL"),
    "utf-16": ("x.txt", "1\n\nabc\n".encode("utf-16"), "not UTF-8"),
    "no text": ("x.txt", b"1\n\n2\n\nabc\n", "sonnet 1 has 0 characters"),
    "blank text": ("x.csv", b"id,text\n1,  \n", "sonnet 1 has 0 characters"),
    "twice": ("x.txt", b"1\n\nabc\n\n1\n\ndef\n", "sonnet 1 occurs twice"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(tmp_path, kind):
    """Rows used to be dropped by a bare except; every message must name the file and what is wrong."""
    name, content, message = BROKEN[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*{message}"):
        read_sonnets(path)


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    """The message must also say what to use instead."""
    with pytest.raises(InputError, match=r"can't be read.*embedded sonnets"):
        read_sonnets(tmp_path / name)


TEXTS = ("From fairest", "But as the riper should by time decease", "thy brow,\n  And dig")


@pytest.fixture
def dataset(gpt):
    return SonnetsDataset([Sonnet(number, text) for number, text in enumerate(TEXTS)], gpt)


def test_labels_are_the_next_tokens_and_end_of_text_the_last(gpt, dataset):
    """Padding once was the only thing that taught stopping: EOS is a target, padding never is."""
    batch = dataset.collate([1, 0, 2])
    width = max(map(len, (gpt.tokenizer.encode(text).ids for text in TEXTS)))
    for row, text in enumerate((TEXTS[1], TEXTS[0], TEXTS[2])):
        tokens = gpt.tokenizer.encode(text).ids
        padding = width - len(tokens)
        assert batch["input_ids"][row, : len(tokens)].tolist() == tokens
        assert batch["labels"][row].tolist() == [*tokens[1:], gpt.end_of_text, *[IGNORED] * padding]
        assert batch["attention_mask"][row].tolist() == [1] * len(tokens) + [0] * padding
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, width)


def test_characters_are_those_that_the_labels_spell(gpt, dataset):
    """Bits a character are wrong if the unpredicted first token is counted, or the end of text is not."""
    batch = dataset.collate([0, 2])
    spelt = [gpt.tokenizer.decode(row[row != IGNORED].tolist()) for row in batch["labels"]]
    assert spelt == [TEXTS[0][len(gpt.tokenizer.decode(gpt.tokenizer.encode(TEXTS[0]).ids[:1])) :], spelt[1]]
    assert batch["characters"] == sum(map(len, spelt)) + 2


def test_batches_in_order_hold_every_row_once(dataset):
    """Evaluation must not drop the last, smaller batch."""
    batches = dataset.in_order(2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert torch.equal(batches[1]["input_ids"], dataset.collate([2])["input_ids"])


def test_a_sonnet_longer_than_the_model_reads_is_named(gpt):
    """64 positions take a text of 64 tokens, whose last label is the end of text, and not one more."""
    assert SonnetsDataset([Sonnet(1, "z" * 64)], gpt).collate([0])["input_ids"].shape == (1, 64)
    with pytest.raises(InputError, match=r"sonnet 8 has 65 tokens.*64"):
        SonnetsDataset([Sonnet(8, "z" * 65)], gpt)


LENGTHS = torch.randint(1, 200, (131,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("batch_size", [1, 8, 131, 200])
def test_an_epoch_is_a_permutation(batch_size):
    """Every row exactly once, in full batches but for one."""
    batches = bucketed_batches(LENGTHS, batch_size, seed=3, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(131))
    assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)


def test_order_is_a_function_of_seed_and_epoch():
    """Resuming rebuilds an epoch's order from the two alone; no global random state may enter."""
    torch.manual_seed(0)
    first = bucketed_batches(LENGTHS, 8, seed=3, epoch=5)
    torch.manual_seed(1)
    assert bucketed_batches(LENGTHS, 8, seed=3, epoch=5) == first
    assert bucketed_batches(LENGTHS, 8, seed=3, epoch=6) != first
    assert bucketed_batches(LENGTHS, 8, seed=4, epoch=5) != first


def test_bucketing_saves_padding():
    """Batches of like length: less than half of the padding of rows taken as they come."""

    def padding(batches):
        return sum(max(LENGTHS[row] for row in batch) - LENGTHS[index] for batch in batches for index in batch)

    as_they_come = [list(range(start, min(start + 8, 131))) for start in range(0, 131, 8)]
    assert padding(bucketed_batches(LENGTHS, 8, seed=0, epoch=0)) < padding(as_they_come) / 2
