"""Metrics against values worked out by hand or by other code."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from config import ROOT
from datasets import SonnetsDataset, continuation, read_sonnets, sonnet_prompt
from evaluation import (
    bootstrap_interval,
    chrf,
    language_model_metrics,
    mean_interval,
    rhyme,
    sonnet_form,
    sonnet_metrics,
    syllables,
)
from models.sonnet_gpt import SonnetGPT

TEXTS = ["From fairest", "But as the riper should by time decease", "thy brow,\n  And dig", "z"]
DEV, TRAIN = (
    read_sonnets(ROOT / "data" / f"Shakespeare_Sonnets_{split}.csv")["text"].tolist()
    for split in ("dev", "train")
)


@pytest.fixture
def dataset(gpt):
    return SonnetsDataset(pd.DataFrame({"id": range(4), "text": TEXTS}), gpt)


def test_language_model_metrics(gpt, dataset):
    """The loss is per token, also that of each text, and bits are per character."""
    nats, tokens, characters, losses = 0.0, 0, 0, []
    for text in TEXTS:
        ids = torch.tensor([[*gpt.encode([text])[0], gpt.end_of_text]])
        with torch.no_grad():
            log_probabilities = SonnetGPT(gpt)(ids[:, :-1]).log_softmax(-1)
        losses.append(-log_probabilities.gather(2, ids[:, 1:, None]).mean().item())
        nats += losses[-1] * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        characters += len(text) + 1 - len(gpt.decode(ids[0, :1]))
    metrics, texts = language_model_metrics(SonnetGPT(gpt), dataset)
    expected = {
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_character": nats / math.log(2) / characters,
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert texts["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    assert texts["num_targets"].sum() == tokens


def test_evaluation_contains_every_sonnet_once(gpt, dataset, monkeypatch):
    """Each alone, in the order of the file."""
    made, collate = [], dataset.collate
    monkeypatch.setattr(
        dataset, "collate", lambda indices: made.append(indices) or collate(indices)
    )
    language_model_metrics(SonnetGPT(gpt), dataset)
    assert made == [[0], [1], [2], [3]]


def test_evaluation_has_no_dropout(gpt, dataset):
    """Otherwise chance would choose the best epoch."""
    model = SonnetGPT(gpt.train())
    metrics, _ = language_model_metrics(model, dataset)
    model.eval()
    assert language_model_metrics(model, dataset)[0] == metrics


def test_chrf_ignores_the_prompt():
    """The report's chrF included the three given lines, which every model has right."""
    texts = TRAIN[:12]
    score = chrf(texts, DEV)
    assert chrf(["x\ny\nz\n" + continuation(text) for text in texts], DEV) == score
    pairs = zip(DEV, texts, strict=True)
    assert chrf([sonnet_prompt(own) + continuation(text) for own, text in pairs], DEV) == score
    assert 0 < score < 60
    assert chrf(DEV, DEV) == 100


def test_14_line_rate_by_hand():
    """Of 14, 13, 15 and 14 lines, not counting empty ones, two have 14."""
    texts = ["line\n" * 14, "line\n" * 13, "line\n" * 15, "line\n\n" * 13 + "  line"]
    assert sonnet_form(texts, TRAIN)["14_line_rate"] == 0.5


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c d e\n2\n3\nb c d e F! x\ny", 1 / 3),  # of (bcdef), (cdefx), (defxy)
        ("1\n2\n3\na b c d e f", 1),
        ("1\n2\n3\na b c d", 0),
        ("a b c d e\n2\n3\n", 0),
    ],
)
def test_copied_5grams_by_hand(text, share):
    """The share of 5-grams after the prompt that are in the training data, as words."""
    form = sonnet_form([text], ["A b,\nC d e\nf g"])
    assert form["copied_5grams"] == pytest.approx(share)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("Thy beauty's rose might never die,", "Upon the sky!", True),
        ("in groan", "alone;", True),
        ("was forsaken", "it has taken:", True),
        ("as cross'd", "thou art lost", True),
        ("all my love", "none can prove", False),
        ("his memory", "to die", False),
        ("the same", "The same.", False),
        ("an unkindness", "blindness", None),
        ("and sweet'st", "the east", None),
        ("!", "me", None),
    ],
)
def test_rhymes_by_ear(first, second, expected):
    """A word does not rhyme with itself; None means that CMUdict does not have a word."""
    assert rhyme(first, second) is expected
    assert rhyme(second, first) is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("From fairest creatures we desire increase", [1, 2, 2, 1, 3, 2]),
        ("o'erpress'd sweet'st lov'st", [2, 1, 1]),
        ("untutor'd unlearned vouchsafe addeth", [3, 2, 2, 2]),
        ("vortices zyx", [3, 1]),
        ("beseech'd profan'd", [2, 2]),
    ],
)
def test_syllables_by_hand(line, expected):
    """The first line's are CMUdict's, with three for desire; most others' are by spelling."""
    assert [syllables(word) for word in line.split()] == expected


