"""Pairs: files of any origin to frames, the prompt, and pairs as token batches."""

import csv
import dataclasses
import io
import re

import numpy as np
import pandas as pd
import pytest
import torch

from config import InputError
from datasets import PairsDataset, bucketed_batches, prompt, read_pairs

HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"
TABLE = HEADER + "0\ta\tWhat is rice?\tWhat's rice?\t1.0\n1\tb\tWhy so?\tWhere?\t0.0\n"
PAIRS = [("a", "What is rice?", "What's rice?", 1.0, 2), ("b", "Why so?", "Where?", 0.0, 3)]
# The plain reader dropped the second of these pairs; pandas.read_csv merges it with the third.
STRAY = HEADER + '0\t6\tx\ty\t1\n1\t7\t"What is love?\tWhat is "hate"?\t0\n2\t8\t"z\tw\t1\n'


@pytest.fixture
def read(tmp_path):
    """Write a file and read its pairs as tuples, in which None is a missing label."""

    def run(content):
        path = tmp_path / "pairs.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        pairs = read_pairs(path, "look elsewhere")
        labels = [None if np.isnan(label) else label for label in pairs["label"]]
        columns = (pairs[name] for name in ("id", "sentence1", "sentence2"))
        return list(zip(*columns, labels, pairs["line"], strict=True))

    return run


def without_index(text):
    """The table without its first column."""
    return "".join(line.split("\t", 1)[1] + "\n" for line in text.splitlines())


def quote_all(text):
    """The table with quotes around every field, also around those of the header."""
    return "\n".join('"' + line.replace("\t", '"\t"') + '"' for line in text.splitlines())


@pytest.mark.parametrize(
    "encode",
    [
        str.encode,
        lambda text: text.encode("utf-8-sig"),
        lambda text: without_index(text).encode(),
        lambda text: without_index(text).encode("utf-8-sig"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.replace("\n", "\r\n", 1).encode(),
        lambda text: text.removesuffix("\n").encode(),
        lambda text: re.sub(r"\t(a|b|[01].0)\b", "\t \\1 ", text).encode(),
        lambda text: text.replace(".0\n", "\n").encode(),
        lambda text: text.replace("What is rice?", '"What is rice?"').encode(),
        lambda text: quote_all(text).encode(),
    ],
    ids=[
        *("as is", "BOM", "no index", "BOM before id", "CRLF", "CR", "mixed line ends"),
        *("no line end", "spaces", "0 and 1", "a quoted field", "all fields quoted"),
    ],
)
def test_pairs_are_read(read, encode):
    """The course's format has an unnamed index and labels 0.0 and 1.0; editors change the rest."""
    assert read(encode(TABLE)) == PAIRS


@pytest.mark.parametrize("text", ["z", '"z\n"'], ids=["plain", "quoted"])
@pytest.mark.parametrize("name", ["line", "label", "", "x"])
def test_other_columns_are_ignored(read, name, text):
    """Whatever their names, and also if two have the same one."""
    content = f"id\t{name}\tsentence1\t{name}\tsentence2\na\t7\tx\t8\t{text}\n"
    ((identity, first, second, label, _),) = read(content)
    assert (identity, first, second.strip('"\n'), label) == ("a", "x", "z", None)


def test_pairs_without_labels(read):
    """The course's test file has no is_duplicate; an empty label is missing, not 0."""
    assert read("\tid\tsentence1\tsentence2\n0\ta\tx\ty\n") == [("a", "x", "y", None, 2)]
    assert read(HEADER + "0\ta\tx\ty\t \n") == [("a", "x", "y", None, 2)]
    assert read(TABLE + "2\tc\tx\ty\t\n") == [*PAIRS, ("c", "x", "y", None, 4)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"What is ""x""?"', 'What is "x"?'),
        ('"""quoted"""', '"quoted"'),
        ('Who is ""YOU"" really', 'Who is ""YOU"" really'),
        ('"say ""a"" or "b""', '"say ""a"" or "b""'),
        ('"a" or "b"', '"a" or "b"'),
        ('""quoted""', '""quoted""'),
        ('"quoted"', '"quoted"'),
        ('"', '"'),
        ('""', '""'),
        ("it's", "it's"),
        ("  x  ", "  x  "),
        ("NA", "NA"),
        ("x\\", "x\\"),
        ("#\x1a\u2028\x85\x0c\x0b\x1c", "#\x1a\u2028\x85\x0c\x0b\x1c"),
    ],
    ids=ascii,
)
def test_texts_are_exact(read, text, expected):
    """The course's files quote a text with quotes twice; all other characters stay."""
    file = io.StringIO()
    csv.writer(file, delimiter="\t", lineterminator="\n").writerow(["0", "a", text, text, "1"])
    assert read(HEADER + file.getvalue()) == [("a", expected, expected, 1, 2)]
    # Without quoting the file reads the same, unless the text looks like a quoted field.
    if not re.fullmatch(r'"(?:[^"]|"")*"', text):
        assert read(HEADER + f"0\ta\t{text}\t{text}\t1\n") == [("a", expected, expected, 1, 2)]


