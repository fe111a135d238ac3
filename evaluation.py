"""What a model is judged by: loss a token, bits a character, chrF and form of what it writes; accuracy, F1; intervals.

Words rhyme that sound alike from the last stressed vowel on, by CMUdict through `pronouncing`. That is modern American
speech, in which Shakespeare's love and prove, or memory and die, are no rhymes: his own rate is the ceiling.
"""

import math
import random
import re
from collections.abc import Iterable
from itertools import islice

import numpy as np
import pronouncing  # reads CMUdict, for a second, when first asked
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import processes
from datasets import GIVEN_LINES, IGNORED, Pair, PairsDataset, Sonnet

SONNET_LINES = 14
# lines, from 0, that ABAB CDCD EFEF GG pairs; the first pair, (0, 2), is among the lines that are given
RHYMES = ((1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13))
# Student's t, 97.5 % quantile, with 1, 2, .. degrees of freedom, from any table (the tests ask scipy: too large a
# package to require for these); with more than 20, the last, which is up to 6 % too wide
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
               2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip
EVALUATION_BATCH = 32


def language_model_figures(model, batches: Iterable[dict]) -> dict[str, float]:
    """`loss` (nats a token, over all labels), `perplexity` and `bits_per_character` of a SonnetGPT on batches.

    Bits a character spread the same nats over the characters that the labels spell, so tokenizers can be compared.
    """
    device = next(model.parameters()).device
    nats, tokens, characters = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for batch in islice(batches, processes.rank(), None, processes.size()):
            labels = batch["labels"].to(device)
            count = int((labels != IGNORED).sum())
            nats += model.loss(batch["input_ids"].to(device), labels).item() * count
            tokens += count
            characters += batch["characters"]
    nats, tokens, characters = processes.total(nats, tokens, characters)
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_character": nats / math.log(2) / characters}


def chrf(texts: list[str], sonnets: list[Sonnet]) -> float:
    """Corpus chrF (Popovic 2015; sacrebleu's defaults), 0 to 100, on the continuations alone."""
    from sacrebleu.metrics import CHRF  # imported here: half a second

    written = [Sonnet(0, text).continuation for text in texts]
    return CHRF().corpus_score(written, [[sonnet.continuation for sonnet in sonnets]]).score


