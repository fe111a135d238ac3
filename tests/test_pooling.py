"""Poolings against numbers worked out by hand, padding, and the penalty on similar heads."""

import copy
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from pooling import POOLINGS

LN3, LN9 = math.log(3), math.log(9)
HIDDEN = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]])  # one text, two tokens, width 2
LEFT, RIGHT, FULL = (0, 0, 1, 1, 1), (1, 1, 1, 0, 0), (1, 1, 1, 1, 1)


def fill(pooling, **values):
    """Set parameters by name, the dots as underscores."""
    named = {name.replace(".", "_"): parameter for name, parameter in pooling.named_parameters()}
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(torch.tensor(value))
    return pooling


def multihead():
    """Two heads of width 2 with scores (ln 3, 0 | 0, 0) and (0, 0 | ln 9, 0) per dimension."""
    return fill(
        POOLINGS["multihead"](2, heads=2),
        inner_0_weight=[[1.0, 0.0]],
        inner_0_bias=[0.0],
        outer_0_weight=[[LN3], [0.0]],
        outer_0_bias=[5.0, -7.0],
        inner_1_weight=[[0.0, -1.0]],
        inner_1_bias=[3.0],
        outer_1_weight=[[0.0], [LN9]],
        outer_1_bias=[0.0, 0.0],
    )


def random_pooling(name, width=6):
    """A pooling with random parameters, large enough for clearly different token weights."""
    torch.manual_seed(3)
    pooling = POOLINGS[name](width)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.copy_(2 * torch.randn_like(parameter))
    return pooling


@pytest.mark.parametrize(
    ("name", "expected"), [("last", [0.0, 4.0]), ("mean", [0.5, 3.0]), ("max", [1.0, 4.0])]
)
def test_poolings_without_parameters_by_hand(name, expected):
    """The last token, the mean and the largest value of (1, 2) and (0, 4)."""
    assert POOLINGS[name](2)(HIDDEN, torch.ones(1, 2)).tolist() == [expected]


def test_max_of_negative_values_is_not_the_padding():
    """Padding filled with 0 instead of -inf would win over -1 and -3."""
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


def test_generalized_weights_differ_by_e_squared_at_most():
    """tanh bounds every score: without it one token could take all the weight."""
    pooling = fill(POOLINGS["generalized"](2), score_weight=[[1e6, 0.0]], score_bias=[0.0])
    weights = pooling.token_weights(
        torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]]), torch.ones(1, 3)
    )[0]
    assert_close(weights[0] / weights[1], torch.tensor(math.e**2))
    assert_close(weights[0] / weights[2], torch.tensor(math.e))


def test_multihead_by_hand():
    """Weights: head 1, dimension 1: 3/4, 1/4; head 2, dimension 2: 9/10, 1/10; others 1/2."""
    pooling, mask = multihead(), torch.ones(1, 2)
    expected = torch.tensor([[0.75, 3.0, 0.5, 0.9 * 2 + 0.1 * 4]])
    assert_close(pooling(HIDDEN, mask), expected)
    first = (0.75 + 0.5 + 0.5 + 0.9) / 4
    assert_close(pooling.token_weights(HIDDEN, mask), torch.tensor([[first, 1 - first]]))


