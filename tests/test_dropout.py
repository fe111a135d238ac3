"""Cheap dropout has the right rate everywhere, independent values, mean and gradient."""

import pytest
import torch
from torch.testing import assert_close

from modules.attention import causal_attention
from modules.dropout import LEVELS, Dropout, dropout

COUNT = 800_000


def kept(p, seed=0):
    torch.manual_seed(seed)
    return dropout(torch.ones(COUNT), p).ne(0)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_at_every_position_modulo_eight(p):
    """Random bits without the top one would give every fourth or eighth value another rate.

    The rate over 100,000 values has a standard deviation of sqrt(p (1 - p) / 100,000); 5 of them
    are allowed.
    """
    rates = 1 - kept(p).view(-1, 8).float().mean(0)
    assert_close(rates, torch.full((8,), p), atol=5 * (p * (1 - p) * 8 / COUNT) ** 0.5, rtol=0)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64])
def test_values_are_independent_of_their_neighbours(lag):
    """The correlation at a distance of `lag` has a standard deviation of 1 / sqrt(count)."""
    noise = kept(0.1).float()
    noise = (noise - noise.mean()) / noise.std()
    assert abs((noise[lag:] * noise[:-lag]).mean()) < 5 * COUNT**-0.5


def test_calls_differ_and_the_seed_determines_them():
    torch.manual_seed(3)
    first, second = dropout(torch.ones(1000), 0.5), dropout(torch.ones(1000), 0.5)
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(first, dropout(torch.ones(1000), 0.5))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3])
def test_kept_values_are_scaled_so_that_the_mean_stays(p):
    """The scale is exactly that of the rounded rate, not that of p."""
    rounded = round(p * LEVELS) / LEVELS
    values = dropout(torch.ones(COUNT), p).unique()
    assert_close(values, torch.tensor([0.0, 1 / (1 - rounded)]))


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_close(grad, out.detach() / x.detach())


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.1, False)])
def test_without_dropout_the_input_is_returned(p, training):
    x = torch.randn(10)
    assert Dropout(p).train(training)(x) is x


def test_a_rate_near_one_stays_finite():
    assert dropout(torch.ones(100), 1 - 1e-9).isfinite().all()


@pytest.mark.parametrize("block", [4, 9, 256])
@pytest.mark.parametrize("cached", [0, 1, 5])
def test_attention_written_out_equals_the_fused_one(block, cached):
    """Values and gradients without dropout, also if the queries follow cached tokens."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 3, tokens, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for tokens in (9, cached + 9, cached + 9)
    ]
    visible = torch.ones(9, cached + 9, dtype=torch.bool).tril(cached)
    ours = causal_attention(*inputs, 0.0, block)
    fused = torch.nn.functional.scaled_dot_product_attention(*inputs, visible)
    assert_close(ours, fused)
    grad = torch.randn_like(ours)
    assert_close(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(fused, inputs, grad))


def test_attention_drops_weights_and_not_values():
    """With all values 1, an output is the scaled sum of the kept weights, and its mean is 1."""
    torch.manual_seed(0)
    zeros, ones = torch.zeros(64, 32, 16, 1), torch.ones(64, 32, 16, 1)
    out = causal_attention(zeros, zeros, ones, 0.2)
    assert_close(out.mean((0, 1)), torch.ones(16, 1), atol=0.06, rtol=0)
    first = out[:, :, 0].unique()  # the first token only attends to itself: kept or dropped
    assert_close(first, torch.tensor([0.0, 1 / (1 - round(0.2 * LEVELS) / LEVELS)]))
