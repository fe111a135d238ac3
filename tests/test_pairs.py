"""Files of pairs as anyone may have saved them, the one prompt, and pairs as token batches."""

import csv
import dataclasses
import io

import numpy as np
import pytest
import torch

from config import InputError
from datasets import Pair, PairsDataset, bucketed_batches, prompt, read_pairs

HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"
ROWS = HEADER + "0\ta\tWhat is rice?\tWhat's rice?\t1.0\n1\tb\tWhy so?\tWhere?\t0.0\n"
PAIRS = [Pair(2, "a", "What is rice?", "What's rice?", 1), Pair(3, "b", "Why so?", "Where?", 0)]


@pytest.fixture
def read(tmp_path):
    """Write a file and read its pairs; `dropped` is what the call left out."""

    def run(content):
        path = tmp_path / "pairs.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        run.dropped = []
        return list(read_pairs(path, "look elsewhere", run.dropped))

    return run


@pytest.mark.parametrize("encode", [
    str.encode,
    lambda text: text.encode("utf-8-sig"),
    lambda text: "\n".join(line.split("\t", 1)[1] for line in text.splitlines()).encode("utf-8-sig"),
    lambda text: text.replace("\n", "\r\n").encode(),
    lambda text: text.replace("\n", "\r").encode(),
    lambda text: text.removesuffix("\n").encode(),
    lambda text: text.replace("\t", " \t ").replace(" \t id \t sentence1 \t sentence2 \t ", HEADER[:-13]).encode(),
    lambda text: "\n".join(line.split("\t", 1)[1] for line in text.splitlines()).encode(),
    lambda text: text.replace(".0\n", "\n").encode(),
    lambda text: text.replace("What is rice?", '"What is rice?"').encode(),
], ids=["as is", "BOM", "BOM before id", "CRLF", "CR", "no end", "spaces", "no index", "0/1", "quotes"])  # fmt: skip
def test_pairs_are_read(read, encode):
    """The course's format has a column of indices without a name, and labels 0.0 and 1.0; editors change the rest."""
    assert read(encode(ROWS)) == PAIRS
    assert read.dropped == []


def test_pairs_without_labels(read):
    """The test file of the course has no is_duplicate; a label then is None, not 0."""
    assert read("\tid\tsentence1\tsentence2\n0\ta\tx\ty\n") == [Pair(2, "a", "x", "y", None)]


@pytest.mark.parametrize(("field", "text"), [
    ('"What is ""x""?"', 'What is "x"?'), ('Who is ""YOU"" really', 'Who is ""YOU"" really'),
    ('"a" or "b"', '"a" or "b"'), ('"""quoted"""', '"quoted"'), ('""quoted""', '""quoted""'),
    ('"quoted"', '"quoted"'), ('"', '"'), ('""', '""'),
    ('"say ""a"" or "b""', '"say ""a"" or "b""'), ("it's", "it's"),
], ids=str)  # fmt: skip
def test_quotes_that_the_courses_files_double(read, field, text):
    """A text with quotes stands there quoted once more than CSV needs; quotes of the text itself must stay."""
    buffer = io.StringIO()
    csv.writer(buffer, delimiter="\t", lineterminator="\n").writerow(["0", "a", field, field, "1"])
    (pair,) = read(HEADER + buffer.getvalue())
    assert (pair.sentence1, pair.sentence2) == (text, text)


def test_rows_left_out_are_counted_by_line(read):
    """A bare except dropped rows unseen: those without a sentence or a label are named by the line they end in."""
    rows = '0\ta\tx\ty\t1\n1\tb\t\ty\t1\n2\tc\tx\t  \t1\n3\td\tx\ty\t\n4\te\t"x\nx"\t\t0\n5\tf\tx\n6\tg\t"x\nx"\ty\t0\n'
    assert [(pair.line, pair.id) for pair in read(HEADER + rows)] == [(2, "a"), (10, "g")]
    assert read.dropped == [3, 4, 5, 7, 8]


def test_empty_lines_are_no_pairs(read):
    """At the end or between rows; they used to stop other readers."""
    assert read(ROWS.replace("\n1\t", "\n\n1\t") + "\n") == [PAIRS[0], dataclasses.replace(PAIRS[1], line=4)]


