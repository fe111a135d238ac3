"""Figures worked out by hand, and independent of how the data is cut into batches."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from config import ROOT
from datasets import Sonnet, SonnetsDataset, read_sonnets
from evaluation import (
    bootstrap_interval,
    chrf,
    chrf_floor,
    copied_share,
    language_model_figures,
    mean_interval,
    rhyme,
    sonnet_figures,
    sonnet_form,
    syllables,
)
from models.sonnet_gpt import SonnetGPT

TEXTS = ("From fairest", "But as the riper should by time decease", "thy brow,\n  And dig", "z")
DEV = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_dev.csv")
TRAIN = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_train.csv")


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_figures_of_a_language_model(gpt, batch_size):
    """A mean of batch means, or padding counted, would change with the batch size."""
    data = SonnetsDataset([Sonnet(number, text) for number, text in enumerate(TEXTS)], gpt)
    nats, tokens, characters = 0.0, 0, 0
    for text in TEXTS:
        ids = torch.tensor([[*gpt.tokenizer.encode(text).ids, gpt.end_of_text]])
        with torch.no_grad():
            scores = SonnetGPT(gpt)(ids[:, :-1]).log_softmax(-1)
        nats -= scores.gather(2, ids[:, 1:, None]).sum().item()
        tokens += ids.shape[1] - 1
        characters += len(text) + 1 - len(gpt.tokenizer.decode(ids[0, :1].tolist()))
    figures = language_model_figures(SonnetGPT(gpt), data.in_order(batch_size))
    assert_close(figures["loss"], nats / tokens, rtol=1e-5, atol=0)
    assert_close(figures["perplexity"], math.exp(nats / tokens), rtol=1e-5, atol=0)
    assert_close(figures["bits_per_character"], nats / math.log(2) / characters, rtol=1e-5, atol=0)


def test_figures_are_without_dropout(gpt):
    """Evaluated in training mode, the best epoch would be chosen by luck."""
    data = SonnetsDataset([Sonnet(1, TEXTS[1])], gpt)
    model = SonnetGPT(gpt.train())
    figures = language_model_figures(model, data.in_order(1))
    model.eval()
    assert figures == language_model_figures(model, data.in_order(1))


def test_chrf_is_of_the_continuation_alone():
    """The report's chrF counted the three given lines, which every model gets right."""
    texts = [sonnet.text for sonnet in TRAIN[:12]]
    score = chrf(texts, DEV)
    assert chrf(["x\ny\nz\n" + Sonnet(0, text).continuation for text in texts], DEV) == score
    prompted = [sonnet.prompt + Sonnet(0, text).continuation for sonnet, text in zip(DEV, texts, strict=True)]
    assert chrf(prompted, DEV) == score
    assert 0 < score < 60
    assert chrf([sonnet.text for sonnet in DEV], DEV) == 100


def test_the_floor_is_reproducible_and_a_seeds_own():
    """The no-model floor stands beside every chrF; it must be the same number in every run."""
    mean, deviation = chrf_floor(DEV[:3], TRAIN, draws=3)
    assert chrf_floor(DEV[:3], TRAIN, draws=3) == (mean, deviation)
    assert chrf_floor(DEV[:3], TRAIN, draws=3, seed=1) != (mean, deviation)
    assert 0 < deviation < mean < 60


def test_the_floor_of_one_sonnet_is_its_own_score():
    """With a single training sonnet all draws are equal: the mean is its chrF, the deviation 0."""
    mean, deviation = chrf_floor(DEV[:3], TRAIN[:1], draws=3)
    assert_close(mean, chrf([TRAIN[0].text] * 3, DEV[:3]))
    assert deviation == pytest.approx(0, abs=1e-9)


def test_rate_of_whole_sonnets_by_hand():
    """Of 14, 13, 15 and 14 lines, empty ones not counted, two are whole."""
    texts = ["line\n" * 14, "line\n" * 13, "line\n" * 15, "line\n\n" * 13 + "  line"]
    assert sonnet_form(texts, TRAIN)["14_line_rate"] == 0.5


def test_copied_share_by_hand():
    """Of the bigrams (b c), (c x), (x y) after the given lines one stands in training; case and commas don't count."""
    train = [Sonnet(1, "A b,\nC d")]
    assert copied_share(["a b\nb c\nc d\nB c! x\ny"], train, n=2) == pytest.approx(1 / 3)
    assert copied_share(["1\n2\n3\na b c d"], train, n=2) == 1
    assert copied_share(["1\n2\n3\n"], train, n=2) == 0