def test_stray_quotes_lose_nothing(read):
    """Every line of a file without CSV quoting is a pair, and its quotes are characters."""
    assert read(STRAY) == [
        ("6", "x", "y", 1, 2),
        ("7", '"What is love?', 'What is "hate"?', 0, 3),
        ("8", '"z', "w", 1, 4),
    ]


def test_quotes_are_characters_unless_all_are_quoting(read):
    """One stray quote anywhere shows that the file's other quotes are characters, too."""
    quoted = '0\ta\t"x"\t"say ""y"" now"\t1\n'
    assert read(HEADER + quoted) == [("a", "x", 'say "y" now', 1, 2)]
    stray = '1\tb\t5" nails\tz\t0\n'
    assert read(HEADER + quoted + stray) == [
        ("a", '"x"', 'say "y" now', 1, 2),  # undone as in the course's files
        ("b", '5" nails', "z", 0, 3),
    ]


def test_quoted_fields_with_line_breaks(read):
    """A pair of several lines has the number of its last line."""
    content = HEADER + '0\ta\t"x\n\nz"\ty "so"\t1\n\n1\tb\tx\t"""y"""\t0\n'
    assert read(content) == [("a", "x\n\nz", 'y "so"', 1, 4), ("b", "x", '"y"', 0, 6)]


def test_empty_lines_are_ignored(read):
    """They may be at the start, at the end or between pairs, and they count as lines."""
    content = "\n" + TABLE.replace("\n1\t", "\n\n\r\n1\t") + "\n\n"
    assert read(content) == [(*PAIRS[0][:-1], 3), (*PAIRS[1][:-1], 6)]


@pytest.mark.parametrize("offset", range(-1, 5))
def test_spaces_at_the_start_of_a_line_stay(read, offset):
    """pandas reads blocks of 2**18 characters and loses spaces where a block ends in them."""
    header = "sentence1\tid\tsentence2\n"
    long = "x" * (2**18 - offset - len(header + "\ta\ty\n"))
    pairs = read(f"{header}{long}\ta\ty\n   z\tb\tw\n")
    assert [pair[1] for pair in pairs] == [long, "   z"]


@pytest.mark.parametrize("quote", ["", '"'], ids=["plain", "quoted"])
def test_long_fields_are_read_completely(read, quote):
    """csv has a limit of 131,072 characters per field."""
    text = "x" * 200_000
    assert read(HEADER + f"0\ta\t{quote}{text}{quote}\ty\t1\n") == [("a", text, "y", 1, 2)]


