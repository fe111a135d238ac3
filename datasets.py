"""Files to records, records to token batches: readers that say what is wrong and where, and the sampler of batches."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import processes
from config import InputError

IGNORED = -100  # the label of a position that no loss is taken at
POOL = 64  # batches of pairs that are sorted together: 2 % of what is read is padding then, at 8 it is 9 %
GIVEN_LINES = 3  # a sonnet is to be continued from its first three


@dataclass(frozen=True)
class Sonnet:
    """A sonnet's number in the sequence and its text, line breaks and the couplet's indent included."""

    number: int
    text: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.split("\n") if line.strip()]

    @property
    def prompt(self) -> str:
        """The lines that a continuation is given, the last one ended."""
        return "\n".join(self.lines[:GIVEN_LINES]) + "\n"

    @property
    def continuation(self) -> str:
        return "\n".join(self.lines[GIVEN_LINES:])


def read_text(path: str | Path, way_out: str) -> str:
    """A whole UTF-8 file, line ends as \\n; raises InputError, naming the file, for what can't be read."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); {way_out}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{path} holds NUL bytes; it is not a text file, or UTF-16: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_sonnets(path: str | Path) -> list[Sonnet]:
    """Sonnets from a CSV with the columns id and text, or from text in which a number on its own line opens each.

    Raises InputError, naming file and row, for anything else.
    """
    text = read_text(path, "check the path, or leave the option out for the embedded sonnets")
    parse = _parse_csv if Path(path).suffix.lower() == ".csv" else _parse_numbered
    sonnets = [Sonnet(number, _clean(body)) for number, body in parse(text, path)]
    if not sonnets:
        raise InputError(f"{path} holds no sonnet; expected a number on a line of its own, then the sonnet's lines")
    seen = set()
    for sonnet in sonnets:
        if not 1 <= len(sonnet.text) <= 2**17:  # more than 1,024 tokens spell, and slow to count in tokens
            raise InputError(f"{path}: sonnet {sonnet.number} has {len(sonnet.text)} characters; complete or shorten")
        if sonnet.number in seen:
            raise InputError(f"{path}: sonnet {sonnet.number} occurs twice; remove one")
        seen.add(sonnet.number)
    return sonnets


