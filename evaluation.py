"""What a model is judged by: loss per token, perplexity and bits a character; chrF and form of what it writes."""

import math
import random
from collections.abc import Iterable

import torch

from datasets import GIVEN_LINES, IGNORED, Sonnet

SONNET_LINES = 14


def language_model_figures(model, batches: Iterable[dict]) -> dict[str, float]:
    """`loss` (nats a token, over all labels), `perplexity` and `bits_per_character` of a SonnetGPT on batches.

    Bits a character spread the same nats over the characters that the labels spell, so tokenizers can be compared.
    """
    device = next(model.parameters()).device
    nats, tokens, characters = 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"].to(device)
            count = int((labels != IGNORED).sum())
            nats += model.loss(batch["input_ids"].to(device), labels).item() * count
            tokens += count
            characters += batch["characters"]
    loss = nats / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_character": nats / math.log(2) / characters}


def continuation(text: str) -> str:
    """The lines after the given ones, of a sonnet or of what a model made of its beginning."""
    return "\n".join([line for line in text.split("\n") if line.strip()][GIVEN_LINES:])


def chrf(texts: list[str], sonnets: list[Sonnet]) -> float:
    """Corpus chrF (Popovic 2015; sacrebleu's defaults), 0 to 100, on the continuations alone."""
    from sacrebleu.metrics import CHRF  # imported here: half a second

    return CHRF().corpus_score([continuation(text) for text in texts], [[s.continuation for s in sonnets]]).score


def chrf_floor(sonnets: list[Sonnet], train: list[Sonnet], draws: int = 20, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the chrF that no model gets: the last lines of random training sonnets."""
    generator = random.Random(seed)
    scores = [chrf([generator.choice(train).text for _ in sonnets], sonnets) for _ in range(draws)]
    mean = sum(scores) / draws
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / (draws - 1))


def whole_sonnet_rate(texts: list[str]) -> float:
    """Share of texts with exactly 14 lines; meaningful where nothing stopped them at the 14th."""
    return sum(len([line for line in text.split("\n") if line.strip()]) == SONNET_LINES for text in texts) / len(texts)


def copied_share(texts: list[str], train: list[Sonnet], n: int = 5) -> float:
    """Share of the continuations' word n-grams that stand in the training text; 0 where there are none."""
    known = {gram for sonnet in train for gram in _ngrams(sonnet.text, n)}
    grams = [gram for text in texts for gram in _ngrams(continuation(text), n)]
    return sum(gram in known for gram in grams) / max(1, len(grams))


def sonnet_figures(texts: list[str], sonnets: list[Sonnet], train: list[Sonnet]) -> dict[str, float]:
    """chrF beside its floor, form and copying of the continuations of dev sonnets, written without a line limit."""
    floor, deviation = chrf_floor(sonnets, train)
    return {
        "dev_chrf": chrf(texts, sonnets),
        "dev_chrf_floor": floor,
        "dev_chrf_floor_sd": deviation,
        "dev_14_line_rate": whole_sonnet_rate(texts),
        "dev_copied_5grams": copied_share(texts, train),
    }


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = [word.strip(".,;:!?'\"()-") for word in text.lower().split()]
    return list(zip(*(words[start:] for start in range(n)), strict=False))
