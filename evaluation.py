"""Metrics: loss, bits per character, chrF and form of sonnets; accuracy, F1, confidence intervals.

Two words rhyme if they sound alike from the last stressed vowel on, according to CMUdict. That is
modern American speech, in which Shakespeare's love and prove do not rhyme: his own rate is the
upper limit.
"""

import math
import random
import re
from statistics import NormalDist

import numpy as np
import pandas as pd
import pronouncing
import torch
import torch.nn.functional as F
from sacrebleu.metrics import CHRF
from tqdm import tqdm

import distributed
from datasets import GIVEN_LINES, continuation, sonnet_prompt, split, verse_lines

RHYMING_LINES = ((1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13))  # ABAB CDCD EFEF GG without A
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (scipy is too large for these)
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
BATCH_SIZE = 32


@torch.no_grad()
def language_model_metrics(model, dataset):
    """`loss` (nats per token), `perplexity` and `bits_per_character` of a SonnetGPT, and its texts.

    Bits per character divide the same loss by characters, so that tokenizers are comparable. The
    second value is a frame with the `loss` per token of each text and its `num_targets`.
    """
    device = next(model.parameters()).device
    losses = torch.zeros(len(dataset.lengths), dtype=torch.float64, device=device)
    model.eval()
    for index in range(len(losses))[distributed.rank() :: distributed.world_size()]:
        batch = dataset.collate([index])  # a single text needs no padding
        losses[index] = model.loss(batch["input_ids"].to(device), batch["labels"].to(device))
    losses = distributed.all_reduce(losses).cpu()  # each process filled its own texts
    num_targets = torch.tensor(dataset.lengths) - 1
    loss_sum = (losses * num_targets).sum().item()
    loss = loss_sum / num_targets.sum().item()
    bits = loss_sum / math.log(2) / sum(dataset.characters)
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_character": bits}
    return metrics, pd.DataFrame({"loss": losses, "num_targets": num_targets})


def chrf(texts, references):
    """Corpus chrF of the continuations (Popovic 2015; sacrebleu's defaults), 0 to 100."""
    references = list(map(continuation, references))
    return CHRF().corpus_score(list(map(continuation, texts)), [references]).score


