"""Sampling: known logits and random numbers give tokens that can be worked out by hand."""

import pytest
import torch

from config import InputError, SamplingConfig
from models.sonnet_gpt import DRAWS, sample

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = PROBABILITIES.log()


def sampled(uniform, logits=LOGITS, temperature=1.0, top_p=1.0, top_k=0):
    """The token for each row of random numbers; `logits` (B, V) or (V,) for all."""
    uniform = torch.as_tensor(uniform)
    if uniform.ndim == 1:
        uniform = uniform[:, None]
    config = SamplingConfig(temperature, top_p, top_k)
    return sample(logits.expand(len(uniform), -1), uniform, config).tolist()


def random_rows(count):
    return torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(0))


def reachable(**settings):
    """All tokens that some random numbers give."""
    return set(sampled(random_rows(2000), **settings))


def test_temperature_0_takes_the_most_probable():
    """For every random number, row by row, and without a division by zero."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.9]])
    assert sampled([0.0, 0.999], logits, 0.0, top_p=0.5, top_k=2) == [1, 0]


def test_a_random_number_inverts_the_cdf():
    """By hand: 0.1 for token 0, then 0.4, 0.2 and 0.3."""
    uniform = [0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.999]
    assert sampled(uniform) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_after_a_rejected_draw_only_more_probable_tokens_are_drawn():
    """Nucleus 0.6 is {1, 3}. 0.05 draws 0; of the other 0.9, 0.5 draws 2; of 0.4 + 0.3, 1 or 3."""
    assert sampled([[0.05, 0.5, 0.5], [0.05, 0.5, 0.6]], top_p=0.6) == [1, 3]


def test_if_all_draws_are_rejected_the_most_probable_token_is_taken():
    """That has a probability of about 2 ** -DRAWS."""
    assert sampled([0.05, 0.999], top_p=0.35) == [1, 1]


def test_rows_have_their_own_logits_and_random_numbers():
    """One row's filter or random number does not act on another row."""
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    assert sampled([0.2, 0.2, 0.95], logits) == [1, 0, 3]


@pytest.mark.parametrize(
    ("top_k", "tokens"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_k_most_probable(top_k, tokens):
    """A k beyond the vocabulary keeps all."""
    assert reachable(top_k=top_k) == tokens


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (1e-9, {1}),
        (0.35, {1}),
        (0.45, {1, 3}),
        (0.65, {1, 3}),
        (0.75, {1, 2, 3}),
        (0.95, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, tokens):
    """The token that crosses p belongs to the set, and the most probable token always does."""
    assert reachable(top_p=top_p) == tokens


def test_kept_tokens_keep_their_proportions():
    """Of 0.4 and 0.3, the first gets 4/7 = 0.5714."""
    assert sampled([[0.05, 0.5, 0.571], [0.05, 0.5, 0.572]], top_p=0.6) == [1, 3]
    assert sampled([0.571, 0.572], top_k=2) == [1, 3]


@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_the_largest_random_number_gives_a_kept_token(top_p):
    """Rounding in the cumulative sum does not step past the nucleus."""
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor(sampled(torch.full((200, DRAWS), 1 - 2**-24), logits, top_p=top_p))
    probabilities = logits.softmax(-1)
    chosen = probabilities.gather(1, tokens[:, None])
    preceding = (probabilities * (probabilities > chosen)).sum(-1)
    assert (preceding < top_p + 1e-5).all()


def test_top_k_comes_before_top_p():
    """After top_k = 2 token 1 has 4/7, which reaches 0.5 alone; before it, 0.4 does not."""
    assert reachable(top_p=0.5) == {1, 3}
    assert reachable(top_p=0.5, top_k=2) == {1}


def test_temperature_comes_before_top_p():
    """Temperature 0.5 squares probabilities: token 1 has 0.16 / 0.30 = 0.53 and reaches 0.5."""
    assert reachable(temperature=0.5, top_p=0.5) == {1}
    assert reachable(temperature=4.0, top_p=0.5) == {1, 3}


@pytest.mark.parametrize(
    ("logits", "top_p", "expected"),
    [
        (LOGITS, 0.6, [0, 4 / 7, 0, 3 / 7]),
        (LOGITS, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (LOGITS, 0.35, [0, 1, 0, 0]),
        (torch.zeros(4), 1.0, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_shares_are_the_probabilities_within_the_nucleus(logits, top_p, expected):
    """40,000 samples, each token within four standard deviations of its share."""
    tokens = sampled(random_rows(40_000), top_p=top_p, logits=logits)
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 40_000
    expected = torch.tensor(expected)
    deviation = (expected * (1 - expected) / 40_000).sqrt()
    assert ((shares - expected).abs() <= 4 * deviation).all()


def test_frequencies_are_those_of_the_softmax():
    """20,000 samples, each token within four standard deviations of its probability."""
    logits, temperature, count = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5]), 0.7, 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor(sampled(uniform, logits, temperature))
    frequencies = torch.bincount(tokens, minlength=5) / count
    expected = (logits / temperature).softmax(0)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((frequencies - expected).abs() < 4 * deviation).all()


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 1e9])
def test_extreme_temperatures_stay_finite(temperature):
    """Near 0 the most probable token remains; a large temperature makes all equal."""
    tokens = reachable(temperature=temperature)
    assert tokens == ({0, 1, 2, 3} if temperature > 1 else {1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_marked(value, temperature):
    """`generate` makes an error of -1: to ask here would make the host wait for a GPU."""
    logits = torch.tensor([[0.0, value, 1.0], [0.0, 9.0, 1.0]])
    assert sampled([0.5, 0.5], logits, temperature) == [-1, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("max_new_tokens", 0),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    """Such a setting would give NaN, an empty set or no text."""
    with pytest.raises(InputError, match=f"{name} must be .*{value}"):
        SamplingConfig(**{name: value})
