"""What a model is judged by: loss a token, bits a character, chrF and form of what it writes; accuracy and F1."""

import math
import random
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from datasets import GIVEN_LINES, IGNORED, Pair, PairsDataset, Sonnet

SONNET_LINES = 14
EVALUATION_BATCH = 32


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


def classify(model, dataset: PairsDataset) -> Tensor:
    """Logits (N, 2) of a ParaphraseGPT on every pair, in the order of the file and in float32, on the CPU."""
    device = next(model.parameters()).device
    order = sorted(range(len(dataset)), key=dataset.lengths.__getitem__)  # like lengths together: little padding
    logits = torch.empty(len(dataset), 2)
    model.eval()
    with torch.no_grad():
        for start in tqdm(range(0, len(order), EVALUATION_BATCH), "judging", delay=2, leave=False, disable=None):
            rows = order[start : start + EVALUATION_BATCH]
            batch = dataset.collate(rows)
            found = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            logits[rows] = found.float().cpu()
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
