"""Choosing a token: known logits and draws give tokens that can be worked out by hand."""

import pytest
import torch

from config import InputError
from models.sonnet_gpt import check_sampling, sample

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = PROBABILITIES.log()


def drawn(draws, temperature=1.0, top_p=1.0, top_k=0, logits=LOGITS):
    """The token for each draw; a single one goes through the sorted tokens."""
    draws = torch.as_tensor(draws)
    draws = draws[:, None] if draws.ndim == 1 else draws
    return sample(logits.expand(len(draws), -1), draws, temperature, top_p, top_k).tolist()


def kept(**settings):
    """Every token that any draw gives."""
    return set(drawn(torch.linspace(0, 1, 2001)[:-1], **settings))


def test_temperature_0_takes_the_likeliest():
    """Whatever the draw, row by row, and no division by zero."""
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 4.9]])
    assert sample(logits, torch.tensor([[0.0], [0.999]]), 0.0, 0.5, 2).tolist() == [1, 0]


def test_draws_go_through_the_likeliest_first():
    """Inverse CDF by hand: 0.4 for token 1, then 0.3 for 3, 0.2 for 2, 0.1 for 0."""
    assert drawn([0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, 0.999]) == [1, 1, 3, 3, 2, 2, 0, 0]


def test_rows_have_their_own_logits_and_draws():
    """A filter or a draw of one row must not act on another."""
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    assert sample(logits, torch.tensor([[0.1], [0.1], [0.95]]), 1.0, 1.0, 0).tolist() == [1, 2, 0]


@pytest.mark.parametrize(("top_k", "tokens"), [(1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (9, {0, 1, 2, 3})])
def test_top_k_keeps_the_k_likeliest(top_k, tokens):
    """A k beyond the vocabulary keeps all."""
    assert kept(top_k=top_k) == tokens


@pytest.mark.parametrize(("top_p", "tokens"), [
    (1e-9, {1}), (0.35, {1}), (0.45, {1, 3}), (0.65, {1, 3}), (0.75, {1, 2, 3}), (0.95, {0, 1, 2, 3}),
])  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, tokens):
    """The token that crosses p belongs to the set, and the likeliest always does: no set is empty."""
    assert kept(top_p=top_p) == tokens


def test_kept_tokens_share_the_mass_in_proportion():
    """Of 0.4 and 0.3, the first has 4/7 = 0.5714."""
    assert drawn([0.571, 0.572], top_p=0.6) == [1, 3]
    assert drawn([0.571, 0.572], top_k=2) == [1, 3]


@pytest.mark.parametrize("tries", [1, 8])
def test_the_largest_draw_gives_a_kept_token(tries):
    """Rounding in the cumulative sum must not step past the nucleus, to a token that was filtered out."""
    logits = torch.randn(200, 5000, generator=torch.Generator().manual_seed(0))
    tokens = sample(logits, torch.full((200, tries), 1 - 2**-24), 1.0, 0.5, 0)
    probabilities = logits.softmax(-1)
    chosen = probabilities.gather(1, tokens[:, None])
    likelier = (probabilities * (probabilities > chosen)).sum(-1)
    assert (likelier < 0.5 + 1e-5).all()


def test_top_k_comes_before_top_p():
    """After top_k = 2 token 1 has 4/7, which reaches 0.5 alone; before it, 0.4 does not."""
    assert kept(top_p=0.5) == {1, 3}
    assert kept(top_p=0.5, top_k=2) == {1}


def test_temperature_comes_before_top_p():
    """At temperature 0.5 probabilities are squared: token 1 has 0.16 / 0.30 = 0.53, which reaches 0.5 alone."""
    assert kept(temperature=0.5, top_p=0.5) == {1}
    assert kept(temperature=4.0, top_p=0.5) == {1, 3}


def test_a_draw_outside_the_nucleus_is_refused():
    """The nucleus of 0.6 is tokens 1 and 3. Of all four in the order of the vocabulary, 0.05 draws token 0 and 0.6
    token 2: both are refused; 0.3 draws token 1 and 0.8 token 3. The last draw goes through the sorted ones."""
    draws = [[0.05, 0.3, 0.9], [0.6, 0.8, 0.1], [0.8, 0.3, 0.1], [0.6, 0.05, 0.571], [0.6, 0.05, 0.572]]
    assert drawn(draws, top_p=0.6) == [1, 3, 3, 1, 3]


@pytest.mark.parametrize(("logits", "top_p", "expected"), [
    (LOGITS, 0.6, [0, 4 / 7, 0, 3 / 7]), (LOGITS, 1.0, [0.1, 0.4, 0.2, 0.3]), (LOGITS, 0.35, [0, 1, 0, 0]),
    (torch.zeros(4), 0.5, [0.5, 0.5, 0, 0]),  # of equal tokens the first are likelier
])  # fmt: skip
def test_refusing_draws_leaves_the_same_distribution(logits, top_p, expected):
    """Over a fine grid of pairs of draws, each token's share is its mass within the nucleus."""
    grid = torch.arange(400) / 400 + 1 / 800
    tokens = drawn(torch.cartesian_prod(grid, grid), top_p=top_p, logits=logits)
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / 400**2
    assert (shares - torch.tensor(expected)).abs().max() < 0.005


def test_frequencies_are_those_of_the_softmax():
    """20,000 draws, each token within four standard deviations of its probability."""
    logits, temperature, count = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5]), 0.7, 20_000
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(torch.tensor(drawn(draws, temperature, logits=logits)), minlength=5) / count
    expected = (logits / temperature).softmax(0)
    assert ((frequencies - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", -0.1), ("temperature", float("inf")), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1),
    ("top_p", float("nan")), ("top_k", -1), ("max_new_tokens", 0),
])  # fmt: skip
def test_a_setting_out_of_range_is_named(name, value):
    """Such a setting would end in NaN, in an empty set or in nothing written."""
    settings = {"temperature": 1.0, "top_p": 0.9, "top_k": 0, "max_new_tokens": 10}
    check_sampling(**settings)
    with pytest.raises(InputError, match=f"{name} must be .*{value}"):
        check_sampling(**settings | {name: value})
