"""Files to validated pandas frames, and frames to token batches."""

import csv
import io
import re
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from config import InputError
from models.gpt2 import GPT2Model
from modules.loss import IGNORE_INDEX

GIVEN_LINES = 3  # the lines of a sonnet that a model continues
# Joint encoding, the same in training and evaluation
PROMPT = 'Question 1: "{}"\nQuestion 2: "{}"\nAre these questions asking the same thing?\n'


def read_text(path: str | Path) -> str:
    """A UTF-8 file with line ends as \\n; raises InputError if it is not text or not there."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_table(path: str | Path, delimiter: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """All records of a table as strings; the index is the line that each record ends in.

    The file must be strict CSV. But if some quotes are not those of CSV, and all lines have the
    same number of delimiters, all quotes are read literally. Raises InputError, with the line, for
    anything else.
    """
    text = read_text(path)
    counts = {line.count(delimiter) for line in text.split("\n") if line}
    quoted_field = rf'(?m)(^|{delimiter})"([^"{delimiter}\n]|"")*"(?=$|{delimiter})'
    has_stray = '"' in re.sub(quoted_field, "", text)
    quoting = csv.QUOTE_NONE if has_stray and len(counts) == 1 else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
    records = {}  # by the line that each ends in
    try:
        header = next(filter(None, reader), [])
        for record in filter(None, reader):
            records[reader.line_num] = record
            if len(record) != len(header):
                raise csv.Error(f"{len(record)} fields; the header has {len(header)}")
            if delimiter == "\t" and any("\t" in field for field in record):
                raise csv.Error("a field contains a tab")  # a stray quote has joined fields
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; is a quote missing?") from error
    for name in (*columns, *{"is_duplicate"}.intersection(header)):
        if header.count(name) != 1:
            raise InputError(f"{path} has no column {name}, or several: {str(header)[:200]}")
    return pd.DataFrame(list(records.values()), list(records), header, dtype=str)


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
        parts = re.split(r"^[ \t]*([0-9]+)[ \t]*$", read_text(path), flags=re.MULTILINE)[1:]
        sonnets = pd.DataFrame({"id": parts[::2], "text": parts[1::2]}, dtype=str)
    if sonnets.empty:
        raise InputError(f"{path} contains no sonnet: expected a number on a line, then its lines")
    check_values(path, sonnets["id"], r"\s*[0-9]{1,9}\s*", "write the number of a sonnet")
    texts = sonnets["text"].str.replace(r"(?m)[ \t]+$", "", regex=True).str.strip("\n")
    sonnets = pd.DataFrame({"id": sonnets["id"].map(int), "text": texts}).reset_index(drop=True)
    check_unique(path, sonnets["id"])
    for number in sonnets["id"][texts.str.strip().eq("").to_numpy()]:
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
    is_quoted = '""' in text[1:-1] and re.fullmatch(r'"([^"]|"")*"', text)
    return text[1:-1].replace('""', '"') if is_quoted else text


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
        self.ids, limit = sonnets["id"].tolist(), gpt.config.n_positions
        self.sequences, self.characters = [], 0  # of the targets; the end of a text counts as one
        encoded = gpt.encode(sonnets["text"].tolist())
        for number, text, ids in zip(self.ids, sonnets["text"], encoded, strict=True):
            if len(ids) > limit:
                raise InputError(f"sonnet {number} has {len(ids)} tokens; the model reads {limit}")
            self.sequences.append(torch.tensor([*ids, gpt.end_of_text]))
            self.characters += len(text) + 1 - len(gpt.decode(ids[:1]))
        self.lengths = [len(sequence) - 1 for sequence in self.sequences]

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """Right-padded input_ids and labels (B, T).

        labels[t] is the token after input_ids[t]; padding is IGNORE_INDEX.
        """
        padded = pad([self.sequences[index] for index in indices])
        return {"input_ids": padded[:, :-1].clamp(min=0), "labels": padded[:, 1:]}


class PairsDataset(TextDataset):
    """Pairs as token batches.

    `joint` encoding makes one text per pair, its prompt; `separate` makes two, each with the
    end-of-text token. Pairs without a text, or without a label where others have one, are left
    out and `skipped_lines` lists them. Sentences that are too long are cut at their ends; the lines
    of their pairs are in `truncated_lines`.
    """

    pool = 64  # 2 % padding on Quora, 9 % with 8

    def __init__(self, pairs: pd.DataFrame, gpt: GPT2Model, pair_encoding: str = "joint") -> None:
        """Tokenize the frame of read_pairs; raises InputError if no pair is complete."""
        self.gpt, self.separate = gpt, pair_encoding == "separate"
        texts, labels = pairs[["sentence1", "sentence2"]], pairs["label"]
        complete = texts.map(str.strip).ne("").all(axis=1) & (labels.notna() | labels.isna().all())
        if not complete.any():
            raise InputError("no pair has two texts and, where others have one, a label")
        self.all_ids = pairs["id"].tolist()  # predictions need those of skipped pairs, too
        self.ids = pairs["id"][complete].tolist()
        self.skipped_lines = pairs.index[~complete].tolist()
        self.labels = torch.tensor(labels[complete].to_numpy(int)) if labels.notna().any() else None
        self.texts, self.truncated_lines = [], []  # token ids of the texts of each pair
        # In chunks, because the tokenizer needs much more memory than the token ids.
        chunks = split(list(texts[complete].itertuples(name=None)), 4096)
        for chunk in tqdm(chunks, "tokenizing", leave=False, disable=None):
            encoded = self.encode([sentences for _, *sentences in chunk])
            for (line, *sentences), tokens in zip(chunk, encoded, strict=True):
                if max(map(len, tokens)) > gpt.config.n_positions:
                    self.truncated_lines.append(line)
                    tokens = self.encode([self.truncate(sentences)])[0]
                self.texts.append([torch.tensor(ids, dtype=torch.int32) for ids in tokens])
        self.lengths = [max(map(len, texts)) for texts in self.texts]

    def encode(self, pairs: list[list[str]]) -> list[list[list[int]]]:
        """The token ids of the texts of each pair."""
        if not self.separate:
            return [[ids] for ids in self.gpt.encode([PROMPT.format(*pair) for pair in pairs])]
        encoded = self.gpt.encode([text for pair in pairs for text in pair])
        return split([[*ids, self.gpt.end_of_text] for ids in encoded], 2)

    def truncate(self, sentences: list[str]) -> list[str]:
        """Cut sentences at their ends so that the pair fits: both keep an equal share of tokens."""
        overhead = max(len(ids) for ids in self.encode([["", ""]])[0])
        share = (self.gpt.config.n_positions - overhead) // (1 if self.separate else 2) - 4
        return [self.gpt.decode(ids[:share]) for ids in self.gpt.encode(sentences)]

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """Right-padded input_ids and attention_mask, (B, T) or (B, 2, T), and labels (B,)."""
        padded = pad([text for index in indices for text in self.texts[index]])
        padded = padded.unflatten(0, (len(indices), -1)).squeeze(1)  # only joint has one text
        batch = {"input_ids": padded.clamp(min=0), "attention_mask": (padded >= 0).long()}
        if self.labels is not None:
            batch["labels"] = self.labels[indices]
        return batch

    def num_targets(self, indices: list[int]) -> int:
        """The number of pairs."""
        return len(indices)

    def num_tokens(self, indices: list[int]) -> int:
        """The number of input tokens without padding."""
        return sum(len(ids) for index in indices for ids in self.texts[index])


def pad(texts: list[Tensor]) -> Tensor:
    """Token ids (B, T) of texts, padded on the right with IGNORE_INDEX, which is negative."""
    return pad_sequence(texts, batch_first=True, padding_value=IGNORE_INDEX).long()


def split(items: list, size: int) -> list[list]:
    """Consecutive slices of `size` items; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