BROKEN = {
    "empty": (b"", "lacks the column id, sentence1, sentence2"),
    "missing column": ("id\tsentence1\n1\tx\n", "lacks the column sentence2"),
    "commas": ("id,sentence1,sentence2,is_duplicate\n", "lacks the column.*tab-separated"),
    "utf-16": (ROWS.encode("utf-16"), "not UTF-8"),
    "utf-16 without a mark": (ROWS.encode("utf-16-le"), "lacks the column"),
    "not utf-8": (HEADER.encode() + b"0\ta\tcaf\xe9\ty\t1\n", "not UTF-8"),
    "nul": (HEADER + "0\ta\tx\0\ty\t1\n", "line 2.*NUL"),
    "nul only": (b"\0" * 100, "lacks the column|NUL"),
    "too many fields": (ROWS + "2\tc\tx\ty\tz\t1\n", "line 4: 6 fields where the header has 5"),
    "a field of 10 MB": (HEADER + "0\ta\t" + "x" * 10_000_000 + "\ty\t1\n", "line 2: field larger"),
    "a header of 10 MB": ("x\t" * 5_000_000 + "\n", "lacks the column"),
    "quote that swallows rows": (HEADER + '0\ta\t"x\ty\t1\n1\tb\tx\t"y\t0\n', "line 3.*quote"),
    "quote that swallows the rest": (HEADER + '0\ta\tx\t"y\t1\n1\tb\tx\ty\t0\n', "line 4.*quote"),
    "quote in the last row": (HEADER + '0\ta\tx\t"y\t1', "line 3.*quote"),
    "quote in the last field": (HEADER + '0\ta\tx\ty\t"1\n', "line 3.*quote"),
    "no id": (HEADER + "0\t \tx\ty\t1\n", "line 2: the id '' is empty"),
    **{f"label {label}": (ROWS + f"2\tc\tx\ty\t{label}\n", f"line 4: is_duplicate is '{label}'")
       for label in ("2", "nan", "yes", "0.5", "-1")},
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(read, kind):
    """Nothing is dropped or guessed at: file, line where there is one, and what is wrong."""
    content, message = BROKEN[kind]
    with pytest.raises(InputError, match=rf"(?s)pairs\.csv.*({message})") as caught:
        read(content)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    """With what makes it, or where else to look."""
    with pytest.raises(InputError, match=r"can't be read.*look elsewhere"):
        list(read_pairs(tmp_path / name, "look elsewhere", []))


def test_pandas_reads_the_same_fields(read):
    """The course's code reads with pandas, tab-separated; quotes are undone once more here."""
    import pandas

    rows = ROWS + '2\tc\t"He said ""so"""\tit\'s "x" y\t1.0\n3\td\t"two\nlines"\t😀 の\t0.0\n'
    pairs = read(rows)
    table = pandas.read_csv(io.StringIO(rows), sep="\t", keep_default_na=False)
    for column in ("id", "sentence1", "sentence2"):
        assert list(table[column]) == [getattr(pair, column) for pair in pairs]
    assert list(table["is_duplicate"]) == [pair.label for pair in pairs]


def test_the_one_prompt():
    """Train, dev and test once had three prompts, one of them without a closing quote."""
    expected = 'Question 1: "Why?"\nQuestion 2: "How so?"\nAre these questions asking the same thing?\n'
    assert prompt("Why?", "How so?") == expected


@pytest.fixture
def long(gpt):
    """The tiny model with 128 positions instead of 64, which the prompt alone exceeds."""
    gpt.config = dataclasses.replace(gpt.config, positions=128)
    return gpt


@pytest.fixture
def dataset(tmp_path, long):
    """Make a PairsDataset of (sentence1, sentence2) rows, labelled 0, 1, 0, ..."""

    def make(sentences, pair_encoding="joint", labelled=True):
        path = tmp_path / "pairs.csv"
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["id", "sentence1", "sentence2", "is_duplicate"][: 4 if labelled else 3])
            writer.writerows((f"p{row}", *pair, row % 2)[: 4 if labelled else 3] for row, pair in enumerate(sentences))
        return PairsDataset(path, long, pair_encoding)

    return make


SENTENCES = [("winters", "we desire"), ("z", "fairest creatures we desire"), ("But as", "thy brow")]


