"""Cheap dropout is dropout: the rate at every place, independent values, scaling that keeps the mean, its gradient."""

import pytest
import torch
from torch.testing import assert_close

from modules.attention import causal_attention
from modules.dropout import LEVELS, Dropout, dropout

COUNT = 800_000


def kept(p: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout(torch.ones(COUNT), p).ne(0)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_at_every_position_modulo_eight(p):
    """Bits drawn without their top one would drop every fourth or eighth value at another rate.

    Each of the 8 shares of 100,000 values has a standard deviation of sqrt(p (1 - p) / 100,000); 5 of them are allowed.
    """
    rates = 1 - kept(p).view(-1, 8).float().mean(0)
    assert_close(rates, torch.full((8,), p), atol=5 * (p * (1 - p) * 8 / COUNT) ** 0.5, rtol=0)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64])
def test_values_are_independent_of_their_neighbours(lag):
    """The correlation of a value with one `lag` places on has a standard deviation of 1 / sqrt(count)."""
    noise = kept(0.1).float()
    noise = (noise - noise.mean()) / noise.std()
    assert abs((noise[lag:] * noise[:-lag]).mean()) < 5 * COUNT**-0.5


def test_calls_draw_anew_and_the_seed_fixes_them():
    torch.manual_seed(3)
    first, second = dropout(torch.ones(1000), 0.5), dropout(torch.ones(1000), 0.5)
    torch.manual_seed(3)
    assert not torch.equal(first, second)
    assert torch.equal(first, dropout(torch.ones(1000), 0.5))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(p):
    """The scale is that of the rounded rate, exactly, not that of p."""
    rounded = round(p * LEVELS) / LEVELS
    values = dropout(torch.ones(COUNT), p).unique()
    assert_close(values, torch.tensor([0.0, 1 / (1 - rounded)]))


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_close(grad, out.detach() / x.detach())


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.1, False)])
def test_off_it_returns_its_input(p, training):
    x = torch.randn(10)
    assert Dropout(p).train(training)(x) is x


def test_a_rate_near_one_stays_finite():
    assert dropout(torch.ones(100), 1 - 1e-9).isfinite().all()


@pytest.mark.parametrize("block", [4, 9, 256])
def test_written_out_attention_is_the_fused_one(block):
    """With nothing dropped, value and gradients; the form used in training on a CPU."""
    parts = [torch.randn(2, 3, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = causal_attention(*parts, 0.0, block)
    fused = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
    assert_close(ours, fused)
    slope = torch.randn_like(ours)
    assert_close(torch.autograd.grad(ours, parts, slope), torch.autograd.grad(fused, parts, slope))


def test_attention_drops_weights_and_not_values():
    """One value for all tokens: a row's output is the sum of its kept weights, scaled, and its mean over draws is 1."""
    torch.manual_seed(0)
    zeros, ones = torch.zeros(64, 32, 16, 1), torch.ones(64, 32, 16, 1)
    out = causal_attention(zeros, zeros, ones, 0.2)
    assert_close(out.mean((0, 1)), torch.ones(16, 1), atol=0.06, rtol=0)
    first = out[:, :, 0].unique()  # a first token sees itself alone: its weight is kept, or nothing is left
    assert_close(first, torch.tensor([0.0, 1 / (1 - round(0.2 * LEVELS) / LEVELS)]))