@pytest.mark.parametrize("name", ["generalized", "multihead"])
def test_equal_scores_give_the_mean(name):
    """Parameters of 0 score all real tokens equally; padding once counted with e^0."""
    pooling = random_pooling(name)
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.zero_()
    hidden, mask = torch.randn(3, 5, 6), torch.tensor([RIGHT, LEFT, FULL])
    mean = POOLINGS["mean"](6)(hidden, mask)
    assert_close(pooling(hidden, mask), mean.repeat(1, pooling.width // 6))
    assert_close(pooling.token_weights(hidden, mask), mask / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("mask", [RIGHT, LEFT, (0, 1, 0, 1, 1)], ids=["right", "left", "between"])
def test_padding_and_batch_mates_change_nothing(name, mask):
    """[:, -1] read padding, and softmax(score * mask) gave it e^0; neither may happen."""
    pooling = random_pooling(name)
    text, others = torch.randn(1, 3, 6), torch.randn(2, 5, 6)
    alone = pooling(text, torch.ones(1, 3, dtype=torch.long))
    for garbage in (0.0, 1e4, -1e4, 1e30):
        padded = torch.full((1, 5, 6), garbage)
        padded[:, torch.tensor(mask).bool()] = text
        masks = torch.tensor([mask, FULL, RIGHT])
        together = pooling(torch.cat([padded, others]), masks)
        assert together.shape == (3, pooling.width)
        assert_close(together[:1], alone, rtol=0, atol=1e-6)
        assert_close(pooling(padded, masks[:1].bool()), alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["generalized", "multihead"])
def test_token_weights_of_padding_are_zero(name):
    """Exactly 0 at padding, and the sum is 1."""
    mask = torch.tensor([RIGHT, LEFT, FULL])
    weights = random_pooling(name).token_weights(torch.randn(3, 5, 6), mask)
    assert (weights[mask == 0] == 0).all()
    assert (weights[mask == 1] > 0).all()
    assert_close(weights.sum(1), torch.ones(3))


@pytest.mark.parametrize("name", POOLINGS)
def test_padding_has_no_gradient(name):
    """Training does not learn from padding."""
    hidden = torch.randn(2, 5, 6, requires_grad=True)
    mask = torch.tensor([RIGHT, LEFT])
    random_pooling(name)(hidden, mask).square().sum().backward()
    assert (hidden.grad[mask == 0] == 0).all()
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[mask == 1] != 0).any()


@pytest.mark.parametrize("name", ["last", "mean", "max"])
def test_poolings_without_parameters_have_no_weights_and_no_penalty(name):
    """Only a pooling that learns weights can show them or has a penalty."""
    pooling = POOLINGS[name](6)
    assert not list(pooling.parameters())
    assert pooling.token_weights(torch.randn(1, 2, 6), torch.ones(1, 2)) is None
    assert pooling.penalty(torch.randn(1, 2, 6), torch.ones(1, 2)) == 0


def similar_heads(**weights):
    """Three heads of width 4 closer than 1, so that the penalty is positive; two texts."""
    torch.manual_seed(1)
    pooling = POOLINGS["multihead"](4, heads=3, **{"parameter_penalty": 0.0, **weights})
    with torch.no_grad():
        for part in (pooling.inner, pooling.outer):
            for head in (1, 2):
                pairs = zip(part[head].parameters(), part[0].parameters(), strict=True)
                for parameter, first in pairs:
                    parameter.copy_(first + 0.05 * torch.randn_like(first))
    return pooling, torch.randn(2, 3, 4), torch.tensor([[1, 1, 1], [1, 1, 0]])


def penalty_by_the_formula(pooling, hidden, mask):
    """sum_{i<j} max(0, 1 - |X^i - X^j|^2) text by text, for W1, A and v with their weights."""

    def closeness(parts):
        pairs = itertools.combinations(parts, 2)
        return sum(max(0.0, 1 - float(((a - b) ** 2).sum())) for a, b in pairs)

    total = pooling.parameter_penalty * closeness([inner.weight for inner in pooling.inner])
    for text, real in zip(hidden, mask.bool(), strict=True):
        heads = zip(pooling.inner, pooling.outer, strict=True)
        scores = [outer(inner(text[real]).clamp(min=0)) for inner, outer in heads]
        attention = [score.exp() / score.exp().sum(0) for score in scores]
        vectors = [(weights * text[real]).sum(0) for weights in attention]
        total += pooling.attention_penalty * closeness(attention) / len(hidden)
        total += pooling.vector_penalty * closeness(vectors) / len(hidden)
    return total


@pytest.mark.parametrize("kind", ["parameter", "attention", "vector"])
def test_penalty_and_its_gradient_against_finite_differences(kind):
    """Against the formula in float64, for every parameter and hidden state."""
    pooling, hidden, mask = similar_heads(**{f"{kind}_penalty": 0.7})
    double, states = copy.deepcopy(pooling).double().requires_grad_(False), hidden.double()
    hidden.requires_grad_()
    penalty = pooling.penalty(hidden, mask)
    assert 0.7 < penalty.item() < 0.7 * 3
    assert penalty.item() == pytest.approx(penalty_by_the_formula(double, states, mask), rel=1e-5)
    penalty.backward()
    pairs = [*zip(pooling.parameters(), double.parameters(), strict=True), (hidden, states)]
    moved = 0
    for ours, theirs in pairs:
        expected = torch.zeros_like(theirs)
        for place in itertools.product(*map(range, theirs.shape)):
            kept = theirs[place].item()
            values = []
            for step in (1e-5, -1e-5):
                theirs[place] = kept + step
                values.append(penalty_by_the_formula(double, states, mask))
            theirs[place] = kept
            expected[place] = (values[0] - values[1]) / 2e-5
        found = torch.zeros_like(ours) if ours.grad is None else ours.grad
        assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
        moved += int(expected.abs().max() > 1e-4)
    # W1 of each head; or W1, b1, W2 of each and the hidden states (b2 cancels in the softmax)
    assert moved == (3 if kind == "parameter" else 10)


def test_penalties_add_up_and_0_gives_0():
    """A weight of 0 turns a penalty off."""
    parts = []
    for kind in ("parameter", "attention", "vector"):
        pooling, hidden, mask = similar_heads(**{f"{kind}_penalty": 0.7})
        parts.append(pooling.penalty(hidden, mask).item())
    pooling, hidden, mask = similar_heads(
        parameter_penalty=0.7, attention_penalty=0.7, vector_penalty=0.7
    )
    assert pooling.penalty(hidden, mask).item() == pytest.approx(sum(parts), rel=1e-6)
    pooling, hidden, mask = similar_heads()
    assert pooling.penalty(hidden, mask).item() == 0


def test_the_penalty_pushes_similar_heads_apart():
    """With the wrong sign it would pull heads together, and only its value would be right."""
    pooling, hidden, mask = similar_heads(parameter_penalty=1.0)
    before = (pooling.inner[0].weight - pooling.inner[1].weight).detach().norm()
    pooling.penalty(hidden, mask).backward()
    with torch.no_grad():
        for parameter in pooling.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert (pooling.inner[0].weight - pooling.inner[1].weight).norm() > before


def test_at_the_usual_initialization_the_parameter_penalty_is_0():
    """At width 256 heads differ by more than 1: neither loss nor gradient changes."""
    torch.manual_seed(0)
    pooling, hidden, mask = POOLINGS["multihead"](256), torch.randn(2, 4, 256), torch.ones(2, 4)
    penalty = pooling.penalty(hidden, mask)
    assert penalty.item() == 0
    (penalty + pooling(hidden, mask).square().mean()).backward()
    with_penalty = [parameter.grad.clone() for parameter in pooling.parameters()]
    pooling.zero_grad()
    pooling(hidden, mask).square().mean().backward()
    without = [parameter.grad for parameter in pooling.parameters()]
    assert all(map(torch.equal, with_penalty, without))


@pytest.mark.parametrize("name", ["generalized", "multihead"])
def test_weights_are_float32_under_autocast(name):
    """A softmax in bfloat16, which has 8 bits, would not sum to 1."""
    hidden, mask = torch.randn(1, 40, 6), torch.ones(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        weights = random_pooling(name).token_weights(hidden, mask)
    assert weights.dtype == torch.float32
    assert_close(weights.sum(1), torch.ones(1))