BROKEN = {
    "empty": ("", "no column id, sentence1, sentence2"),
    "a space": (" ", "no column id, sentence1, sentence2"),
    "missing column": ("id\tsentence1\n1\tx\n", "no column sentence2"),
    "commas": ("id,sentence1,sentence2\n1,x,y\n", "no column id"),
    "commas and a blank line": ("id,sentence1,sentence2\n  \n1,x,y\n", "no column id"),
    "line column": ("id\tline\tsentence1\n1\t9\tx\n", "no column sentence2"),
    "column twice": ("id\tsentence1\tsentence1\tsentence2\n1\tx\ty\tz\n", "sentence1"),
    "id twice": ('id\tid\tsentence1\tsentence2\n1\t1\tx\t"y\nz"\n', "id"),
    "utf-16": (TABLE.encode("utf-16"), "not UTF-8"),
    "utf-16 without a mark": (TABLE.encode("utf-16-le"), "NUL"),
    "latin-1": (HEADER.encode() + b"0\ta\tcaf\xe9\ty\t1\n", "not UTF-8.*byte 44"),
    "windows-1252": (HEADER.encode() + b"0\ta\t\x93x\x94\ty\t1\n", "not UTF-8.*byte 41"),
    "nul": (HEADER + "0\ta\tx\0\ty\t1\n", "NUL"),
    "nul only": (b"\0" * 100, "NUL"),
    "too many fields": (TABLE + "2\tc\tx\ty\tz\t1\n", "line 4: 6 fields.*header has 5"),
    "too few fields": (TABLE + "2\tc\tx\ty\n3\td\tx\ty\t1\n", "line 4: 4 fields.*header has 5"),
    "white space only": (TABLE + "   \n", "line 4: 1 fields.*header has 5"),
    "CR in a field": (HEADER + "0\ta\tx\ry\tz\t1\n", "line 2: 3 fields.*header has 5"),
    "2,000 columns": ("x\t" * 2_000 + "\n", "no column"),
    "quote over two pairs": (STRAY + '3\t9\t"x\ny"\tz\t1\n', "line 3.*quote"),
    "tab in quotes": (HEADER + '0\ta\t"x\tz"\ty\t1\n', "line 2.*tab"),
    "quote that swallows pairs": (
        HEADER + '0\ta\t"x\ty\t1\n1\tb\tx"\ty\t0\n2\tc\t"x\nx"\ty\t0\n',
        "line 3.*(tab|fields).*quote",
    ),
    "quote that is not closed": (TABLE + '2\tc\t"x\nx"\ty\t1\n3\td\t"x\ty\t1\n', "line 6.*quote"),
    "text after a quote": (HEADER + '0\ta\t"x\nx" y\tz\t1\n', "line 3.*quote"),
    "no id": (HEADER + "0\t \tx\ty\t1\n", "line 2.*id.*''"),
    "comma in id": (HEADER + "0\ta,b\tx\ty\t1\n", "line 2.*id.*'a,b'"),
    "id of another pair": (TABLE + "2\ta\tx\ty\t1\n", "id a occurs more than once"),
    **{
        f"label {label}": (TABLE + f"2\tc\tx\ty\t{label}\n", f"line 4.*label.*'{label}'")
        for label in ("2", "nan", "yes", "0.5", "-1", "1.00")
    },
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_rejected(read, content, message):
    """The message names the file, the line if there is one, and what is wrong; it stays short."""
    with pytest.raises(InputError, match=rf"(?s)pairs\.csv.*({message})") as caught:
        read(content)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_missing_files_are_named(tmp_path, name):
    """The message also says how to get the file, or where else to look."""
    with pytest.raises(InputError, match=r"cannot be read.*look elsewhere"):
        read_pairs(tmp_path / name, "look elsewhere")


@pytest.mark.parametrize("last", ['"He said ""so"""', '"two\nlines"'], ids=["quotes", "lines"])
def test_pandas_reads_the_same(read, last):
    """The course's code reads CSV with pandas; where quoting is valid, texts are equal."""
    content = TABLE + f"2\tc\t{last}\tx y\t1.0\n3\td\tNA\t😀 の\t0.0\n"
    frame = pd.read_csv(io.StringIO(content), sep="\t", keep_default_na=False)
    frame = frame[["id", "sentence1", "sentence2", "is_duplicate"]]
    assert [pair[:-1] for pair in read(content)] == list(frame.itertuples(index=False, name=None))


def test_prompt():
    """Training and evaluation use the same prompt."""
    expected = (
        'Question 1: "Why?"\nQuestion 2: "How so?"\nAre these questions asking the same thing?\n'
    )
    assert prompt("Why?", "How so?") == expected


@pytest.fixture
def long(gpt):
    """The tiny model with 128 positions; the prompt does not fit into its 64."""
    gpt.config = dataclasses.replace(gpt.config, n_positions=128)
    return gpt


def frame(sentences, labels=(0, 1)):
    """A frame as from read_pairs with ids p0, p1, ... and the labels in turn."""
    count = len(sentences)
    return pd.DataFrame(
        {
            "id": [f"p{index}" for index in range(count)],
            "sentence1": [first for first, _ in sentences],
            "sentence2": [second for _, second in sentences],
            "label": [float(labels[index % len(labels)]) for index in range(count)],
            "line": range(2, count + 2),
        }
    )


@pytest.fixture
def dataset(long):
    """Make a PairsDataset of sentences with the labels 0, 1, 0, ..."""

    def make(sentences, pair_encoding="joint", labels=(0, 1)):
        return PairsDataset(frame(sentences, labels), long, pair_encoding)

    return make


NAN = float("nan")
SENTENCES = [("winters", "we desire"), ("z", "fairest creatures we desire"), ("But as", "thy brow")]


def test_joint_pairs_are_their_prompts(dataset, long):
    """Each pair is one right-padded text, in the order of the file."""
    data = dataset(SENTENCES)
    texts = long.encode([prompt(*pair) for pair in SENTENCES])
    assert len(data) == 3
    assert data.ids == data.all_ids == ["p0", "p1", "p2"]
    assert data.skipped_lines == data.truncated_lines == []
    assert data.lengths == [len(text) for text in texts]
    assert [data.texts(index)[0].tolist() for index in range(3)] == texts
    batch = data.collate([1, 0])
    width = len(texts[1])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["input_ids"].dtype == torch.int64
    for index, text in enumerate((texts[1], texts[0])):
        assert batch["input_ids"][index, : len(text)].tolist() == text
        padding = width - len(text)
        assert batch["attention_mask"][index].tolist() == [1] * len(text) + [0] * padding
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64


def test_separate_pairs_are_two_texts_each(dataset, long):
    """Each sentence ends with the end-of-text token; the length is that of the longer one."""
    data = dataset(SENTENCES, "separate")
    texts = [[[*ids, long.end_of_text] for ids in long.encode(list(pair))] for pair in SENTENCES]
    assert data.lengths == [max(map(len, pair)) for pair in texts]
    batch = data.collate([2, 1])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 2, data.lengths[1])
    for index, pair in enumerate((texts[2], texts[1])):
        for side, text in enumerate(pair):
            mask = batch["attention_mask"][index, side]
            assert mask.tolist() == [1] * len(text) + [0] * (len(mask) - len(text))
            assert batch["input_ids"][index, side][mask.bool()].tolist() == text
    assert batch["labels"].tolist() == [0, 1]


