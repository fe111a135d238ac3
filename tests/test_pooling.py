"""Poolings against numbers worked out by hand, padding, and weights that sum to 1."""

import math

import pytest
import torch
from torch.testing import assert_close

from pooling import POOLINGS

HIDDEN, MASK = torch.tensor([[[1.0, 2.0], [0.0, 4.0]]]), torch.ones(1, 2, dtype=torch.long)
LEFT, RIGHT, FULL = (0, 0, 1, 1, 1), (1, 1, 1, 0, 0), (1, 1, 1, 1, 1)
LEARNED = pytest.mark.parametrize("name", ["generalized", "multihead"])


def random_pooling(name):
    """A pooling with random parameters, large enough for clearly different token weights."""
    torch.manual_seed(3)
    pooling = POOLINGS[name](6)
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter, std=2)
    return pooling


@pytest.mark.parametrize(
    ("name", "expected"),
    [("last", [0, 4]), ("mean", [1 / 2, 3]), ("weightedmean", [1 / 3, 10 / 3]), ("max", [1, 4])],
)
def test_poolings_without_parameters_by_hand(name, expected):
    """Of (1, 2) and (0, 4); they have no weights to show."""
    pooling = POOLINGS[name](2)
    assert_close(pooling(HIDDEN, MASK), torch.tensor([expected], dtype=torch.float32))
    assert pooling.token_weights(HIDDEN, MASK) is None


def test_generalized_by_hand():
    """w . h + b is 2a + a - 2a = a = atanh 0.5, and 0 + 2a - 2a = 0.

    The weights are e^0.5 and 1, divided by their sum.
    """
    pooling, a = POOLINGS["generalized"](2), math.atanh(0.5)
    pooling.score.weight.data = torch.tensor([[2 * a, a / 2]])
    pooling.score.bias.data = torch.tensor([-2 * a])
    first = math.exp(0.5) / (math.exp(0.5) + 1)
    assert_close(pooling.token_weights(HIDDEN, MASK), torch.tensor([[first, 1 - first]]))
    assert_close(pooling(HIDDEN, MASK), torch.tensor([[first, 2 * first + 4 * (1 - first)]]))


def two_heads():
    """Scores (ln 3, 0 | 0, 0) of the first head and (0, 0 | ln 9, 0) of the second."""
    pooling = POOLINGS["multihead"](2, heads=2)
    pooling.inner[0].weight.data = torch.tensor([[1.0, 0.0]])
    pooling.inner[1].weight.data = torch.tensor([[0.5, -0.5]])
    pooling.outer[0].weight.data = torch.tensor([[math.log(3)], [0.0]])
    pooling.outer[1].weight.data = torch.tensor([[0.0], [math.log(9)]])
    pooling.inner[0].bias.data = torch.tensor([0.0])
    pooling.inner[1].bias.data = torch.tensor([1.5])  # 1 for the first token, -0.5 for the other
    return pooling


def test_multihead_by_hand():
    """Weights: head 1, dimension 1: 3/4, 1/4; head 2, dimension 2: 9/10, 1/10; others 1/2."""
    pooling, first = two_heads(), (0.75 + 0.5 + 0.5 + 0.9) / 4
    expected = torch.tensor([[0.75, 3.0, 0.5, 0.9 * 2 + 0.1 * 4]])
    assert_close(pooling(HIDDEN, MASK), expected)
    assert_close(pooling.token_weights(HIDDEN, MASK), torch.tensor([[first, 1 - first]]))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("mask", [RIGHT, LEFT, (0, 1, 0, 1, 1)], ids=["right", "left", "between"])
def test_padding_and_batch_mates_change_nothing(name, mask):
    """[:, -1] read padding, and softmax(score * mask) gave it e^0; its gradient is 0, too."""
    pooling = random_pooling(name)
    text, others = torch.randn(1, 3, 6), torch.randn(2, 5, 6)
    alone = pooling(text, torch.ones(1, 3, dtype=torch.long))
    masks = torch.tensor([mask, FULL, RIGHT])
    for garbage in (0.0, -1e4, math.inf):
        padded = torch.full((1, 5, 6), garbage)
        padded[:, masks[0].bool()] = text
        hidden = torch.cat([padded, others]).requires_grad_()
        together = pooling(hidden, masks)
        assert together.shape == (3, pooling.width)
        assert_close(together[:1], alone, rtol=0, atol=1e-6)
    together.square().sum().backward()
    assert (hidden.grad[masks == 0] == 0).all()
    assert hidden.grad[masks == 1].isfinite().all()
    assert all(p.grad.abs().sum() > 0 for p in (*pooling.parameters(), hidden))


@LEARNED
def test_token_weights(name):
    """0 at padding, sum 1; float32 under autocast, where bfloat16 would not sum to 1."""
    mask = torch.tensor([RIGHT, LEFT, FULL])
    with torch.autocast("cpu", torch.bfloat16):
        weights = random_pooling(name).token_weights(torch.randn(3, 5, 6), mask)
    assert ((weights > 0) == mask.bool()).all()
    assert_close(weights.sum(1), torch.ones(3))