def test_joint_pairs_are_their_prompts(dataset, long):
    """One text a pair, in the order of the file; right-padded, with the mask 1 at its tokens."""
    data = dataset(SENTENCES)
    texts = [long.tokenizer.encode(prompt(*pair)).ids for pair in SENTENCES]
    assert (data.ids, len(data), data.dropped, data.shortened) == (["p0", "p1", "p2"], 3, [], [])
    assert data.lengths == [len(text) for text in texts]
    assert [data.texts(row)[0].tolist() for row in range(3)] == texts
    batch = data.collate([1, 0])
    width = len(texts[1])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["input_ids"].dtype == torch.int64
    for row, text in enumerate((texts[1], texts[0])):
        assert batch["input_ids"][row, : len(text)].tolist() == text
        assert batch["attention_mask"][row].tolist() == [1] * len(text) + [0] * (width - len(text))
    assert batch["labels"].tolist() == [1, 0]


def test_separate_pairs_are_two_texts_each(dataset, long):
    """Both sentences, each ended by end of text, side by side; the length that counts is the longer one's."""
    data = dataset(SENTENCES, "separate")
    texts = [[[*long.tokenizer.encode(text).ids, long.end_of_text] for text in pair] for pair in SENTENCES]
    assert data.lengths == [max(map(len, pair)) for pair in texts]
    batch = data.collate([2, 1])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 2, data.lengths[1])
    for row, pair in enumerate((texts[2], texts[1])):
        for side, text in enumerate(pair):
            assert batch["input_ids"][row, side][batch["attention_mask"][row, side].bool()].tolist() == text
            assert batch["attention_mask"][row, side, : len(text)].all()
    assert batch["labels"].tolist() == [0, 1]


def test_unlabelled_pairs_have_no_labels(dataset):
    """A test file's batches hold no labels at all, rather than made-up ones."""
    data = dataset(SENTENCES, labelled=False)
    assert data.labels is None
    assert data.collate([0]).keys() == {"input_ids", "attention_mask"}


def test_tokens_are_kept_in_two_bytes(dataset, long):
    """400,000 pairs as lists of int would take gigabytes; a larger vocabulary needs four bytes, and loses no id."""
    data = dataset(SENTENCES)
    assert data.tokens.dtype == np.uint16
    assert len(data.tokens) == sum(data.lengths)
    long.config = dataclasses.replace(long.config, vocab_size=2**16 + 1)
    assert dataset(SENTENCES).tokens.tolist() == data.tokens.tolist()
    assert dataset(SENTENCES).tokens.dtype == np.int32


def test_pairs_in_several_chunks_keep_their_order(dataset):
    """A file is tokenized 4096 pairs at a time."""
    data = dataset([(f"w{row}", "z") for row in range(4100)], "separate")
    assert data.ids == [f"p{row}" for row in range(4100)]
    assert all(data.tokenizer.decode(data.texts(row)[0].tolist()) == f"w{row}" for row in (0, 4095, 4096, 4099))
    assert data.labels.tolist() == [row % 2 for row in range(4100)]
    assert [pair.id for pair in data.read()] == data.ids


@pytest.mark.parametrize("content", [HEADER, HEADER + "0\ta\t\ty\t1\n"], ids=["header alone", "no complete pair"])
def test_a_file_without_a_pair_is_named(tmp_path, gpt, content):
    """An empty set would train on nothing, or divide by 0."""
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(InputError, match=r"pairs\.csv holds no complete pair; look elsewhere"):
        PairsDataset(tmp_path / "pairs.csv", gpt, "separate", "look elsewhere")


def test_an_id_that_occurs_twice_is_named(tmp_path, gpt):
    """Predictions are looked up by id."""
    (tmp_path / "pairs.csv").write_text(ROWS + "2\ta\tx\ty\t1\n")
    with pytest.raises(InputError, match="id a occurs 2 times"):
        PairsDataset(tmp_path / "pairs.csv", gpt, "separate")


LONG, SHORT = "begin " + " ".join("winter" + "abcdefghij"[n % 10] for n in range(60)) + " end", "thy brow"