def _parse_csv(text: str, path: str | Path) -> list[tuple[int, str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV file that can be read ({error})") from error
    for column in ("id", "text"):
        if rows and column not in rows[0]:
            raise InputError(f"{path} has no column {column}; its columns are {', '.join(map(str, rows[0]))}")
    sonnets = []
    for index, row in enumerate(rows, start=2):
        if None in row:
            raise InputError(f"{path}, row {index}: more fields than the header has; put quotes round the text")
        if not re.fullmatch(r"\s*[0-9]{1,9}\s*", row["id"] or "") or row["text"] is None:
            raise InputError(f"{path}, row {index}: id {row['id']!r} is not a sonnet's number, or the text is missing")
        sonnets.append((int(row["id"]), row["text"]))
    return sonnets


def _parse_numbered(text: str, path: str | Path) -> list[tuple[int, str]]:
    parts = re.split(r"^[ \t]*([0-9]{1,9})[ \t]*$", text, flags=re.MULTILINE)[1:]  # what precedes the first is a header
    return [(int(number), body) for number, body in zip(parts[::2], parts[1::2], strict=True)]


def _clean(text: str) -> str:
    """Without empty lines around and white space at line ends."""
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


class SonnetsDataset:
    """Sonnets as token batches; each text is followed by the end-of-text token, so that a model learns to stop."""

    def __init__(self, sonnets: list[Sonnet], gpt):
        """Tokenize once with a GPT2Model's tokenizer; raises InputError for a sonnet longer than its positions."""
        self.sonnets = sonnets
        self.sequences = []
        for sonnet, encoding in zip(sonnets, gpt.tokenizer.encode_batch([s.text for s in sonnets]), strict=True):
            if not 1 <= len(encoding.ids) <= gpt.config.positions:
                raise InputError(f"sonnet {sonnet.number} has {len(encoding.ids)} tokens; the model reads 1 to at most "
                                 f"{gpt.config.positions}: shorten or split it")  # fmt: skip
            self.sequences.append(torch.tensor([*encoding.ids, gpt.end_of_text]))
        self.first_token_characters = [len(gpt.tokenizer.decode(sequence[:1].tolist())) for sequence in self.sequences]

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    def collate(self, rows: list[int]) -> dict[str, Tensor | int]:
        """Right-padded `input_ids`, `attention_mask` and `labels` (B, T): a position's label is the token after it.

        `characters` counts what the labels spell, end of text as one, so that losses compare across tokenizers.
        """
        inputs = [self.sequences[row][:-1] for row in rows]
        targets = [self.sequences[row][1:] for row in rows]
        return {
            **_padded(inputs),
            "labels": torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            "characters": sum(len(self.sonnets[row].text) + 1 - self.first_token_characters[row] for row in rows),
        }

    @staticmethod
    def targets(batch: dict) -> int:
        """How many labels a loss is taken at."""
        return int((batch["labels"] != IGNORED).sum())

    def in_order(self, batch_size: int) -> list[dict]:
        """All batches in file order, for evaluation."""
        rows = range(len(self.sequences))
        return [self.collate(list(rows[start : start + batch_size])) for start in rows[::batch_size]]


@dataclass(frozen=True)
class Pair:
    """Two texts, whether they mean the same (1, 0, or None where unknown), and the line of the file they end in."""

    line: int
    id: str
    sentence1: str
    sentence2: str
    label: int | None


def read_pairs(path: str | Path, way_out: str, dropped: list[int]) -> Iterator[Pair]:
    """The pairs of a tab-separated file with the columns id, sentence1, sentence2 and, if known, is_duplicate.

    A row without a sentence, or with an empty label, is left out and its line added to `dropped`. Raises InputError,
    naming file and line, for anything else that is not a pair.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(chain(file, ["\t\n"]), delimiter="\t")  # ends up in a field whose quote is still open
            header = next(rows, [])
            lacking = [name for name in ("id", "sentence1", "sentence2") if name not in header]
            if lacking:
                found = repr("\t".join(header))[:200]
                raise InputError(f"{path} lacks the column {', '.join(lacking)} in its tab-separated header, {found}")
            for row in rows:
                if row in ([], ["", ""]):  # an empty line, or the one added
                    continue
                pair = _as_pair(header, row, f"{path}, line {rows.line_num}", rows.line_num)
                if pair:
                    yield pair
                else:
                    dropped.append(rows.line_num)
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); {way_out}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (after line {rows.line_num}: {error.reason}); save it so") from error
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}; is a quote opened and not closed?") from error


def _as_pair(header: list[str], row: list[str], place: str, line: int) -> Pair | None:
    if len(row) > len(header):
        raise InputError(f"{place}: {len(row)} fields where the header has {len(header)}; put quotes round the text")
    if any(("\n" in text and "\t" in text) or "\0" in text for text in row):
        raise InputError(f"{place}: a field holds tabs and line breaks, or NUL bytes; is a quote not closed?")
    fields = dict(zip(header, map(_unquoted, row), strict=False))
    label = fields.get("is_duplicate", "")
    unlabelled = "is_duplicate" in header and not label
    if unlabelled or not fields.get("sentence1") or not fields.get("sentence2"):
        return None
    if label not in ("", "0", "1", "0.0", "1.0"):
        raise InputError(f"{place}: is_duplicate is {label!r}; write 0 or 1, or leave it empty to drop the row")
    name = fields.get("id", "")
    if not name or set(name) & {",", "\n"}:
        raise InputError(f"{place}: the id {name!r} is empty or not fit for a line of predictions; rename it")
    return Pair(line, name, fields["sentence1"], fields["sentence2"], int(float(label)) if label else None)


def _unquoted(text: str) -> str:
    """The text without the quotes that the course's files have round texts with quotes, once more than CSV needs."""
    text = text.strip()
    inner = text[1:-1]
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' in inner and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"').strip()
    return text


def prompt(sentence1: str, sentence2: str) -> str:
    """The one prompt that a pair is read in: in training, on dev and on test."""
    return f'Question 1: "{sentence1}"\nQuestion 2: "{sentence2}"\nAre these questions asking the same thing?\n'


class PairsDataset:
    """Pairs as token batches. Ids of tokens are kept in one compact array: 400,000 pairs take some 60 MB.

    With `joint` encoding a pair is one text, its prompt; with `separate` it is two, each ended by end of text.
    """

    def __init__(self, path: str | Path, gpt, pair_encoding: str = "joint", way_out: str = "check the path"):
        """Tokenize with a GPT2Model's tokenizer; raises InputError as read_pairs does, and for an id that occurs twice.

        A text longer than the model's positions loses the middle of its longer sentence; `shortened` has its line.
        """
        self.path, self.way_out, self.joint = path, way_out, pair_encoding == "joint"
        self.tokenizer, self.positions, self.end_of_text = gpt.tokenizer, gpt.config.positions, gpt.end_of_text
        self.ids: list[str] = []
        self.dropped: list[int] = []  # lines of the file without a sentence or a label
        self.shortened: list[int] = []
        kind = np.uint16 if gpt.config.vocab_size <= 2**16 else np.int32
        tokens, lengths, labels = [np.empty(0, kind)], [], []
        about = {"desc": f"reading {Path(path).name}", "unit": "pair", "delay": 1, "disable": processes.no_bar()}
        pairs = iter(tqdm(self.read(), leave=False, **about))
        while chunk := list(islice(pairs, 4096)):
            texts = list(self._encode(chunk))
            tokens.append(np.fromiter(chain.from_iterable(texts), kind))
            lengths.append(np.fromiter(map(len, texts), np.int64))
            self.ids += [pair.id for pair in chunk]
            labels += [pair.label for pair in chunk]
        if not self.ids:
            raise InputError(f"{path} holds no complete pair; {way_out}")
        name, count = Counter(self.ids).most_common(1)[0]
        if count > 1:
            raise InputError(f"{path}: the id {name} occurs {count} times; give each pair an id of its own")
        self.tokens, self.text_lengths = np.concatenate(tokens), np.concatenate(lengths)
        self.ends = self.text_lengths.cumsum()
        self.labels = None if None in labels else torch.tensor(labels)

    def read(self) -> Iterator[Pair]:
        """The file's pairs, in order; `dropped` is filled anew on the way."""
        self.dropped.clear()
        return read_pairs(self.path, self.way_out, self.dropped)

    def _encode(self, pairs: list[Pair]) -> Iterator[list[int]]:
        """The tokens of every text of these pairs, a text or two a pair."""
        if self.joint:
            texts = [prompt(pair.sentence1, pair.sentence2) for pair in pairs]
        else:
            texts = list(chain.from_iterable((pair.sentence1, pair.sentence2) for pair in pairs))
        for index, encoding in enumerate(self.tokenizer.encode_batch_fast(texts)):
            ids = encoding.ids if self.joint else [*encoding.ids, self.end_of_text]
            excess = len(ids) - self.positions
            if excess > 0:
                pair = pairs[index if self.joint else index // 2]
                if pair.line not in self.shortened[-1:]:
                    self.shortened.append(pair.line)
                ids = self._shortened(pair) if self.joint else _without_middle(ids, excess)
            yield ids

    def _shortened(self, pair: Pair) -> list[int]:
        """The prompt's tokens, as many as fit: the middle of the longer sentence is left out, more until they do."""
        tokenizer = self.tokenizer
        sentences = [tokenizer.encode(sentence).ids for sentence in (pair.sentence1, pair.sentence2)]
        while True:
            # a token cut in two may be half a character
            ids = tokenizer.encode(prompt(*(tokenizer.decode(s).replace("\ufffd", "") for s in sentences))).ids
            excess = len(ids) - self.positions
            if excess <= 0:
                return ids
            if not any(sentences):
                raise InputError(f"the prompt alone has {len(ids)} tokens; this model has {self.positions} positions")
            shorter, longer = sorted(sentences, key=len)  # first what the longer one has more, then from both
            count = min(excess, len(longer), max(len(longer) - len(shorter), (excess + 1) // 2))
            sentences[sentences.index(longer)] = _without_middle(longer, count)

    def __len__(self) -> int:
        return len(self.ids)

    def texts(self, row: int) -> list[Tensor]:
        """The token ids of a pair: its prompt's, or those of each sentence."""
        numbers = [row] if self.joint else [2 * row, 2 * row + 1]
        spans = [(self.ends[number] - self.text_lengths[number], self.ends[number]) for number in numbers]
        return [torch.from_numpy(self.tokens[start:end].astype(np.int64)) for start, end in spans]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every pair's longest text, which decide how much a batch pads."""
        return self.text_lengths.reshape(len(self), -1).max(1).tolist()

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        """Right-padded `input_ids` and `attention_mask`, (B, T) joint or (B, 2, T) separate; `labels` (B,) if known."""
        batch = _padded([text for row in rows for text in self.texts(row)])
        if not self.joint:
            batch = {name: value.unflatten(0, (-1, 2)) for name, value in batch.items()}
        return batch if self.labels is None else {**batch, "labels": self.labels[rows]}


def _padded(texts: list[Tensor]) -> dict[str, Tensor]:
    """Right-padded `input_ids` and `attention_mask`."""
    ids, masks = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                  for rows in (texts, [torch.ones_like(text) for text in texts]))  # fmt: skip
    return {"input_ids": ids, "attention_mask": masks}


def _without_middle(ids: list[int], count: int) -> list[int]:
    """The ids without `count` in the middle."""
    start = (len(ids) - count) // 2
    return ids[:start] + ids[start + count :]


def bucketed_batches(lengths: list[int], batch_size: int, seed: int, epoch: int, pool: int = 8) -> list[list[int]]:
    """Shuffled batches of rows of like length, so that little is padded; a function of seed and epoch alone.

    Rows are shuffled, sorted by length within pools of `pool` batches, cut into batches, and the batches shuffled.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), pool * batch_size):
        group = sorted(order[start : start + pool * batch_size], key=lengths.__getitem__)
        batches += [group[first : first + batch_size] for first in range(0, len(group), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
