"""Poolings against numbers worked out by hand, padding, and the penalty on similar heads."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from config import InputError
from pooling import POOLINGS

LN3, LN9 = math.log(3), math.log(9)
HIDDEN = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]])  # one text, two tokens, width 2
LEFT, RIGHT, FULL = (0, 0, 1, 1, 1), (1, 1, 1, 0, 0), (1, 1, 1, 1, 1)
LEARNED = pytest.mark.parametrize("name", ["generalized", "multihead"])


def fill(pooling, **values):
    """Set parameters by name, the dots as underscores."""
    named = {name.replace(".", "_"): parameter for name, parameter in pooling.named_parameters()}
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(torch.tensor(value))
    return pooling


def random_pooling(name, width=6):
    """A pooling with random parameters, large enough for clearly different token weights."""
    torch.manual_seed(3)
    pooling = POOLINGS[name](width)
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter, std=2)
    return pooling


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last", [0, 4]),
        ("mean", [1 / 2, 6 / 2]),
        ("weightedmean", [1 / 3, (2 + 2 * 4) / 3]),
        ("max", [1, 4]),
    ],
)
def test_poolings_without_parameters_by_hand(name, expected):
    """Of (1, 2) and (0, 4); they have no weights to show and no penalty."""
    pooling, mask = POOLINGS[name](2), torch.ones(1, 2, dtype=torch.long)
    assert_close(pooling(HIDDEN, mask), torch.tensor([expected], dtype=torch.float32))
    assert not list(pooling.parameters())
    assert pooling.token_weights(HIDDEN, mask) is None
    assert pooling.penalty(HIDDEN, mask) == 0


def test_max_of_negative_values_is_not_the_padding():
    """Padding filled with 0 instead of -inf would win over -1 and -2."""
    hidden = torch.tensor([[[-1.0, -5.0], [-3.0, -2.0], [0.0, 0.0]]])
    assert POOLINGS["max"](2)(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[-1.0, -2.0]]


def test_generalized_by_hand():
    """w . h + b is 2a + a - 2a = a = atanh 0.5, and 0 + 2a - 2a = 0.

    The weights are e^0.5 and 1, divided by their sum.
    """
    a = math.atanh(0.5)
    pooling = fill(POOLINGS["generalized"](2), score_weight=[[2 * a, a / 2]], score_bias=[-2 * a])
    first, mask = math.exp(0.5) / (math.exp(0.5) + 1), torch.ones(1, 2)
    assert_close(pooling.token_weights(HIDDEN, mask), torch.tensor([[first, 1 - first]]))
    assert_close(pooling(HIDDEN, mask), torch.tensor([[first, 2 * first + 4 * (1 - first)]]))


def test_multihead_by_hand():
    """Weights: head 1, dimension 1: 3/4, 1/4; head 2, dimension 2: 9/10, 1/10; others 1/2."""
    pooling = fill(
        POOLINGS["multihead"](2, heads=2),  # scores (ln 3, 0 | 0, 0) and (0, 0 | ln 9, 0)
        inner_0_weight=[[1.0, 0.0]],
        inner_0_bias=[0.0],
        outer_0_weight=[[LN3], [0.0]],
        outer_0_bias=[5.0, -7.0],
        inner_1_weight=[[0.0, -1.0]],
        inner_1_bias=[3.0],
        outer_1_weight=[[0.0], [LN9]],
        outer_1_bias=[0.0, 0.0],
    )
    mask, first = torch.ones(1, 2), (0.75 + 0.5 + 0.5 + 0.9) / 4
    assert_close(pooling(HIDDEN, mask), torch.tensor([[0.75, 3.0, 0.5, 0.9 * 2 + 0.1 * 4]]))
    assert_close(pooling.token_weights(HIDDEN, mask), torch.tensor([[first, 1 - first]]))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("mask", [RIGHT, LEFT, (0, 1, 0, 1, 1)], ids=["right", "left", "between"])
def test_padding_and_batch_mates_change_nothing(name, mask):
    """[:, -1] read padding, and softmax(score * mask) gave it e^0; neither may happen."""
    pooling = random_pooling(name)
    text, others = torch.randn(1, 3, 6), torch.randn(2, 5, 6)
    alone = pooling(text, torch.ones(1, 3, dtype=torch.long))
    masks = torch.tensor([mask, FULL, RIGHT])
    for garbage in (0.0, -1e4, 1e30, math.inf):
        padded = torch.full((1, 5, 6), garbage)
        padded[:, masks[0].bool()] = text
        together = pooling(torch.cat([padded, others]), masks)
        assert together.shape == (3, pooling.width)
        assert_close(together[:1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_padding_has_no_gradient(name):
    """Training does not learn from padding, but from every learned parameter's tokens."""
    pooling, mask = random_pooling(name), torch.tensor([RIGHT, LEFT])
    hidden = torch.randn(2, 5, 6, requires_grad=True)
    pooling(hidden, mask).square().sum().backward()
    assert (hidden.grad[mask == 0] == 0).all()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[mask == 1] != 0).any()
    assert all(p.grad.abs().sum() > 0 for p in pooling.parameters())