def test_models_without_an_end_of_text_token(dataset, long):
    """Separate encoding needs the token and names what is missing; joint encoding does not."""
    long.config = dataclasses.replace(long.config, eos_token_id=None)
    long.tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"no end-of-text token.*eos_token_id"):
        dataset(SENTENCES, "separate")
    assert dataset(SENTENCES).texts(1)[0].tolist() == long.encode([prompt(*SENTENCES[1])])[0]


@pytest.mark.parametrize("pair_encoding", ["joint", "separate"])
def test_incomplete_pairs_are_skipped(dataset, pair_encoding):
    """They are named by line, and their ids stay known for the predictions."""
    sentences = [("x", "y"), ("", "y"), ("x", "  "), ("x", "y"), ("x", "y")]
    data = dataset(sentences, pair_encoding, labels=(0, 1, 1, NAN, 1))
    assert data.ids == ["p0", "p4"]
    assert data.all_ids == ["p0", "p1", "p2", "p3", "p4"]
    assert data.skipped_lines == [3, 4, 5]
    assert data.labels.tolist() == data.collate([0, 1])["labels"].tolist() == [0, 1]


def test_unlabelled_pairs_have_no_labels(dataset):
    """In a test file no pair has a label, and only those without a text are skipped."""
    data = dataset([*SENTENCES, ("", "y")], labels=(NAN,))
    assert data.labels is None
    assert data.collate([0]).keys() == {"input_ids", "attention_mask"}
    assert (data.ids, data.skipped_lines) == (["p0", "p1", "p2"], [5])
    assert data.all_ids == ["p0", "p1", "p2", "p3"]


@pytest.mark.parametrize("content", [HEADER, HEADER + "0\ta\t\ty\t1\n", HEADER + "0\ta\tx\t \t\n"])
def test_files_without_a_complete_pair_are_rejected(tmp_path, gpt, content):
    """An empty dataset would train on nothing."""
    (tmp_path / "pairs.csv").write_text(content)
    pairs = read_pairs(tmp_path / "pairs.csv")
    with pytest.raises(InputError, match="no pair"):
        PairsDataset(pairs, gpt, "separate")


def test_tokens_are_stored_compactly(dataset, long):
    """Two bytes per token, or four for a larger vocabulary; no id is lost."""
    texts = dataset(SENTENCES).texts(1)
    long.config = dataclasses.replace(long.config, vocab_size=2**16 + 1)
    texts += dataset(SENTENCES).texts(1)
    assert [text.dtype for text in texts] == [np.uint16, np.int32]
    for text in texts:
        assert text.tolist() == long.encode([prompt(*SENTENCES[1])])[0]