def test_sonnet_form_by_hand():
    """Four of six pairs rhyme, bat and bat do not, zyx is unknown; an empty text has no rhyme."""
    ends = "day cat say hat sun tree run sea night bat light bat".split()
    text = "\n".join(f"o la la la la la la la la {end}" for end in ends)
    text += "\nme\n\nthe la la la la la la la la zyx"
    assert sonnet_form([text, ""], train=[]) == pytest.approx(
        {
            "lines": 7,
            "14_line_rate": 0.5,
            "rhymes": 4 / 11,
            "syllables": 101 / 11,
            "syllables_off_ten": 9 / 11,
            "copied_5grams": 0,
        }
    )


def test_sonnet_metrics_of_prompts_alone():
    """Texts that add nothing have three lines; the references are the upper limit."""
    prompts = [sonnet_prompt(text) for text in DEV]
    metrics = sonnet_metrics(prompts, DEV, TRAIN)
    names = ("lines", "14_line_rate", "rhymes", "syllables", "copied_5grams", "chrf")
    assert [metrics[f"dev_{name}"] for name in names] == [3, 0, 0, 0, 0, 0]
    assert metrics["gold_dev_rhymes"] > 0.8
    assert metrics["gold_dev_lines"] == 14
    assert metrics["gold_dev_chrf"] == 100
    assert metrics["gold_dev_copied_5grams"] < 0.01


def test_random_lines_are_a_baseline_without_a_model():
    """They have the form of sonnets, do not rhyme, are copied, and are the same in every run."""
    metrics = sonnet_metrics(DEV, DEV, TRAIN)
    assert sonnet_metrics(DEV, DEV, TRAIN) == metrics
    assert metrics["random_dev_lines"] == 14
    assert 0.4 < metrics["random_dev_copied_5grams"] < 0.7  # those within a line
    assert 0 < metrics["random_dev_rhymes"] < 0.1
    assert metrics["random_dev_syllables"] == pytest.approx(10, abs=0.5)
    assert 10 < metrics["random_dev_chrf"] < 60


def test_little_training_data_has_a_baseline():
    """Training sonnets may have fewer lines than the references need."""
    metrics = sonnet_metrics(DEV[:2], DEV[:2], ["one\ntwo\nthree\nfour"])
    assert metrics["random_dev_lines"] == 14


def test_the_paired_t_interval_by_hand():
    """Differences 1 to 5: mean 3, standard error sqrt(2.5 / 5), quantile 2.776 (4 degrees)."""
    mean, low, high = mean_interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert high - 3 == pytest.approx(2.776 * 0.5**0.5, rel=1e-4)
    assert 3 - low == pytest.approx(high - 3)


@pytest.mark.parametrize("count", [2, 3, 5, 21, 22, 40, 154, 1000])
def test_the_t_interval_is_that_of_scipy(count):
    """With more than 20 degrees of freedom the quantile is approximated."""
    values = np.random.default_rng(count).normal(size=count).tolist()
    half_width = stats.t.ppf(0.975, count - 1) * stats.sem(values)
    _, low, high = mean_interval(values)
    assert (high - low) / 2 == pytest.approx(half_width, rel=3e-3)


def test_the_bootstrap_is_seeded_and_close_to_the_normal_interval():
    """400 items with mean 0.25: about 1.96 standard errors of sqrt(0.25 * 0.75 / 400)."""
    items = np.repeat([1.0, 0.0], [100, 300])
    low, high = bootstrap_interval(items)
    assert bootstrap_interval(items) == [low, high]
    assert bootstrap_interval(items, seed=1) != [low, high]
    assert (0.25 - low, high - 0.25) == pytest.approx((0.0424, 0.0424), rel=0.1)
    assert bootstrap_interval(np.ones(3)) == [1, 1]


@pytest.mark.parametrize("count", [11, 20])
def test_the_bootstrap_of_few_texts_is_as_wide_as_the_t_interval(count):
    """Percentiles alone would be 16 and 9 % too narrow."""
    widths = []
    for seed in range(50):
        values = np.random.default_rng(seed).normal(size=count)
        _, low, high = mean_interval(values)
        widths.append(np.ptp(bootstrap_interval(values)) / (high - low))
    assert np.mean(widths) == pytest.approx(1, abs=0.04)