@pytest.mark.parametrize("swap", [False, True], ids=["first", "second"])
def test_a_long_pair_loses_the_middle_of_its_longer_sentence(dataset, long, swap):
    """Cut at the end it would lose the question that the last token is judged by, and all of the second sentence."""
    data = dataset([(SHORT, LONG) if swap else (LONG, SHORT), SENTENCES[0]])
    text = long.tokenizer.decode(data.texts(0)[0].tolist())
    assert data.lengths[0] <= 128
    assert data.lengths[0] > 120
    assert data.shortened == [2]
    assert text.startswith(f'Question 1: "{SHORT if swap else "begin winter"}')
    assert text.endswith(f'{" end" if swap else SHORT}"\nAre these questions asking the same thing?\n')
    assert f'{SHORT}"\n' in text
    assert 'end"\n' in text
    assert LONG not in text
    assert data.texts(1)[0].tolist() == long.tokenizer.encode(prompt(*SENTENCES[0])).ids


def test_two_long_sentences_both_lose_their_middles(dataset, long):
    """Neither may vanish for the other's sake."""
    data = dataset([("a" * 300 + "b", "y" * 290 + "z")])
    text = long.tokenizer.decode(data.texts(0)[0].tolist())
    assert data.lengths[0] <= 128
    assert text.count("a" * 8) >= 1
    assert 'b"\nQuestion 2: "yy' in text
    assert text.endswith('z"\nAre these questions asking the same thing?\n')


@pytest.mark.parametrize("pair_encoding", ["joint", "separate"])
@pytest.mark.parametrize("text", ["é" * 200, "😀" * 100, "の日" * 90, "\u202e" + "ع" * 100], ids=ascii)
def test_characters_cut_in_the_middle(dataset, long, pair_encoding, text):
    """Their bytes are tokens here: half a character must neither fail nor make the text longer than it may be."""
    data = dataset([(text, text + "z"), SENTENCES[0]], pair_encoding)
    batch = data.collate([0, 1])
    assert batch["input_ids"].shape[-1] <= 128
    assert set(data.shortened) == {2}
    if pair_encoding == "joint":
        assert "\ufffd" not in long.tokenizer.decode(data.texts(0)[0].tolist())


def test_a_long_separate_text_loses_its_middle_and_keeps_end_of_text(dataset, long):
    """128 tokens with end of text fit and one more does not; the other sentence stays whole."""
    data = dataset([("z" * 127, "thy brow"), ("y" + "z" * 150 + "x", "thy brow")], "separate")
    assert data.shortened == [3]
    assert data.lengths == [128, 128]
    text, other = data.texts(1)
    assert long.tokenizer.decode(text[:-1].tolist()) == "y" + "z" * 125 + "x"
    assert text[-1] == long.end_of_text
    assert other.tolist() == [*long.tokenizer.encode("thy brow").ids, long.end_of_text]


def test_a_pair_is_named_once_however_many_of_its_texts_are_cut(dataset):
    """The screen says how many pairs were shortened: with both sentences long it is one."""
    assert dataset([("z" * 150, "y" * 150)], "separate").shortened == [2]


def test_a_model_that_cannot_read_the_prompt_is_named(dataset, long):
    """Nothing is left to shorten."""
    long.config = dataclasses.replace(long.config, positions=20)
    with pytest.raises(InputError, match=r"the prompt alone has \d+ tokens.*20 positions"):
        dataset(SENTENCES)


def test_reading_again_counts_left_out_rows_once(tmp_path, gpt):
    """errors.md and the word overlap read the file once more."""
    (tmp_path / "pairs.csv").write_text(ROWS + "2\tc\t\ty\t1\n")
    data = PairsDataset(tmp_path / "pairs.csv", gpt, "separate")
    assert list(data.read()) == PAIRS
    assert data.dropped == [4]


def test_batches_of_an_epoch_cover_every_pair_once(dataset):
    """Through the lengths that the training loop sorts by."""
    data = dataset([("z" * (1 + row * 7 % 40), "w") for row in range(21)], "separate")
    rows = [row for batch in bucketed_batches(data.lengths, 4, seed=1, epoch=0) for row in batch]
    assert sorted(rows) == list(range(21))
    labels = torch.cat([data.collate(batch)["labels"] for batch in bucketed_batches(data.lengths, 4, 1, 0)])
    assert labels.tolist() == [row % 2 for row in rows]
