"""Figures worked out by hand, and independent of how the data is cut into batches."""

import math

import pytest
import torch
from torch.testing import assert_close

from config import ROOT
from datasets import Sonnet, SonnetsDataset, read_sonnets
from evaluation import chrf, chrf_floor, continuation, copied_share, language_model_figures, whole_sonnet_rate
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


def test_continuation_is_what_follows_three_lines():
    """Empty lines are no lines."""
    assert continuation("one\n\ntwo\nthree\n\nfour\n  five\n") == "four\n  five"
    assert continuation("one\ntwo\nthree\n") == ""


def test_chrf_is_of_the_continuation_alone():
    """The report's chrF counted the three given lines, which every model gets right."""
    texts = [sonnet.text for sonnet in TRAIN[:12]]
    score = chrf(texts, DEV)
    assert chrf(["x\ny\nz\n" + continuation(text) for text in texts], DEV) == score
    assert chrf([sonnet.prompt + continuation(text) for sonnet, text in zip(DEV, texts, strict=True)], DEV) == score
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


def test_whole_sonnet_rate_by_hand():
    """Of 14, 13, 15 and 14 lines, empty ones not counted, two are whole."""
    texts = ["line\n" * 14, "line\n" * 13, "line\n" * 15, "line\n\n" * 13 + "  line"]
    assert whole_sonnet_rate(texts) == 0.5


def test_copied_share_by_hand():
    """Of the bigrams (b c), (c x), (x y) after the given lines one stands in training; case and commas don't count."""
    train = [Sonnet(1, "A b,\nC d")]
    assert copied_share(["a b\nb c\nc d\nB c! x\ny"], train, n=2) == pytest.approx(1 / 3)
    assert copied_share(["1\n2\n3\na b c d"], train, n=2) == 1
    assert copied_share(["1\n2\n3\n"], train, n=2) == 0
