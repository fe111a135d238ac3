"""Files to validated pandas frames, and frames to token batches."""

import csv
import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import distributed
from config import InputError
from modules.loss import IGNORE_INDEX

GIVEN_LINES = 3  # the lines of a sonnet that a model continues
PAIR_POOL = 64  # batches of pairs per length bucket: 2 % padding on Quora, 9 % with 8
csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
QUOTED_FIELD = r'"(?:[^"]|"")*"'


def read_text(path, advice):
    """A UTF-8 file with line ends as \\n; raises InputError if it is not text or not there."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{path} contains NUL bytes and is not text; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_table(path, delimiter, columns, advice):
    """All records of a table as strings, with the line that each record ends in as `line`.

    The file must be strict CSV. But a tab-separated file may contain quotation marks that are not
    CSV quoting: if some field does, and all lines have the same number of tabs, quotes are read
    literally. Raises InputError, with the line, for anything else.
    """
    text_lines = read_text(path, advice).removesuffix("\n").split("\n")
    tab_counts = {line.count("\t") for line in text_lines if line}
    quoted = (field for line in text_lines if '"' in line for field in line.split("\t"))
    has_stray_quote = any('"' in f and not re.fullmatch(QUOTED_FIELD, f) for f in quoted)
    quotes_are_characters = delimiter == "\t" and len(tab_counts) == 1 and has_stray_quote
    quoting = csv.QUOTE_NONE if quotes_are_characters else csv.QUOTE_MINIMAL
    source = (line + "\n" for line in text_lines)
    reader = csv.reader(source, delimiter=delimiter, quoting=quoting, strict=True)
    records, lines = [], []
    try:
        for record in filter(None, reader):
            records.append(record)
            lines.append(reader.line_num)
            if len(record) != len(records[0]):
                raise csv.Error(f"{len(record)} fields; the header has {len(records[0])}")
            if delimiter == "\t" and "\t" in "".join(record):
                raise csv.Error("a field contains a tab")
    except csv.Error as error:
        place = f"{path}, line {reader.line_num}"
        raise InputError(f"{place}: {error}; is a quote missing, or not closed?") from error
    text_lines.clear()  # or a large table would be in memory twice
    header = records[0] if records else []
    unusable = ", ".join(name for name in columns if header.count(name) != 1)
    if unusable:
        columns = ", ".join(header)[:200]
        raise InputError(f"{path} has no column {unusable}, or several; its columns are {columns}")
    table = pd.DataFrame(records[1:], columns=header, dtype=str)
    return table.loc[:, ~table.columns.duplicated()].assign(line=lines[1:])


def read_sonnets(path):
    """Sonnets with `id` and `text`, from a CSV or from text in which a number precedes each.

    Raises InputError, naming file and sonnet, for anything else.
    """
    advice = "check the path, or leave the option out for the bundled sonnets"
    if Path(path).suffix.lower() == ".csv":
        sonnets = read_table(path, ",", ("id", "text"), advice)
    else:
        number = r"^[ \t]*([0-9]+)[ \t]*$"
        header, *parts = re.split(number, read_text(path, advice), flags=re.MULTILINE)
        sonnets = pd.DataFrame({"id": parts[::2], "text": parts[1::2]})
        if parts and header.strip():
            shown = textwrap.shorten(header, 80)
            print(f"note: {path}: the text before the first number is not read: {shown}")
    if sonnets.empty:
        raise InputError(f"{path} contains no sonnet: expected a number on a line, then its lines")
    texts = []
    for number, text in zip(sonnets["id"], sonnets["text"], strict=True):
        text = "\n".join(map(str.rstrip, text.split("\n"))).strip("\n")
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", number):
            raise InputError(f"{path}: id {number!r} is not the number of a sonnet")
        if not 1 <= len(text) <= 2**17:
            raise InputError(
                f"{path}: sonnet {number} has {len(text)} characters; complete or shorten it"
            )
        texts.append(text)
    sonnets = pd.DataFrame({"id": sonnets["id"].map(int), "text": texts})
    check_unique(sonnets["id"], path)
    return sonnets


def check_unique(ids, path):
    """Raise InputError for an id that occurs more than once."""
    for name in ids[ids.duplicated()]:
        raise InputError(f"{path}: the id {name} occurs more than once; rename one")


def verse_lines(text):
    """The lines of a sonnet that are not empty."""
    return [line for line in text.split("\n") if line.strip()]


def sonnet_prompt(text):
    """The first lines of a sonnet, which a model continues."""
    return "\n".join(verse_lines(text)[:GIVEN_LINES]) + "\n"


def continuation(text):
    """The lines after those of the prompt."""
    return "\n".join(verse_lines(text)[GIVEN_LINES:])


class SonnetsDataset:
    """Sonnets as token batches; the end-of-text token after each text is a target too."""

    def __init__(self, sonnets, gpt):
        """Tokenize the frame of read_sonnets; raises InputError for a text that is too long."""
        end_of_text = require_end_of_text(gpt)
        self.sequences = []
        self.characters = []  # of the targets; the end of the text counts as one
        encoded = gpt.encode(sonnets["text"].tolist())
        for number, text, ids in zip(sonnets["id"], sonnets["text"], encoded, strict=True):
            limit = gpt.config.n_positions
            if not 1 <= len(ids) <= limit:
                raise InputError(f"sonnet {number} has {len(ids)} tokens; the model reads {limit}")
            self.sequences.append(torch.tensor([*ids, end_of_text]))
            self.characters.append(len(text) + 1 - len(gpt.decode(ids[:1])))
        self.lengths = [len(sequence) for sequence in self.sequences]

    def collate(self, indices):
        """Right-padded input_ids and labels (B, T).

        labels[t] is the token after input_ids[t]; padding is IGNORE_INDEX.
        """
        inputs = [self.sequences[index][:-1] for index in indices]
        targets = [self.sequences[index][1:] for index in indices]
        return {
            "input_ids": pad_sequence(inputs, batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
        }

    def num_targets(self, indices):
        """The number of labels that are not ignored, and of input tokens without padding."""
        return sum(self.lengths[index] - 1 for index in indices)


def read_pairs(path, advice="check the path"):
    """Pairs with `id`, `sentence1`, `sentence2`, `label` and `line`, from a tab-separated file.

    `label` is 0.0, 1.0 or NaN; a file without the column is_duplicate has only NaN. Raises
    InputError, naming file and line, for a file that is not such a table.
    """
    table = read_table(path, "\t", ("id", "sentence1", "sentence2"), advice)
    pairs = table[["sentence1", "sentence2"]].map(undo_double_quoting)
    pairs["line"] = table["line"]
    pairs["id"] = table["id"].str.strip()
    labels = table["is_duplicate"].str.strip() if "is_duplicate" in table else ""
    pairs["label"] = labels
    for column, pattern, advice in (
        ("label", "|[01](?:[.]0)?", "write 0 or 1, or nothing to skip the pair"),
        ("id", "[^,\n]+", "write an id without commas and line breaks"),
    ):
        bad = pairs[~pairs[column].str.fullmatch(pattern)]
        for line, value in zip(bad["line"], bad[column], strict=True):
            raise InputError(f"{path}, line {line}: the {column} is {value!r}; {advice}")
    check_unique(pairs["id"], path)
    pairs["label"] = pd.to_numeric(pairs["label"].replace("", None))
    pairs.attrs["path"] = str(path)
    return pairs


def make_pairs(texts):
    """A frame as read_pairs returns it, without labels, from a list of two texts each."""
    pairs = pd.DataFrame(texts, columns=["sentence1", "sentence2"])
    return pairs.assign(id=pairs.index, line=pairs.index, label=float("nan"))


def undo_double_quoting(text):
    """Undo CSV quoting that is still there after reading, as in the course's files."""
    inner = text[1:-1]
    is_quoted = '""' in inner and re.fullmatch(QUOTED_FIELD, text)
    return inner.replace('""', '"') if is_quoted else text