@LEARNED
def test_token_weights(name):
    """0 at padding, sum 1; float32 under autocast, where bfloat16 would not sum to 1."""
    mask = torch.tensor([RIGHT, LEFT, FULL])
    with torch.autocast("cpu", torch.bfloat16):
        weights = random_pooling(name).token_weights(torch.randn(3, 5, 6), mask)
    assert (weights[mask == 0] == 0).all()
    assert (weights[mask == 1] > 0).all()
    assert_close(weights.sum(1), torch.ones(3))


@LEARNED
def test_equal_scores_give_the_mean(name):
    """Parameters of 0 score all real tokens equally; padding once counted with e^0."""
    pooling = random_pooling(name)
    for parameter in pooling.parameters():
        torch.nn.init.zeros_(parameter)
    hidden, mask = torch.randn(3, 5, 6), torch.tensor([RIGHT, LEFT, FULL])
    mean = POOLINGS["mean"](6)(hidden, mask)
    assert_close(pooling(hidden, mask), mean.repeat(1, pooling.width // 6))


def similar_heads(**penalties):
    """Three heads of width 4 closer than 1, so that the penalty is positive; two texts."""
    torch.manual_seed(1)
    pooling = POOLINGS["multihead"](4, heads=3, **{"parameter_penalty": 0.0} | penalties)
    with torch.no_grad():
        for part in (pooling.inner, pooling.outer):
            for head in (1, 2):
                for parameter, first in zip(
                    part[head].parameters(), part[0].parameters(), strict=True
                ):
                    parameter.copy_(first + 0.05 * torch.randn_like(first))
    return pooling, torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]])


def penalty_by_the_formula(pooling, hidden, mask):
    """sum_{i<j} max(0, 1 - |X^i - X^j|^2) text by text, for W1, A and v with their weights."""

    def closeness(parts):
        pairs = itertools.combinations(parts, 2)
        return sum(torch.relu(1 - ((a - b) ** 2).sum()) for a, b in pairs)

    total = pooling.parameter_penalty * closeness([inner.weight for inner in pooling.inner])
    for text, real in zip(hidden, mask.bool(), strict=True):
        heads = zip(pooling.inner, pooling.outer, strict=True)
        scores = [outer(inner(text[real]).clamp(min=0)) for inner, outer in heads]
        attention = [score.exp() / score.exp().sum(0) for score in scores]
        vectors = [(weights * text[real]).sum(0) for weights in attention]
        total += pooling.attention_penalty * closeness(attention) / len(hidden)
        total += pooling.vector_penalty * closeness(vectors) / len(hidden)
    return total


PENALTIES = ("parameter_penalty", "attention_penalty", "vector_penalty")


@pytest.mark.parametrize("names", [*([name] for name in PENALTIES), PENALTIES, []], ids=str)
def test_penalty_and_its_gradient(names):
    """Against the formula, one text at a time; penalties add up, and a weight of 0 gives 0."""
    pooling, hidden, mask = similar_heads(**dict.fromkeys(names, 0.7))
    hidden.requires_grad_()
    tensors = [*pooling.parameters(), hidden]
    results = []
    for penalty in (pooling.penalty(hidden, mask), penalty_by_the_formula(pooling, hidden, mask)):
        grads = torch.autograd.grad(penalty, tensors, allow_unused=True, materialize_grads=True)
        results.append((penalty, grads))
    assert (results[0][0] > 0) == bool(names)
    assert_close(*results, rtol=1e-4, atol=1e-5)


def test_at_the_usual_initialization_the_parameter_penalty_is_0():
    """At width 256 heads differ by more than 1: neither loss nor gradient changes."""
    torch.manual_seed(0)
    pooling = POOLINGS["multihead"](256)
    penalty = pooling.penalty(torch.randn(2, 4, 256), torch.ones(2, 4))
    penalty.backward()
    assert penalty.item() == 0
    assert not any(inner.weight.grad.any() for inner in pooling.inner)


@pytest.mark.parametrize(
    "settings", [{"heads": 0}, {"heads": "5"}, {"vector_penalty": -1.0}], ids=str
)
def test_a_setting_out_of_range_is_an_error(settings):
    """It may come from a command or from the file of a saved head."""
    with pytest.raises(InputError, match="must be"):
        POOLINGS["multihead"](4, **settings)
