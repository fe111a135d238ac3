"""Files to records, records to token batches: readers that say what is wrong and where, and the sampler of batches."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import InputError

IGNORED = -100  # the label of a position that no loss is taken at
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
        if not sonnet.text:
            raise InputError(f"{path}: sonnet {sonnet.number} has no text; remove it or complete it")
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
            if len(encoding.ids) > gpt.config.positions:
                raise InputError(f"sonnet {sonnet.number} has {len(encoding.ids)} tokens; the model reads at most "
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
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(inputs, batch_first=True),
            "attention_mask": pad([torch.ones_like(row) for row in inputs], batch_first=True),
            "labels": pad(targets, batch_first=True, padding_value=IGNORED),
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
