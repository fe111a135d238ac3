"""Files to validated pandas frames, and frames to token batches."""

import csv
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from config import InputError
from models.gpt2 import GPT2Model
from modules.loss import IGNORE_INDEX

GIVEN_LINES = 3  # the lines of a sonnet that a model continues
QUOTED_FIELD = r'"(?:[^"]|"")*"'


def read_text(path: str | Path) -> str:
    """A UTF-8 file with line ends as \\n; raises InputError if it is not text or not there."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{path} contains NUL bytes and is not text; save it as UTF-8")
    return text


def read_table(path: str | Path, delimiter: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """All records of a table as strings; the index is the line that each record ends in.

    The file must be strict CSV. But a tab-separated file may contain quotation marks that are not
    CSV quoting: if some field does, and all lines have the same number of tabs, quotes are read
    literally. Raises InputError, with the line, for anything else.
    """
    text_lines = read_text(path).removesuffix("\n").split("\n")
    tab_counts = {line.count("\t") for line in text_lines if line}
    quoted = (field for line in text_lines if '"' in line for field in line.split("\t"))
    has_stray_quote = any('"' in f and not re.fullmatch(QUOTED_FIELD, f) for f in quoted)
    quotes_are_characters = delimiter == "\t" and len(tab_counts) == 1 and has_stray_quote
    quoting = csv.QUOTE_NONE if quotes_are_characters else csv.QUOTE_MINIMAL
    source = (line + "\n" for line in text_lines)
    csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
    reader = csv.reader(source, delimiter=delimiter, quoting=quoting, strict=True)
    records = {}  # by the line that each ends in
    try:
        header = next(filter(None, reader), [])
        for record in filter(None, reader):
            records[reader.line_num] = record
            if len(record) != len(header):
                raise csv.Error(f"{len(record)} fields; the header has {len(header)}")
            if delimiter == "\t" and any("\t" in field for field in record):
                raise csv.Error("a field contains a tab")
    except csv.Error as error:
        place = f"{path}, line {reader.line_num}"
        raise InputError(f"{place}: {error}; is a quote missing, or not closed?") from error
    missing = ", ".join(name for name in columns if header.count(name) != 1)
    if missing:
        names = ", ".join(header)[:200]
        raise InputError(f"{path} has no column {missing}, or several; its columns are {names}")
    table = pd.DataFrame(list(records.values()), list(records), header, dtype=str)
    return table.loc[:, ~table.columns.duplicated()]


def check_values(path: str | Path, values: pd.Series, pattern: str, advice: str) -> None:
    """Raise InputError for the first value, by line, that is not like the pattern."""
    for line, value in values[~values.str.fullmatch(pattern)].items():
        raise InputError(f"{path}, line {line}: {values.name} is {value[:40]!r}; {advice}")


def check_unique(path: str | Path, ids: pd.Series) -> None:
    """Raise InputError for an id that occurs more than once."""
    for name in ids[ids.duplicated()]:
        raise InputError(f"{path}: the id {name} occurs more than once; rename one")


def read_sonnets(path: str | Path) -> pd.DataFrame:
    """Sonnets with `id` and `text`, from a CSV or from text in which a number precedes each.

    Raises InputError, naming file and sonnet, for anything else.
    """
    if Path(path).suffix.lower() == ".csv":
        sonnets = read_table(path, ",", ("id", "text"))
    else:
        header, *parts = re.split(r"^[ \t]*([0-9]+)[ \t]*$", read_text(path), flags=re.MULTILINE)
        sonnets = pd.DataFrame({"id": parts[::2], "text": parts[1::2]}, dtype=str)
        if parts and header.strip():
            first_line = header.strip().splitlines()[0]
            print(f"note: {path}: the text before the first number is not read: {first_line}")
    if sonnets.empty:
        raise InputError(f"{path} contains no sonnet: expected a number on a line, then its lines")
    check_values(path, sonnets["id"], r"\s*[0-9]{1,9}\s*", "write the number of a sonnet")
    texts = [re.sub(r"[ \t]+$", "", t, flags=re.MULTILINE).strip("\n") for t in sonnets["text"]]
    sonnets = pd.DataFrame({"id": sonnets["id"].map(int).tolist(), "text": texts})
    check_unique(path, sonnets["id"])
    for number in sonnets["id"][~sonnets["text"].str.strip().astype(bool)]:
        raise InputError(f"{path}: sonnet {number} is empty; complete it")
    return sonnets


def verse_lines(text: str) -> list[str]:
    """The lines of a sonnet that are not empty."""
    return [line for line in text.split("\n") if line.strip()]


def sonnet_prompt(text: str) -> str:
    """The first lines of a sonnet, which a model continues."""
    return "\n".join(verse_lines(text)[:GIVEN_LINES]) + "\n"


def continuation(text: str) -> str:
    """The lines after those of the prompt."""
    return "\n".join(verse_lines(text)[GIVEN_LINES:])


def read_pairs(path: str | Path) -> pd.DataFrame:
    """Pairs with `id`, `sentence1`, `sentence2` and `label`, by line, from a tab-separated file.

    `label` is 0.0, 1.0 or NaN; a file without the column is_duplicate has only NaN. Raises
    InputError, naming file and line, for a file that is not such a table.
    """
    table = read_table(path, "\t", ("id", "sentence1", "sentence2"))
    pairs = table[["sentence1", "sentence2"]].map(undo_double_quoting)
    pairs.insert(0, "id", table["id"].str.strip())
    pairs["label"] = table["is_duplicate"].str.strip() if "is_duplicate" in table else ""
    check_values(path, pairs["label"], "|[01](?:[.]0)?", "write 0 or 1, or leave it empty")
    check_values(path, pairs["id"], "[^,\n]+", "write an id without commas and line breaks")
    check_unique(path, pairs["id"])
    return pairs.assign(label=pd.to_numeric(pairs["label"].replace("", None)).astype(float))


def make_pairs(texts: list[tuple[str, str]]) -> pd.DataFrame:
    """A frame as read_pairs returns it, without labels, from two texts each."""
    pairs = pd.DataFrame(texts, columns=["sentence1", "sentence2"])
    return pairs.assign(id=pairs.index.map(str), label=float("nan"))


def undo_double_quoting(text: str) -> str:
    """Undo CSV quoting that is still there after reading, as in the course's files."""
    inner = text[1:-1]
    is_quoted = '""' in inner and re.fullmatch(QUOTED_FIELD, text)
    return inner.replace('""', '"') if is_quoted else text


