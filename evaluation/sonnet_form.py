"""chrF and form of generated sonnets, next to two baselines that need no model.

Two words rhyme if they sound alike from the last stressed vowel on, according to CMUdict. That is
modern American speech, in which Shakespeare's love and prove do not rhyme: his own rate is the
upper limit.
"""

import random
import re
from collections.abc import Iterable

import numpy as np
from pronouncing import phones_for_word, rhyming_part
from sacrebleu.metrics import CHRF

from datasets import GIVEN_LINES, continuation, sonnet_prompt, verse_lines
from models.generation import Continuation, first_lines

RHYMING_LINES = ((1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13))  # ABAB CDCD EFEF GG without A
RANDOM_SAMPLES = 20


def sonnet_metrics(
    split: str, texts: list[Continuation], references: Iterable[str], train: Iterable[str]
) -> dict[str, float]:
    """chrF and form of texts that continue the references of a split, and of two baselines.

    The baselines are the references themselves (`gold_`) and the prompts with random lines of
    training sonnets (`random_`). `chrf` is of the lines after the prompt, up to the 14th;
    `chrf_with_prompt` is the course's metric, in which the given lines count. The form leaves out a
    last line that was cut off.
    """
    generator, references = random.Random(0), list(references)
    pool = [line for text in train for line in verse_lines(text)]
    baseline = []
    for text in references * RANDOM_SAMPLES:
        lines = generator.choices(pool, k=len(verse_lines(text)[GIVEN_LINES:]))
        baseline.append(sonnet_prompt(text) + "\n".join(lines))
    metrics = {f"{split}_ended": float(np.mean([text.ended for text in texts]))}
    finished = [text if ended else text.rpartition("\n")[0] for text, ended in texts]
    limited = [first_lines(text.text, 14) for text in texts]  # as in the files
    sources = {"": (finished, limited), "gold_": (references,) * 2, "random_": (baseline,) * 2}
    for source, (whole, sonnets) in sources.items():
        targets = references * (len(sonnets) // len(references))
        values = sonnet_form(whole, train)
        values["chrf"] = chrf(list(map(continuation, sonnets)), list(map(continuation, targets)))
        values["chrf_with_prompt"] = chrf(sonnets, targets)
        metrics |= {f"{source}{split}_{name}": value for name, value in values.items()}
    return metrics


def chrf(texts: list[str], references: list[str]) -> float:
    """Corpus chrF (Popovic 2015; sacrebleu's defaults), 0 to 100."""
    return CHRF().corpus_score(texts, [references]).score


def sonnet_form(texts: list[str], train: Iterable[str]) -> dict[str, float]:
    """The mean number of lines, the shares of 14 lines and rhymes, and copied 5-grams.

    `rhymes` is the share of the scheme's pairs of lines that rhyme: one that lacks a line does not,
    and one with a word that CMUdict lacks is left out. 5-grams are those of the lines after the
    prompt, and copied if a training sonnet has them.
    """
    sonnets = [verse_lines(text) for text in texts]
    rhymes = [
        other < len(lines) and rhyme(lines[one], lines[other])
        for lines in sonnets
        for one, other in RHYMING_LINES
    ]
    known = {gram for text in train for gram in five_grams(text)}
    values = {
        "lines": [len(lines) for lines in sonnets],
        "14_line_rate": [len(lines) == 14 for lines in sonnets],
        "rhymes": [value for value in rhymes if value is not None],
        "copied_5grams": [g in known for text in texts for g in five_grams(continuation(text))],
    }
    return {name: float(np.mean(numbers)) if numbers else 0.0 for name, numbers in values.items()}


def words(text: str) -> list[str]:
    """The words in lower case, with apostrophes inside."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("\u2019", "'"))


def five_grams(text: str) -> list[tuple[str, ...]]:
    """All sequences of five words."""
    return list(zip(*(words(text)[start:] for start in range(5)), strict=False))


def line_ending(line: str) -> set[str]:
    """The sounds that the last word of a line may rhyme on; empty if CMUdict does not know it."""
    last = (words(line) or [""])[-1]
    phones = phones_for_word(last) or phones_for_word(re.sub("'d$", "ed", last))  # cross'd, crossed
    return {re.sub(r"\d", "", rhyming_part(phone)) for phone in phones}


def rhyme(first: str, second: str) -> bool | None:
    """Whether two lines end in different words that rhyme; None if CMUdict lacks one of them."""
    sounds, other_sounds = line_ending(first), line_ending(second)
    if not (sounds and other_sounds):
        return None
    return not sounds.isdisjoint(other_sounds) and words(first)[-1] != words(second)[-1]
