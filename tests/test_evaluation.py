"""Metrics against values worked out by hand or by other code."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from sacrebleu.metrics import CHRF

from config import ROOT
from datasets import SonnetsDataset, read_sonnets, sonnet_prompt
from evaluation import metrics as m
from evaluation.sonnet_form import chrf, rhyme, sonnet_form, sonnet_metrics
from models.generation import Continuation
from models.sonnet_gpt import SonnetGPT

TEXTS = ["From fairest", "But as the riper should by time decease", "thy brow,\n  And dig", "z"]
DEV, TRAIN = (
    read_sonnets(ROOT / "data" / f"Shakespeare_Sonnets_{split}.csv")["text"].tolist()
    for split in ("dev", "train")
)
DEV = DEV[:4]


def test_language_model_metrics(gpt):
    """The loss is per token, not per text, and without dropout; bits are per character."""
    nats, tokens, characters, losses = 0.0, 0, 0, []
    for text in TEXTS:
        ids = torch.tensor([[*gpt.encode([text])[0], gpt.end_of_text]])
        with torch.no_grad():
            log_probabilities = SonnetGPT(gpt)(ids[:, :-1]).log_softmax(-1)
        losses.append(-log_probabilities.gather(2, ids[:, 1:, None]).mean().item())
        nats += losses[-1] * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        characters += len(text) + 1 - len(gpt.decode(ids[0, :1].tolist()))
    data = SonnetsDataset(pd.DataFrame({"id": range(4), "text": TEXTS}), gpt)
    metrics, texts = m.language_model_metrics(SonnetGPT(gpt).train(), data)
    expected = {"loss": nats / tokens, "perplexity": math.exp(nats / tokens)}
    expected["bits_per_character"] = nats / math.log(2) / characters
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert texts["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    assert (texts["id"].tolist(), texts["tokens"].sum()) == ([0, 1, 2, 3], tokens)
    model = SonnetGPT(gpt)
    values = iter([1.0, math.nan, 1.0, 1.0])
    model.loss = lambda **batch: torch.tensor(next(values))
    with pytest.raises(FloatingPointError, match="the loss of a text is not finite"):
        m.language_model_metrics(model, data)


def test_classification_metrics_by_hand():
    """Labels 1 1 1 0, of which 1 1 0 1 are predicted."""
    metrics = m.classification_metrics(torch.tensor([1, 1, 0, 1]), torch.tensor([1, 1, 1, 0]))
    expected = dict(accuracy=0.5, accuracy_margin=0.49, majority_class=0.75, macro_f1=4 / 6 / 2)
    assert metrics == pytest.approx(expected)
    assert m.classification_metrics(*torch.ones(2, 3).long())["macro_f1"] == 0.5


def test_pair_metrics_by_hand(monkeypatch):
    """Logits 0, log 3 are the probability 3/4 of yes."""
    data = SimpleNamespace(ids=["a", "b"], labels=torch.tensor([1, 0]))
    logits = torch.tensor([[0, math.log(3)], [0, math.log(3)]])
    monkeypatch.setattr(m, "classify", lambda model, dataset: logits)
    metrics, pairs = m.pair_metrics(None, data)
    assert metrics["loss"] == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert pairs["loss"].tolist() == pytest.approx([math.log(4 / 3), math.log(4)])
    assert pairs["probability"].tolist() == pytest.approx([0.75, 0.75])
    assert pairs[["id", "predicted", "label"]].values.tolist() == [["a", 1, 1], ["b", 1, 0]]


def test_logits_are_in_the_order_of_the_pairs_and_finite():
    """Although pairs are sorted by length."""
    data = SimpleNamespace(ids=range(70), lengths=[70 - index for index in range(70)])
    both = ("input_ids", "attention_mask")
    data.collate = lambda indices: dict.fromkeys(both, torch.tensor(indices))
    model = torch.nn.Linear(1, 1)
    model.forward = lambda ids, mask: torch.stack([ids, -ids], 1)
    assert m.classify(model, data)[:, 0].tolist() == list(range(70))
    model.forward = lambda ids, mask: torch.stack([ids, ids / 0], 1)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        m.classify(model, data)


def test_chrf_is_that_of_sacrebleu():
    assert chrf(TRAIN[:4], DEV) == CHRF().corpus_score(TRAIN[:4], [DEV]).score
    assert chrf(DEV, DEV) == 100


SHARES = [
    ("a b c d e\n2\n3\nb c d e F! x\ny", 1 / 3),  # of (bcdef), (cdefx), (defxy)
    ("1\n2\n3\na b c d e f", 1),
    ("1\n2\n3\na b c d", 0),
]


@pytest.mark.parametrize(("text", "share"), SHARES)
def test_copied_5grams_by_hand(text, share):
    """The share of 5-grams after the prompt that are in the training data, as words."""
    assert sonnet_form([text], ["A b,\nC d e\nf g"])["copied_5grams"] == pytest.approx(share)


RHYMES = [
    ("Thy beauty's rose might never die,", "Upon the sky!", True),
    ("was forsaken", "it has taken:", True),
    ("as cross'd", "thou art lost", True),
    ("all my love", "none can prove", False),
    ("the same", "The same.", False),
    ("an unkindness", "blindness", None),
    ("!", "me", None),
]


@pytest.mark.parametrize(("first", "second", "expected"), RHYMES)
def test_rhymes_by_ear(first, second, expected):
    """A word does not rhyme with itself; None means that CMUdict does not have a word."""
    assert rhyme(first, second) is rhyme(second, first) is expected


def test_sonnet_form_by_hand():
    """Four of six pairs rhyme, bat and bat do not, zyx is unknown; an empty text has no rhyme."""
    ends = "day cat say hat sun tree run sea night bat light bat me zyx".split()
    text = "\n".join(f"o la la la {end}" for end in ends[:13]) + f"\n\n la {ends[13]}"
    expected = {"lines": 7, "14_line_rate": 0.5, "rhymes": 4 / 11, "copied_5grams": 0}
    assert sonnet_form([text, ""], train=[]) == pytest.approx(expected)


def test_sonnet_metrics():
    """An unfinished last line counts nowhere; the references are the upper limit."""
    whole = [Continuation(text, True) for text in DEV]
    cut = [Continuation(text + "\nlove and hate of", False) for text in DEV]
    one, other = (sonnet_metrics("dev", texts, DEV, TRAIN) for texts in (whole, cut))
    assert (one.pop("dev_ended"), other.pop("dev_ended")) == (1, 0)
    assert one == other
    names = ("lines", "chrf", "chrf_with_prompt", "rhymes", "copied_5grams")
    assert [one[f"dev_{name}"] for name in names] == [one[f"gold_dev_{name}"] for name in names]
    assert (one["dev_lines"], one["dev_chrf"], one["dev_rhymes"] > 0.8) == (14, 100, True)
    prompts = [Continuation(sonnet_prompt(text), True) for text in DEV]
    alone = sonnet_metrics("dev", prompts, DEV, TRAIN)
    assert [alone[f"dev_{name}"] for name in names[:2]] == [3, 0]
    assert alone["dev_chrf_with_prompt"] == chrf([sonnet_prompt(text) for text in DEV], DEV) > 0


def test_random_lines_are_a_baseline_without_a_model():
    """They have the form of sonnets, hardly rhyme, are copied, and are the same in every run."""
    texts = [Continuation(text, True) for text in DEV]
    metrics = sonnet_metrics("dev", texts, DEV, TRAIN)
    assert sonnet_metrics("dev", texts, DEV, TRAIN) == metrics
    assert metrics["random_dev_lines"] == 14
    assert 0.4 < metrics["random_dev_copied_5grams"] < 0.7  # those within a line
    assert metrics["random_dev_rhymes"] < 0.15
    assert 10 < metrics["random_dev_chrf"] < 60
    little = sonnet_metrics("dev", texts[:2], DEV[:2], ["one\ntwo\nthree\nfour"])
    assert little["random_dev_lines"] == 14
