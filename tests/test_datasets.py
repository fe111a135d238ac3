"""Files to frames, exactly or not at all; frames to batches."""

import csv
import dataclasses
import io
import re

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datasets
from config import InputError
from datasets import PairsDataset, SonnetsDataset, read_pairs, read_sonnets

HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"
TABLE = HEADER + "0\ta\tWhat is rice?\tWhat's rice?\t1.0\n1\tb\tWhy so?\tWhere?\t0.0\n"
PAIRS = [["a", "What is rice?", "What's rice?", 1.0], ["b", "Why so?", "Where?", 0.0]]
NUMBERED = "THE SONNETS\n\n1\n\nFrom fairest,\n  That thereby\n\n 2\n\nWhen forty\n\n"
shared = [HealthCheck.function_scoped_fixture]
generated = settings(deadline=None, database=None, derandomize=True, suppress_health_check=shared)


@pytest.fixture
def read(tmp_path):
    """Read a file of these contents, a table of pairs unless it has another name, as records."""

    def run(content, name="pairs.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        frame = read_pairs(path) if name == "pairs.csv" else read_sonnets(path)
        return frame.astype(object).where(frame.notna(), None).values.tolist()

    return run


def test_prompt_and_continuation():
    text = "one\n\ntwo\nthree\nfour\n  five\n"
    assert datasets.sonnet_prompt(text) == "one\ntwo\nthree\n"
    assert datasets.continuation(text) == "four\n  five"


EDITORS = {
    "as is": str.encode,
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "BOM": lambda text: text.encode("utf-8-sig"),
    "mixed": lambda text: (text.rstrip("\n").replace("\n", "\r\n", 1) + "\n\n").encode(),
}


@pytest.mark.parametrize("encode", EDITORS.values(), ids=EDITORS)
def test_what_editors_do_to_a_file_is_undone(read, encode):
    sonnets = [[1, "From fairest,\n  That thereby"], [2, "When forty"]]
    assert read(encode(NUMBERED), "sonnets.txt") == sonnets
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([["id", "text"], *sonnets])
    assert read(encode(file.getvalue()), "sonnets.csv") == sonnets
    assert read(encode(TABLE)) == PAIRS


STRAY = '0\ta\t"x?\tis "y"?\t1\n1\tb\t"z\tw\t0\n'  # its quotes are characters
EXACT = [
    (re.sub(r"(?m)^[^\t]*\t", "", TABLE), PAIRS),  # without the index column
    (re.sub(r"\t(a|b|[01])([.]0)?(?=\s)", "\t \\1 ", TABLE), PAIRS),  # spaces; labels without .0
    (re.sub(r"([^\t\n]+)", r'"\1"', TABLE), PAIRS),
    ("line\tid\tsentence1\tx\tsentence2\tx\n7\ta\ty\t8\tNA\t9\n", [["a", "y", "NA", None]]),
    (HEADER + '0\ta\t"  x\n\nz"\ty \t\n', [["a", "  x\n\nz", "y ", None]]),
    # The course's files quote a text with quotes twice.
    (HEADER + '0\ta\t"""Is """"x""""?"""\ty\t1\n', [["a", 'Is "x"?', "y", 1.0]]),
    (HEADER + '0\ta\t"\t"\t1\n', [["a", '"', '"', 1.0]]),
    (HEADER + STRAY, [["a", '"x?', 'is "y"?', 1.0], ["b", '"z', "w", 0.0]]),
]


@pytest.mark.parametrize(("content", "expected"), EXACT)
def test_pairs_are_exact(read, content, expected):
    """Index column, spaces, quoting, other columns, missing labels."""
    assert read(content) == expected


BROKEN = [
    ("pairs.csv", "", "no column id"),
    ("pairs.csv", "id\tsentence1\tsentence1\tsentence2\n1\tx\ty\tz\n", "no column sentence1"),
    ("pairs.csv", "id,sentence1,sentence2\n1,x,y\n", "no column id"),
    ("pairs.csv", TABLE + "2\tc\tx\ty\tz\t1\n", "line 4: 6 fields; the header has 5"),
    ("pairs.csv", TABLE + "2\tc\tx\ty\n", "line 4: 4 fields; the header has 5"),
    ("pairs.csv", TABLE + '2\tc\t"x\nx"\ty\t1\n3\td\t"x\ty\t1\n', "line 6: .*quote"),
    ("pairs.csv", HEADER + '0\ta\t"x\ty\t1\n1\tb\tx"\ty\t0\n2\tc\t"z\nz"\ty\t0\n', "line 3: "),
    ("pairs.csv", HEADER + '0\ta\t"x\tz"\ty\t1\n', "line 2: a field contains a tab"),
    ("pairs.csv", TABLE + "2\tc\tx\ty\tyes\n", "line 4: label is 'yes'"),
    ("pairs.csv", TABLE + "2\tc\tx\ty\tnan\n", "line 4: label is 'nan'"),
    ("pairs.csv", HEADER + "0\t \tx\ty\t1\n", "line 2: id is ''"),
    ("pairs.csv", HEADER + "0\ta,b\tx\ty\t1\n", "line 2: id is 'a,b'"),
    ("pairs.csv", TABLE + "2\ta\tx\ty\t1\n", "the id a occurs more than once"),
    ("pairs.csv", TABLE.encode("utf-16"), "cannot be read as UTF-8 text: .* in position 0"),
    ("sonnets.txt", "From fairest\n", "contains no sonnet"),
    ("sonnets.txt", "1\n\na b\n\n2\n", "sonnet 2 is empty"),
    ("sonnets.txt", "1\na\n1\nb\n", "the id 1 occurs more than once"),
    ("sonnets.txt", b"1\ncaf\xe9\n", "cannot be read as UTF-8 text: .* in position 5"),
    ("sonnets.csv", "number,poem\n1,a\n", "no column id"),
    ("sonnets.csv", "id,text\n", "contains no sonnet"),
    ("sonnets.csv", "id,text\n1,a\none,b\n", "line 3: id is 'one'"),
    ("sonnets.csv", 'id,text\n1,"a\nb\n', "line 3: .*quote"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_are_named(read, name, content, message):
    """The message names the file, the line if there is one, and what is wrong; it stays short."""
    with pytest.raises(InputError, match=rf"{name}.*{message}") as caught:
        read(content, name)
    assert len(str(caught.value)) < 600


PIECES = ['"', '""', "'", " ", ",", "\\", "#", "NA", "1.0", "é", "😀", "\ufeff", "\u2028", "\x0c"]
CHARACTERS = st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"])
LINE = st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=3), max_size=6).map("".join)
LINES = st.lists(LINE, min_size=1, max_size=3).map("\n".join)


def tables(texts):
    """Records of an id, two texts and a label or None."""
    record = st.tuples(texts, texts, st.sampled_from([0.0, 1.0, None]))
    records = st.lists(record, min_size=1, max_size=6)
    return records.map(lambda rows: [[f"p{number}", *row] for number, row in enumerate(rows)])


def expected(records):
    """What is read: texts that are still quoted, with quotes inside, are unquoted once."""
    return [[r[0], *map(datasets.undo_double_quoting, r[1:3]), r[3]] for r in records]


@generated
@given(records=tables(LINES), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_what_csv_writes_is_read_back(read, records, quoting):
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=quoting)
    writer.writerows([HEADER.split(), *records])
    assert read(file.getvalue()) == expected(records)


@generated
@given(records=tables(LINES), data=st.data())
def test_damaged_tables_lose_no_character(read, records, data):
    """With quotes, tabs and line breaks in any place, a file is read completely or rejected."""
    body = "\n".join("\t".join("" if f is None else str(f) for f in row) for row in records)
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(body)))
        body = body[:place] + data.draw(st.sampled_from(['"', "\n", "\t", '"\t"'])) + body[place:]
    content = "\t".join(HEADER.split()) + "\n" + body
    try:
        fields = ["" if field is None else str(field) for row in read(content) for field in row]
    except InputError:
        return
    characters = [re.sub(r'["\s]|[.]0', "", text) for text in ("".join(fields), body)]
    assert characters[0] == characters[1]