def chrf_floor(sonnets: list[Sonnet], train: list[Sonnet], draws: int = 20, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the chrF that no model gets: the last lines of random training sonnets."""
    generator = random.Random(seed)
    scores = [chrf([generator.choice(train).text for _ in sonnets], sonnets) for _ in range(draws)]
    mean = sum(scores) / draws
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / (draws - 1))


def copied_share(texts: list[str], train: list[Sonnet], n: int = 5) -> float:
    """Share of the continuations' word n-grams that stand in the training text; 0 where there are none."""
    known = {gram for sonnet in train for gram in _ngrams(sonnet.text, n)}
    grams = [gram for text in texts for gram in _ngrams(Sonnet(0, text).continuation, n)]
    return sum(gram in known for gram in grams) / max(1, len(grams))


def sonnet_form(texts: list[str], train: list[Sonnet]) -> dict[str, float]:
    """Form of sonnets whose first lines were given: of all their lines, or (syllables, n-grams) of those that are new.

    `rhymes` is the share of the scheme's pairs that rhyme: a pair that lacks a line, or has one word twice, does not;
    one with a word that CMUdict lacks is left out. `known_line_ends` is the share of lines whose last word it has.
    """
    sonnets = [Sonnet(0, text).lines for text in texts]
    pairs = [max(pair) < len(lines) and rhyme(*(lines[line] for line in pair)) for lines in sonnets for pair in RHYMES]
    counts = [sum(map(syllables, _words(line))) for lines in sonnets for line in lines[GIVEN_LINES:]]
    grams = [_ngrams(Sonnet(0, text).continuation, 2) for text in texts]
    figures = {
        "lines": [len(lines) for lines in sonnets],
        "14_line_rate": [len(lines) == SONNET_LINES for lines in sonnets],
        "rhymes": [pair for pair in pairs if pair is not None],
        "known_line_ends": [bool(_sounds(line)) for lines in sonnets for line in lines],
        "syllables": counts,
        "syllables_off_ten": [abs(count - 10) for count in counts],
        "distinct_2grams": [len(set(of_text)) / max(1, len(of_text)) for of_text in grams],
        "copied_5grams": [copied_share(texts, train)],
    }
    return {name: float(np.mean(values or 0)) for name, values in figures.items()}  # a model may write no line


def rhyme(first: str, second: str) -> bool | None:
    """Whether two lines end in different words that rhyme; None where CMUdict lacks one of the words."""
    sounds = _sounds(first), _sounds(second)
    return bool(sounds[0] & sounds[1]) and _words(first)[-1] != _words(second)[-1] if all(sounds) else None


def _sounds(line: str) -> set[str]:
    """What the last word of a line may rhyme on: its phones from the last stressed vowel on, without stress marks."""
    endings = [pronouncing.rhyming_part(phones) for word in _words(line)[-1:] for phones in _phones(word)]
    return {re.sub(r"\d", "", ending) for ending in endings}


def _phones(word: str) -> list[str]:
    """CMUdict's pronunciations, none for a word that it lacks; cross'd is crossed to it."""
    return pronouncing.phones_for_word(word) or pronouncing.phones_for_word(re.sub("'d$", "ed", word))


def syllables(word: str) -> int:
    """Of CMUdict's first pronunciation or, where it has none, as many as there are groups of vowel letters.

    An e that is mute at the end, as in -e, -ed and -es, is no group.
    """
    if phones := _phones(word):
        return sum(character.isdigit() for character in phones[0])  # a vowel carries its stress: 0, 1 or 2
    mute = r"(?<=[^aeiouyl])e$|(?<=[^aeiouydt])ed$|(?<=[^aeiouycghsxz])es$"
    return max(1, len(re.findall("[aeiouy]+", re.sub(mute, "", word.replace("'", "")))))


def sonnet_figures(texts: list[str], sonnets: list[Sonnet], train: list[Sonnet]) -> dict[str, float]:
    """chrF beside its floor, and form beside that of the true sonnets, and of these with their last lines shuffled.

    `texts` continue these sonnets, without a line limit; lines are shuffled among all sonnets, in 20 seeded draws.
    """
    floor, deviation = chrf_floor(sonnets, train)
    ends = [line for sonnet in sonnets for line in sonnet.lines[GIVEN_LINES:]]
    drawn = iter([line for seed in range(20) for line in random.Random(seed).sample(ends, len(ends))])
    shuffled = [s.prompt + "\n".join(islice(drawn, len(s.lines) - GIVEN_LINES)) for s in sonnets * 20]
    written = {"dev": texts, "gold_dev": [sonnet.text for sonnet in sonnets], "shuffled_dev": shuffled}
    forms = {f"{who}_{name}": value for who in written for name, value in sonnet_form(written[who], train).items()}
    return {"dev_chrf": chrf(texts, sonnets), "dev_chrf_floor": floor, "dev_chrf_floor_sd": deviation, **forms}


def _words(text: str) -> list[str]:
    """Words in lower case: letters, and apostrophes between them."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("\u2019", "'"))


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def classify(model, dataset: PairsDataset) -> Tensor:
    """Logits (N, 2) of a ParaphraseGPT on every pair, in the order of the file and in float32, on the CPU."""
    device = next(model.parameters()).device
    order = sorted(range(len(dataset)), key=dataset.lengths.__getitem__)  # like lengths together: little padding
    logits = torch.zeros(len(dataset), 2)
    model.eval()
    with torch.no_grad():
        starts = range(0, len(order), EVALUATION_BATCH)[processes.rank() :: processes.size()]
        for start in tqdm(starts, "judging", delay=2, leave=False, disable=processes.no_bar()):
            rows = order[start : start + EVALUATION_BATCH]
            batch = dataset.collate(rows)
            found = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            logits[rows] = found.float().cpu()
    logits = sum(processes.from_all(logits))  # each process filled its own rows
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights can't be used; train or copy it again")
    return logits


def classification_figures(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """`loss` (nats a pair), `accuracy`, `macro_f1` (the mean of the classes' F1) and the confusion counts."""
    predicted = logits.argmax(1)
    counts = {f"{'yes' if gold else 'no'}_judged_{'yes' if guess else 'no'}":
              int(((labels == gold) & (predicted == guess)).sum()) for gold in (0, 1) for guess in (0, 1)}  # fmt: skip
    wrong = counts["no_judged_yes"] + counts["yes_judged_no"]
    right = counts["no_judged_no"], counts["yes_judged_yes"]
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": sum(right) / len(labels),
        "macro_f1": sum(2 * hits / max(1, 2 * hits + wrong) for hits in right) / 2,
        **counts,
    }


def word_overlap(pair: Pair) -> float:
    """Jaccard index of the sets of words of the two texts, 0 to 1."""
    first, second = (set(text.lower().split()) for text in (pair.sentence1, pair.sentence2))
    return len(first & second) / len(first | second)


def overlap_threshold(pairs: Iterable[Pair]) -> float:
    """The word overlap from which on yes is right most often in these pairs."""
    known = [(word_overlap(pair), pair.label) for pair in pairs]
    thresholds = [step / 50 for step in range(52)]
    return max(thresholds, key=lambda least: sum((overlap >= least) == label for overlap, label in known))


def overlap_accuracy(pairs: Iterable[Pair], threshold: float) -> float:
    """What counting words gets on these pairs, with a threshold found on others."""
    hits = [(word_overlap(pair) >= threshold) == pair.label for pair in pairs]
    return sum(hits) / len(hits)


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of several values and its 95 % interval by Student's t: of differences of pairs, the paired t interval."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = T_QUANTILES[min(len(values) - 1, 20) - 1] * error
    return mean, mean - half, mean + half


def bootstrap_interval(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over items, from resampled items' percentiles (Efron and Tibshirani 1993, ch. 13)."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())