def words(text):
    """The words in lower case, with apostrophes inside."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower().replace("\u2019", "'"))


def ngrams(text, n):
    return list(zip(*(words(text)[start:] for start in range(n)), strict=False))


def pronunciations(word):
    """CMUdict's pronunciations, which may be none; cross'd is looked up as crossed."""
    lookup = pronouncing.phones_for_word
    return lookup(word) or lookup(re.sub("'d$", "ed", word))


def syllables(word):
    """Syllables of CMUdict's first pronunciation, else the number of groups of vowel letters.

    An e that is silent at the end, as in -e, -ed and -es, is not counted.
    """
    if phones := pronunciations(word):
        return pronouncing.syllable_count(phones[0])
    silent = r"(?<=[^aeiouyl])e$|(?<=[^aeiouydt])ed$|(?<=[^aeiouycghsxz])es$"
    return max(1, len(re.findall("[aeiouy]+", re.sub(silent, "", word.replace("'", "")))))


def line_ending(line):
    """The sounds that the last word of a line may rhyme on; empty if CMUdict does not know it."""
    phones = [p for word in words(line)[-1:] for p in pronunciations(word)]
    return {re.sub(r"\d", "", pronouncing.rhyming_part(p)) for p in phones}


def rhyme(first, second):
    """Whether two lines end in different words that rhyme; None if CMUdict lacks one of them."""
    sounds, other_sounds = line_ending(first), line_ending(second)
    if not (sounds and other_sounds):
        return None
    return not sounds.isdisjoint(other_sounds) and words(first)[-1] != words(second)[-1]


def sonnet_form(texts, train):
    """Form of sonnets; syllables and n-grams are those of the lines after the prompt.

    `rhymes` is the share of the scheme's pairs of lines that rhyme: one that lacks a line does not
    and one with a word that CMUdict lacks is left out.
    """
    sonnets = [verse_lines(text) for text in texts]
    rhymes, counts = [], []
    for lines in sonnets:
        counts += [sum(map(syllables, words(line))) for line in lines[GIVEN_LINES:]]
        for one, other in RHYMING_LINES:
            rhymes.append(other < len(lines) and rhyme(lines[one], lines[other]))
    train_ngrams = {gram for text in train for gram in ngrams(text, 5)}
    values = {
        "lines": [len(lines) for lines in sonnets],
        "14_line_rate": [len(lines) == 14 for lines in sonnets],
        "rhymes": [value for value in rhymes if value is not None],
        "syllables": counts,
        "syllables_off_ten": [abs(count - 10) for count in counts],
        "copied_5grams": [
            g in train_ngrams for text in texts for g in ngrams(continuation(text), 5)
        ],
    }
    return {name: float(np.mean(numbers or 0)) for name, numbers in values.items()}


def sonnet_metrics(texts, references, train, samples=20):
    """chrF and form of `texts`, which continue the references, next to two baselines.

    The baselines are the references themselves (`gold_`) and the prompts with random lines of
    training sonnets (`random_`), which need no model.
    """
    generator = random.Random(0)
    pool = [line for text in train for line in verse_lines(text)]
    baseline = []
    for text in references * samples:
        lines = generator.choices(pool, k=len(verse_lines(text)[GIVEN_LINES:]))
        baseline.append(sonnet_prompt(text) + "\n".join(lines))
    metrics = {}
    for source, sonnets in (("", texts), ("gold_", references), ("random_", baseline)):
        form = sonnet_form(sonnets, train)
        form["chrf"] = chrf(sonnets, references * (len(sonnets) // len(references)))
        metrics |= {f"{source}dev_{name}": value for name, value in form.items()}
    return metrics


@torch.no_grad()
def classify(model, dataset):
    """Logits (N, 2) of a ParaphraseGPT in the order of the pairs, float32 on the CPU."""
    device = next(model.parameters()).device
    order = sorted(range(len(dataset)), key=dataset.lengths.__getitem__)  # little padding
    logits = torch.zeros(len(dataset), 2)
    model.eval()
    batches = split(order, BATCH_SIZE)[distributed.rank() :: distributed.world_size()]
    for indices in tqdm(batches, "evaluating", delay=2, leave=False, disable=distributed.no_bar()):
        batch = dataset.collate(indices)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        output = model(ids, mask, right_padded=True)
        logits[indices] = output.float().cpu()
    logits = sum(distributed.all_gather(logits))  # each process filled its own rows
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are not finite; train or download the model again")
    return logits


def classification_metrics(logits, labels):
    """`loss` (nats per pair), `accuracy`, `macro_f1` and the counts of the confusion matrix.

    `accuracy_margin` is half of the accuracy's 95 % interval (normal approximation).
    """
    counts = torch.bincount(2 * labels + logits.argmax(1), minlength=4).tolist()
    true_no, false_yes, false_no, true_yes = counts
    errors = false_yes + false_no
    f1 = [correct / max(1, correct + errors / 2) for correct in (true_no, true_yes)]
    cells = [f"{gold}_predicted_{answer}" for gold in ("no", "yes") for answer in ("no", "yes")]
    accuracy = (true_no + true_yes) / len(labels)
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": accuracy,
        "accuracy_margin": 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(labels)),
        "majority_class": max(true_no + false_yes, false_no + true_yes) / len(labels),
        "macro_f1": sum(f1) / 2,
        **dict(zip(cells, counts, strict=True)),
    }


def classified_pairs(logits, dataset):
    """A frame with the `loss` (nats), the `predicted` class and the `label` of each pair."""
    loss = F.cross_entropy(logits, dataset.labels, reduction="none")
    columns = {"loss": loss, "predicted": logits.argmax(1), "label": dataset.labels}
    return pd.DataFrame(columns, dataset.ids)


def mean_interval(values):
    """Mean and 95 % interval by Student's t; for differences of pairs, the paired interval."""
    mean = float(np.mean(values))
    deviation = float(np.std(values, ddof=1))
    half_width = t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
    return mean, mean - half_width, mean + half_width


def t_quantile(degrees):
    """The 97.5 % quantile of Student's t with `degrees` degrees of freedom."""
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    return 1.96 + 2.4 / degrees  # the first terms of its expansion


def bootstrap_interval(values, samples=2000, seed=0):
    """95 % percentile interval of the mean over texts (Efron and Tibshirani 1993, ch. 13).

    It is expanded (Hesterberg 2015, arXiv 1411.5279), because percentiles alone are too narrow for
    few texts: by 16 % for eleven.
    """
    count = len(values)
    indices = np.random.default_rng(seed).integers(count, size=(samples, count))
    quantile = t_quantile(count - 1) * math.sqrt(count / (count - 1))
    tail = 100 * NormalDist().cdf(-quantile)
    return np.percentile(np.asarray(values)[indices].mean(1), [tail, 100 - tail]).tolist()