TEXTS = ["From fairest", "But as the riper should by time decease", "thy brow,\n  And dig"]


def test_labels_are_the_next_tokens(gpt):
    """The end-of-text token is the last target of each text; padding is never a target."""
    data = SonnetsDataset(pd.DataFrame({"id": range(3), "text": TEXTS}), gpt)
    batch = data.collate([1, 0])
    encoded = gpt.encode([TEXTS[1], TEXTS[0]])
    for inputs, labels, ids in zip(batch["input_ids"], batch["labels"], encoded, strict=True):
        assert inputs[: len(ids)].tolist() == ids
        padding = [-100] * (len(labels) - len(ids))
        assert labels.tolist() == [*ids[1:], gpt.end_of_text, *padding]
    assert data.num_targets([1, 0]) == sum(map(len, encoded))
    long = pd.DataFrame({"id": [7, 8], "text": ["z" * 64, "z" * 65]})
    assert SonnetsDataset(long[:1], gpt).lengths == [64]
    with pytest.raises(InputError, match="sonnet 8 has 65 tokens; the model reads 64"):
        SonnetsDataset(long, gpt)


SENTENCES = [("winters", "we desire"), ("z", "fairest creatures we desire"), ("But as", "thy brow")]


def frame(sentences, labels):
    lines = pd.RangeIndex(2, 2 + len(sentences))
    return datasets.make_pairs(sentences).assign(label=labels).set_index(lines)