@pytest.mark.parametrize(("first", "second", "expected"), [
    ("Thy beauty's rose might never die,", "Upon the sky!", True), ("in groan", "alone;", True),
    ("was forsaken", "it has taken:", True), ("as cross'd", "thou art lost", True),
    ("all my love", "none can prove", False), ("his memory", "to die", False), ("the same", "The same.", False),
    ("an unkindness", "blindness", None), ("and sweet'st", "the east", None), ("!", "me", None),
])  # fmt: skip
def test_rhymes_by_ear(first, second, expected):
    """From the last stressed vowel on; a word is no rhyme to itself, and one that CMUdict lacks can't be judged."""
    assert rhyme(first, second) is expected
    assert rhyme(second, first) is expected


@pytest.mark.parametrize(("line", "expected"), [
    ("From fairest creatures we desire increase", [1, 2, 2, 1, 3, 2]), ("o'erpress'd sweet'st lov'st", [2, 1, 1]),
    ("untutor'd unlearned vouchsafe addeth", [3, 2, 2, 2]), ("vortices zyx", [3, 1]), ("beseech'd profan'd", [2, 2]),
])  # fmt: skip
def test_syllables_by_hand(line, expected):
    """The first line from CMUdict (whose desire has three), the others' words mostly by their spelling."""
    assert [syllables(word) for word in line.split()] == expected


def test_the_form_of_a_sonnet_by_hand():
    """Four of six pairs rhyme; bat and bat do not, me and zyx can't be judged; an empty text has none of its six."""
    ends = ["day", "cat", "say", "hat", "sun", "tree", "run", "sea", "night", "bat", "light", "bat"]
    text = "\n".join(f"o la la la la la la la la {end}" for end in ends) + "\nme\n\nthe la la la la la la la la zyx"
    form = sonnet_form([text, ""], train=[])
    assert form == pytest.approx({
        "lines": 7, "14_line_rate": 0.5, "rhymes": 4 / 11, "known_line_ends": 13 / 14, "syllables": 101 / 11,
        "syllables_off_ten": 9 / 11, "distinct_2grams": 22 / 100 / 2, "copied_5grams": 0,
    })  # fmt: skip


def test_a_sonnets_form_stands_between_the_true_and_the_shuffled():
    """The true sonnets have the most rhymes, shuffled lines chance; both are the same in every run."""
    figures = sonnet_figures([sonnet.prompt for sonnet in DEV], DEV, TRAIN)
    assert figures == sonnet_figures([sonnet.prompt for sonnet in DEV], DEV, TRAIN)
    assert figures["gold_dev_rhymes"] > 0.8
    assert 0 < figures["shuffled_dev_rhymes"] < 0.1
    assert figures["gold_dev_syllables"] == pytest.approx(figures["shuffled_dev_syllables"])
    assert figures["gold_dev_14_line_rate"] == figures["shuffled_dev_14_line_rate"] == 1
    assert (figures["dev_lines"], figures["dev_rhymes"], figures["dev_syllables"]) == (3, 0, 0)


def test_the_paired_t_interval_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, standard error sqrt(2.5 / 5), quantile 2.776 of four degrees of freedom."""
    mean, low, high = mean_interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert high - 3 == pytest.approx(2.776 * 0.5**0.5, rel=1e-4)
    assert 3 - low == pytest.approx(high - 3)


@pytest.mark.parametrize("count", [2, 3, 5, 21, 40])
def test_the_t_interval_is_scipys(count):
    """Beyond the table of 20 degrees of freedom it is wider, never narrower."""
    values = np.random.default_rng(count).normal(size=count).tolist()
    half = stats.t.ppf(0.975, count - 1) * stats.sem(values)
    _, low, high = mean_interval(values)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3 if count <= 21 else 0.05)
    assert (high - low) / 2 > half * 0.999


def test_the_bootstrap_is_seeded_and_near_the_normal_interval():
    """Of 400 items, 100 of them 1: 0.25 and about 1.96 standard errors of sqrt(0.25 * 0.75 / 400)."""
    items = np.repeat([1.0, 0.0], [100, 300])
    low, high = bootstrap_interval(items)
    assert (low, high) == bootstrap_interval(items)
    assert (low, high) != bootstrap_interval(items, seed=1)
    assert (0.25 - low, high - 0.25) == pytest.approx((0.0424, 0.0424), rel=0.1)
    assert bootstrap_interval(np.ones(3)) == (1, 1)