class TextDataset:
    """Base of the datasets, which add `collate`: the tensors that a model's `loss` takes."""

    lengths: list[int]  # tokens per example, with the padding of a pair's shorter text
    pool = 8  # batches that are sorted by length together

    def batches(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """Shuffled batches of indices with similar lengths, a function of seed and epoch.

        Indices are shuffled, sorted by length within pools of batches, and cut into batches, whose
        order is shuffled too.
        """
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches = []
        for bucket in split(order, self.pool * batch_size):
            batches += split(sorted(bucket, key=self.lengths.__getitem__), batch_size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def num_targets(self, indices: list[int]) -> int:
        """The number of labels, of which `loss` is the mean."""
        return self.num_tokens(indices)

    def num_tokens(self, indices: list[int]) -> int:
        """The number of input tokens without padding."""
        return sum(self.lengths[index] for index in indices)


class SonnetsDataset(TextDataset):
    """Sonnets as token batches; the end-of-text token after each text is a target too."""

    def __init__(self, sonnets: pd.DataFrame, gpt: GPT2Model) -> None:
        """Tokenize the frame of read_sonnets; raises InputError for a text that is too long."""
        end, limit = require_end_of_text(gpt), gpt.config.n_positions
        self.ids = sonnets["id"].tolist()
        self.sequences, self.characters = [], 0  # of the targets; the end of a text counts as one
        encoded = gpt.encode(sonnets["text"].tolist())
        for number, text, ids in zip(self.ids, sonnets["text"], encoded, strict=True):
            if len(ids) > limit:
                raise InputError(f"sonnet {number} has {len(ids)} tokens; the model reads {limit}")
            self.sequences.append(torch.tensor([*ids, end]))
            self.characters += len(text) + 1 - len(gpt.decode(ids[:1]))
        self.lengths = [len(sequence) - 1 for sequence in self.sequences]

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """Right-padded input_ids and labels (B, T).

        labels[t] is the token after input_ids[t]; padding is IGNORE_INDEX.
        """
        inputs = [self.sequences[index][:-1] for index in indices]
        targets = [self.sequences[index][1:] for index in indices]
        return {
            "input_ids": pad_sequence(inputs, batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
        }


class PairsDataset(TextDataset):
    """Pairs as token batches; token ids are kept in compact arrays.

    `joint` encoding makes one text per pair, its prompt; `separate` makes two, each with the
    end-of-text token. Pairs without a text, or without a label where others have one, are left
    out and `skipped_lines` lists them. Sentences that are too long are cut at their ends; the lines
    of their pairs are in `truncated_lines`.
    """

    pool = 64  # 2 % padding on Quora, 9 % with 8

    def __init__(self, pairs: pd.DataFrame, gpt: GPT2Model, pair_encoding: str = "joint") -> None:
        """Tokenize the frame of read_pairs; raises InputError if no pair is complete."""
        self.gpt, self.separate = gpt, pair_encoding == "separate"
        complete = pairs[["sentence1", "sentence2"]].map(str.strip).ne("").all(axis=1)
        has_labels = pairs["label"].notna()
        complete &= has_labels | (not has_labels.any())
        if not complete.any():
            raise InputError("no pair has two texts and, where others have one, a label")
        self.all_ids = pairs["id"].tolist()  # predictions need those of skipped pairs, too
        self.skipped_lines, pairs = pairs.index[~complete].tolist(), pairs[complete]
        self.ids = pairs["id"].tolist()
        self.labels = torch.tensor(pairs["label"].to_numpy(int)) if has_labels.any() else None
        dtype = np.uint16 if gpt.config.vocab_size <= 2**16 else np.int32
        self.texts, self.truncated_lines = [], []  # token ids of the texts of each pair
        chunks = split(list(pairs[["sentence1", "sentence2"]].itertuples(name=None)), 4096)
        for chunk in tqdm(chunks, "tokenizing", delay=2, leave=False, disable=None):
            encoded = self.encode([sentences for _, *sentences in chunk])
            for (line, *sentences), texts in zip(chunk, encoded, strict=True):
                if max(map(len, texts)) > gpt.config.n_positions:
                    self.truncated_lines.append(line)
                    texts = self.encode([self.truncate(sentences)])[0]
                self.texts.append([np.array(ids, dtype) for ids in texts])
        self.lengths = [max(map(len, texts)) for texts in self.texts]

    def encode(self, pairs: list[list[str]]) -> list[list[list[int]]]:
        """The token ids of the texts of each pair."""
        if not self.separate:
            return [[ids] for ids in self.gpt.encode([prompt(*pair) for pair in pairs])]
        end = require_end_of_text(self.gpt)
        return split([[*ids, end] for ids in self.gpt.encode(list(chain(*pairs)))], 2)

    def truncate(self, sentences: list[str]) -> list[str]:
        """Cut sentences at their ends so that the pair fits: both keep an equal share of tokens."""
        overhead = max(len(ids) for ids in self.encode([["", ""]])[0])
        share = (self.gpt.config.n_positions - overhead) // (1 if self.separate else 2) - 4
        if share < 1:
            raise InputError(f"the prompt alone has {overhead} tokens, more than the model reads")
        return [self.gpt.decode(ids[:share]) for ids in self.gpt.encode(sentences)]

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """Right-padded input_ids and attention_mask, (B, T) or (B, 2, T), and labels (B,)."""
        texts = [torch.from_numpy(t.astype(int)) for index in indices for t in self.texts[index]]
        batch = {
            "input_ids": pad_sequence(texts, batch_first=True),
            "attention_mask": pad_sequence(list(map(torch.ones_like, texts)), batch_first=True),
        }
        if self.separate:
            batch = {name: value.unflatten(0, (-1, 2)) for name, value in batch.items()}
        if self.labels is not None:
            batch["labels"] = self.labels[indices]
        return batch

    def num_targets(self, indices: list[int]) -> int:
        """The number of pairs."""
        return len(indices)

    def num_tokens(self, indices: list[int]) -> int:
        """The number of input tokens without padding."""
        return sum(len(ids) for index in indices for ids in self.texts[index])


def prompt(sentence1: str, sentence2: str) -> str:
    """The prompt of joint encoding, the same in training and evaluation."""
    return (
        f'Question 1: "{sentence1}"\nQuestion 2: "{sentence2}"\n'
        "Are these questions asking the same thing?\n"
    )


def require_end_of_text(gpt: GPT2Model) -> int:
    """The model's end-of-text token; raises InputError if it has none."""
    if gpt.end_of_text is None:
        raise InputError(f"{gpt.name} has no end-of-text token: set eos_token_id in config.json")
    return gpt.end_of_text


def split(items: list, size: int) -> list[list]:
    """Consecutive slices of `size` items; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