@pytest.fixture
def long(gpt):
    """128 positions; the prompt does not fit into 64."""
    gpt.config = dataclasses.replace(gpt.config, n_positions=128)
    return gpt


@pytest.mark.parametrize("encoding", ["joint", "separate"])
def test_masks_mark_the_tokens_of_pairs(long, encoding):
    """joint: one prompt; separate: two texts, each with the end-of-text token."""
    data = PairsDataset(frame(SENTENCES, [0.0, 1.0, 1.0]), long, encoding)
    batch, width = data.collate([2, 0]), max(data.lengths[2], data.lengths[0])
    texts, end = [datasets.PROMPT.format(*SENTENCES[n]) for n in (2, 0)], []
    if encoding == "separate":
        texts, end = [*SENTENCES[2], *SENTENCES[0]], [long.end_of_text]
    assert batch["input_ids"].shape == ((2, 2, width) if end else (2, width))
    ids, mask = (batch[name].view(-1, width) for name in ("input_ids", "attention_mask"))
    found = [row[row_mask.bool()].tolist() for row, row_mask in zip(ids, mask, strict=True)]
    assert found == [row + end for row in long.encode(texts)]
    assert mask.diff().le(0).all()  # padding is on the right
    assert batch["labels"].tolist() == [1, 0]
    assert data.num_tokens([2, 0]) == mask.sum()


def test_incomplete_pairs_are_skipped_by_line(gpt):
    """Without a text, or without a label where others have one."""
    sentences = [("x", "y"), ("", "y"), ("x", " "), ("x", "y"), ("x", "y")]
    nan = float("nan")
    data = PairsDataset(frame(sentences, [0, 1, 1, nan, 1]), gpt, "separate")
    assert (data.ids, data.skipped_lines) == (["0", "4"], [3, 4, 5])
    assert (data.all_ids, data.labels.tolist()) == (list("01234"), [0, 1])
    data = PairsDataset(frame(sentences, nan), gpt, "separate")
    assert (data.ids, data.labels, "labels" in data.collate([0])) == (["0", "3", "4"], None, False)


@pytest.mark.parametrize("encoding", ["joint", "separate"])
def test_long_pairs_keep_a_share_of_both_texts(long, encoding):
    """The report cut the prompt's end, and with it the second text."""
    pairs = [("a " * 300, "b " * 300), ("a", "b " * 300), ("a", "b")]
    data = PairsDataset(frame(pairs, 1.0), long, encoding)
    assert data.truncated_lines == [2, 3]
    assert max(data.lengths) <= 128
    for texts in data.texts[:2]:
        text = "".join(long.decode(ids.tolist()) for ids in texts)
        assert re.search("(a | b|ab)", text)
        assert text.count("b ") >= 10
        assert encoding == "separate" or text.endswith("the same thing?\n")
    first = "".join(long.decode(ids.tolist()) for ids in data.texts[0])
    assert first.count("a ") >= 10


@pytest.mark.parametrize("batch_size", [1, 8, 131, 200])
def test_batches_are_a_partition_of_similar_lengths(gpt, batch_size):
    """A function of seed and epoch alone, which a resumed run repeats."""
    data = SonnetsDataset(pd.DataFrame({"id": [1], "text": ["a"]}), gpt)
    generator = torch.Generator().manual_seed(0)
    data.lengths = torch.randint(1, 200, (131,), generator=generator).tolist()
    batches = data.batches(batch_size, 3, 0)
    assert sorted(index for batch in batches for index in batch) == list(range(131))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)
    torch.manual_seed(5)
    assert data.batches(batch_size, 3, 0) == batches
    if batch_size == 8:
        assert data.batches(8, 3, 1) != batches != data.batches(8, 4, 0)
        lengths = [sorted(data.lengths[index] for index in batch) for batch in batches]
        assert sum(one[-1] - one[0] for one in lengths) / len(lengths) < 40  # of 199