def test_pairs_in_several_chunks_keep_their_order(dataset, long):
    """A file is tokenized 4,096 pairs at a time."""
    data = dataset([(f"w{index}", "z") for index in range(4100)], "separate")
    assert data.ids == [f"p{index}" for index in range(4100)]
    for index in (0, 4095, 4096, 4099):
        assert long.decode(data.texts(index)[0]) == f"w{index}"
    assert data.labels.tolist() == [index % 2 for index in range(4100)]


LONG = "begin " + " ".join("winter" + "abcdefghij"[n % 10] for n in range(60)) + " end"
SHORT = "thy brow"
PROMPT = re.escape(prompt("A", "B")).replace('A"', '{}"').replace('B"', '{}"')  # of patterns


@pytest.mark.parametrize("pair", [(LONG, SHORT), (SHORT, LONG)], ids=["first", "second"])
def test_a_long_pair_loses_the_middle_of_its_longer_sentence(dataset, long, pair):
    """The shorter sentence and the question at the end of the prompt stay complete."""
    data = dataset([pair, SENTENCES[0]])
    text = long.decode(data.texts(0)[0])
    assert 110 < data.lengths[0] <= 128
    assert data.truncated_lines == [2]
    first, second = ("begin winter.* end" if sentence == LONG else SHORT for sentence in pair)
    assert re.fullmatch(PROMPT.format(first, second), text)
    assert LONG not in text
    assert data.texts(1)[0].tolist() == long.encode([prompt(*SENTENCES[0])])[0]


def test_two_long_sentences_both_lose_their_middles(dataset, long):
    """Neither disappears, and both keep their beginning and end."""
    data = dataset([("a" * 300 + "b", "y" * 290 + "z")])
    text = long.decode(data.texts(0)[0])
    assert 110 < data.lengths[0] <= 128
    assert re.fullmatch(PROMPT.format("a{8,}b", "y{8,}z"), text)


@pytest.mark.parametrize("pair_encoding", ["joint", "separate"])
@pytest.mark.parametrize("character", ["é", "😀", "日", "ع"], ids=ascii)
def test_truncated_characters_are_whole(dataset, long, pair_encoding, character):
    """A character may be several tokens: none is cut, and no sentence disappears."""
    text = character * 200
    data = dataset([(text, text + "z"), SENTENCES[0]], pair_encoding)
    assert data.collate([0, 1])["input_ids"].shape[-1] <= 128
    assert data.truncated_lines == [2]
    patterns = [f"({character})+", f"({character})+z"]
    if pair_encoding == "joint":
        patterns = [PROMPT.format(*patterns)]
    for pattern, ids in zip(patterns, data.texts(0), strict=True):
        assert re.fullmatch(pattern, long.decode(ids))


def test_sentences_of_different_scripts_are_both_truncated(dataset, long):
    """The one with more characters has fewer tokens here; neither disappears."""
    data = dataset([(SHORT + " " * 80, "😀" * 60)])
    assert re.fullmatch(PROMPT.format("thy.*", "(😀)+"), long.decode(data.texts(0)[0]))


def test_a_long_separate_text_keeps_its_end_of_text_token(dataset, long):
    """127 tokens and the end-of-text token fit into 128 positions; one more does not."""
    sentences = [("z" * 127, SHORT), ("y" + "z" * 150 + "x", SHORT)]
    data = dataset(sentences, "separate")
    assert data.truncated_lines == [3]
    assert data.lengths == [128, 128]
    text, other = data.texts(1)
    assert long.decode(text[:-1]) == "y" + "z" * 125 + "x"
    assert text[-1] == long.end_of_text
    assert other.tolist() == [*long.encode([SHORT])[0], long.end_of_text]


def test_truncated_pairs_are_counted_once(dataset):
    """Also if both sentences are truncated."""
    assert dataset([("z" * 150, "y" * 150)], "separate").truncated_lines == [2]


def test_models_that_cannot_read_the_prompt_are_rejected(dataset, long):
    """There is nothing left to truncate."""
    long.config = dataclasses.replace(long.config, n_positions=20)
    with pytest.raises(InputError, match="the prompt alone"):
        dataset(SENTENCES)


def test_batches_of_an_epoch_contain_every_pair_once(dataset):
    """The lengths of the dataset are what bucketed_batches expects."""
    data = dataset([("z" * (1 + index * 7 % 40), "w") for index in range(21)], "separate")
    batches = bucketed_batches(data.lengths, 4, seed=1, epoch=0)
    indices = [index for batch in batches for index in batch]
    assert sorted(indices) == list(range(21))
    labels = torch.cat([data.collate(batch)["labels"] for batch in batches])
    assert labels.tolist() == [index % 2 for index in indices]