def prompt(sentence1, sentence2):
    """The prompt of joint encoding, the same in training and evaluation."""
    return (
        f'Question 1: "{sentence1}"\nQuestion 2: "{sentence2}"\n'
        "Are these questions asking the same thing?\n"
    )


class PairsDataset:
    """Pairs as token batches; token ids are kept in compact arrays.

    `joint` encoding makes one text per pair, its prompt; `separate` makes two, each with the
    end-of-text token. Pairs without a text, or without a label where others have one, are left
    out and `skipped_lines` lists them. Sentences that are too long lose their middle; the lines
    of their pairs are in `truncated_lines`.
    """

    def __init__(self, pairs, gpt, pair_encoding="joint"):
        """Tokenize the frame of read_pairs; raises InputError if no pair is complete."""
        self.gpt = gpt
        self.separate = pair_encoding == "separate"
        self.template = str if self.separate else prompt  # a separate text is the sentence itself
        self.end = [require_end_of_text(gpt)] if self.separate else []
        texts_per_pair = 2 if self.separate else 1
        sentences = pairs[["sentence1", "sentence2"]]
        complete = sentences.map(str.strip).ne("").all(axis=1)
        has_labels = pairs["label"].notna()
        if has_labels.any():
            complete &= has_labels
        if not complete.any():
            path = pairs.attrs.get("path", "the file")
            raise InputError(f"{path} has no pair with two texts and, if needed, a label")
        self.all_ids = pairs["id"].tolist()  # predictions need those of skipped pairs, too
        self.skipped_lines = pairs["line"][~complete].tolist()
        pairs = pairs[complete]
        self.ids = pairs["id"].tolist()
        self.labels = torch.tensor(pairs["label"].to_numpy(int)) if has_labels.any() else None
        dtype = np.uint16 if gpt.config.vocab_size <= 2**16 else np.int32
        lines = pairs["line"].repeat(texts_per_pair)
        texts = sentences[complete].to_numpy().reshape(len(lines), -1).tolist()
        sequences, is_truncated = [], []
        chunks = split(texts, 4096)
        for chunk in tqdm(chunks, "tokenizing", delay=2, leave=False, disable=distributed.no_bar()):
            for text, ids in zip(chunk, self.encode(chunk), strict=True):
                is_truncated.append(len(ids) > gpt.config.n_positions)
                sequences.append(np.array(self.truncate(text) if is_truncated[-1] else ids, dtype))
        self.truncated_lines = lines[is_truncated].unique().tolist()
        self.sequences = split(sequences, texts_per_pair)
        self.lengths = [max(map(len, texts)) for texts in self.sequences]

    def encode(self, texts):
        """Token ids of texts, each a list of one sentence or of both."""
        encoded = self.gpt.encode([self.template(*sentences) for sentences in texts])
        return [ids + self.end for ids in encoded]

    def truncate(self, sentences):
        """Remove characters from the middle of the longest sentence until the tokens fit."""
        while True:
            ids = self.encode([sentences])[0]
            excess = len(ids) - self.gpt.config.n_positions
            if excess <= 0:
                return ids
            longest = max(sentences, key=len)
            if not longest:
                raise InputError(f"the prompt alone has {excess} tokens more than the model reads")
            removed = min(excess, len(longest)) // 4 + 1  # a character may be four tokens
            start = (len(longest) - removed) // 2
            shorter = longest[:start] + longest[start + removed :]
            sentences[sentences.index(longest)] = shorter

    def __len__(self):
        return len(self.ids)

    def texts(self, index):
        """The token ids of a pair: of its prompt, or of its two sentences."""
        return self.sequences[index]

    def collate(self, indices):
        """Right-padded input_ids and attention_mask, (B, T) or (B, 2, T), and labels (B,)."""
        texts = [text for index in indices for text in self.texts(index)]
        texts = [torch.from_numpy(text.astype(int)) for text in texts]
        batch = {
            "input_ids": pad_sequence(texts, batch_first=True),
            "attention_mask": pad_sequence(list(map(torch.ones_like, texts)), batch_first=True),
        }
        if self.separate:
            batch = {name: value.unflatten(0, (-1, 2)) for name, value in batch.items()}
        return batch if self.labels is None else {**batch, "labels": self.labels[indices]}

    def num_tokens(self, indices):
        """The number of input tokens without padding."""
        return sum(len(text) for index in indices for text in self.texts(index))


def require_end_of_text(gpt):
    """The model's end-of-text token; raises InputError if it has none."""
    if gpt.end_of_text is None:
        raise InputError(f"{gpt.folder} has no end-of-text token: set eos_token_id in config.json")
    return gpt.end_of_text


def bucketed_batches(lengths, batch_size, seed, epoch, pool=8):
    """Shuffled batches of indices with similar lengths, a function of seed and epoch.

    Indices are shuffled, sorted by length within pools of `pool` batches, and cut into batches,
    whose order is shuffled too.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for bucket in split(order, pool * batch_size):
        batches += split(sorted(bucket, key=lengths.__getitem__), batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def split(items, size):
    """Consecutive slices of `size` items; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
