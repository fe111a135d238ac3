"""The forward pass equals transformers', is causal, and ignores padding and batch-mates."""

import math

import pytest
import torch
from torch.testing import assert_close

from config import GPT2Config, InputError
from modules.attention import CausalSelfAttention, KVCache

LENGTHS = (12, 5, 9)
CLOSE = {"atol": 1e-5, "rtol": 0}
SIDES = pytest.mark.parametrize("left", [False, True], ids=["right", "left"])


def pad(sequences, left, filler=7):
    """A padded batch and its mask; padding is an ordinary token, so that reading it shows."""
    width = max(map(len, sequences))
    batch = torch.full((len(sequences), width), filler)
    mask = torch.zeros_like(batch)
    for index, sequence in enumerate(sequences):
        place = slice(width - len(sequence), None) if left else slice(len(sequence))
        batch[index, place] = sequence
        mask[index, place] = 1
    return batch, mask


@pytest.fixture
def sequences(ids):
    return [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]


@torch.no_grad()
def test_logits_equal_transformers(gpt, reference, ids):
    """Covers all details at once: erf GELU, a feed-forward width of 3 d, epsilon, transposes."""
    ours = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
    assert_close(ours, reference(ids).logits, **CLOSE)


@torch.no_grad()
@SIDES
def test_padding_and_batch_mates_change_nothing(gpt, sequences, left):
    """Hidden states depend neither on the side of the padding nor on the other sequences."""
    batch, mask = pad(sequences, left)
    hidden = gpt(batch, mask)["last_hidden_state"]
    assert hidden.isfinite().all()  # at padding too: NaN would reach every gradient
    for index, sequence in enumerate(sequences):
        alone = gpt(sequence[None])["last_hidden_state"][0]
        assert_close(hidden[index, mask[index].bool()], alone, **CLOSE)


@torch.no_grad()
@SIDES
def test_the_content_of_padding_is_never_read(gpt, sequences, left):
    """A mask that is only nearly -inf, or multiplied with the scores, would let it through."""
    batch, mask = pad(sequences, left, filler=7)
    other, _ = pad(sequences, left, filler=250)
    real = mask.bool()
    one = gpt(batch, mask)["last_hidden_state"][real]
    assert torch.equal(one, gpt(other, mask)["last_hidden_state"][real])


@torch.no_grad()
@SIDES
def test_last_token_is_the_last_real_one(gpt, sequences, left):
    """The report's baseline read [:, -1], which is padding in right-padded sequences."""
    batch, mask = pad(sequences, left)
    alone = [gpt(sequence[None])["last_hidden_state"][:, -1] for sequence in sequences]
    assert_close(gpt(batch, mask)["last_token"], torch.cat(alone), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("position", [1, 10, 19])
def test_causality(gpt, ids, position):
    """A later token changes no bit of an earlier state; it does change its own state."""
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 1) % 300
    before = gpt(ids)["last_hidden_state"]
    after = gpt(changed)["last_hidden_state"]
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.isclose(before[:, position], after[:, position]).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 4, 3), (1, 10, 1)], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["unpadded", "left-padded"])
def test_cache_equals_no_cache(gpt, ids, sequences, left, chunks):
    """Several tokens on a non-empty cache do not see each other's future or old padding."""
    batch, mask = ids[:, :12], torch.ones(3, 12, dtype=torch.long)
    if left:
        batch, mask = pad(sequences, left=True)
    cache = KVCache(gpt.config, 3, 12)
    states, start = [], 0
    for size in chunks:
        stop = start + size
        output = gpt(batch[:, start:stop], mask[:, :stop], cache)
        states.append(output["last_hidden_state"])
        start = stop
    whole, real = gpt(batch, mask), mask.bool()
    assert cache.length == 12
    assert_close(torch.cat(states, 1)[real], whole["last_hidden_state"][real], **CLOSE)
    assert_close(output["last_token"], whole["last_token"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("attn_pdrop", [0.0, 1e-9])
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 4, 3), (5, 1, 6)], ids=str)
def test_cache_equals_no_cache_in_training_mode(gpt, reference, ids, attn_pdrop, chunks):
    """On a CPU, training with dropout uses other code, whose queries once attended only to key 0.

    A rate of 1e-9 selects that code and rounds to dropping nothing.
    """
    gpt.train()
    for part in gpt.modules():
        if hasattr(part, "p"):
            part.p = 0.0
    for layer in gpt.layers:
        layer.attention.dropout = attn_pdrop
    cache = KVCache(gpt.config, 3, 12)
    states = [gpt(part, cache=cache)["last_hidden_state"] for part in ids[:, :12].split(chunks, 1)]
    logits = gpt.hidden_state_to_token(torch.cat(states, 1))
    uncached = gpt.hidden_state_to_token(gpt(ids[:, :12])["last_hidden_state"])
    assert_close(logits, uncached, **CLOSE)
    assert_close(logits, reference(ids[:, :12]).logits, **CLOSE)


@torch.no_grad()
def test_right_padded_prompts_continue_on_a_cache(gpt, sequences, ids):
    """Padding between a prompt and its continuation is neither seen nor counted as a position."""
    batch, mask = pad(sequences, left=False)
    following = ids[:, 15:17]
    cache = KVCache(gpt.config, 3, 14)
    gpt(batch, mask, cache)
    longer = torch.cat([mask, torch.ones_like(following)], 1)
    states = gpt(following, longer, cache)["last_hidden_state"]
    for index, sequence in enumerate(sequences):
        alone = gpt(torch.cat([sequence, following[index]])[None])["last_hidden_state"]
        assert_close(states[index], alone[0, -2:], **CLOSE)


@torch.no_grad()
def test_cache_selects_rows(gpt, ids):
    """After a sequence has ended, the others continue with their own keys and values."""
    cache = KVCache(gpt.config, 3, 12)
    gpt(ids[:, :11], cache=cache)
    cache.select_rows(torch.tensor([2, 0]))
    state = gpt(ids[[2, 0], 11:12], cache=cache)["last_token"]
    assert_close(state, gpt(ids[[2, 0], :12])["last_token"], **CLOSE)


@pytest.mark.parametrize("cached", [0, 60])
def test_past_the_last_position_is_an_error(gpt, cached):
    """The embedding's index error would name neither the length nor the limit."""
    cache = KVCache(gpt.config, 1, 70)
    if cached:
        gpt(torch.zeros(1, cached, dtype=torch.long), cache=cache)
    with pytest.raises(InputError, match=r"65 tokens, .* 64 positions"):
        gpt(torch.zeros(1, 65 - cached, dtype=torch.long), cache=cache)


def test_right_padding_that_is_promised_needs_no_mask(gpt, sequences, monkeypatch):
    """Causality hides it: the same hidden states as with a mask in the blocks."""
    batch, mask = pad(sequences, left=False)
    expected, masks = gpt(batch, mask), []
    forward = type(gpt.layers[0]).forward
    spy = lambda self, x, mask, *more: masks.append(mask) or forward(self, x, mask, *more)  # noqa: E731
    monkeypatch.setattr(type(gpt.layers[0]), "forward", spy)
    output = gpt(batch, mask, right_padded=True)
    assert masks == [None] * len(gpt.layers)
    real = mask.bool()
    assert_close(output["last_hidden_state"][real], expected["last_hidden_state"][real], **CLOSE)
    assert_close(output["last_token"], expected["last_token"], **CLOSE)


def test_mask_of_another_shape_is_an_error(gpt, ids):
    """A mask of the new tokens alone would be broadcast or misread with a cache."""
    with pytest.raises(InputError, match=r"attention_mask.*\(3, 20\)"):
        gpt(ids, torch.ones(3, 19))


def test_token_0_trains(gpt):
    """padding_idx=0 once froze the embedding of the token "!"."""
    gpt(torch.tensor([[0, 1]]))["last_token"].sum().backward()
    assert gpt.token_embedding.weight.grad[0].abs().sum() > 0


def test_dropout_acts_in_training_only(gpt, ids):
    """Each of the three kinds of dropout acts, and nothing is random in evaluation."""
    assert torch.equal(gpt(ids)["last_token"], gpt(ids)["last_token"])
    for part in (gpt.dropout, gpt.layers[0].dropout, gpt.layers[0].attention):
        part.train()
        assert not torch.equal(gpt(ids)["last_token"], gpt(ids)["last_token"])
        part.eval()


def test_gradient_checkpointing_changes_no_gradient(gpt, ids):
    """Recomputed activations are the same, because dropout repeats its random numbers."""
    gradients = []
    for checkpointing in (False, True):
        gpt.gradient_checkpointing = checkpointing
        gpt.train().zero_grad()
        torch.manual_seed(0)
        gpt(ids)["last_hidden_state"].square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in gpt.parameters()])
    assert all(map(torch.equal, *gradients))


def identity_attention(heads):
    attention = CausalSelfAttention(GPT2Config(n_layer=1, n_embd=2, n_head=heads))
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            linear.weight.copy_(torch.eye(2))
            linear.bias.zero_()
    return attention.eval()


def test_attention_by_hand():
    """Token 2 has scores 0 and 1/sqrt 2: weights 1 and e^(1/sqrt 2), divided by their sum."""
    output = identity_attention(heads=1)(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    own = math.exp(1 / math.sqrt(2)) / (1 + math.exp(1 / math.sqrt(2)))  # 0.6698
    assert_close(output, torch.tensor([[[1.0, 0.0], [1 - own, own]]]))


def test_two_heads_by_hand():
    """Heads of width 1 read one column each: scores 3 and 9 in one, 2 and 1 in the other."""
    output = identity_attention(heads=2)(torch.tensor([[[1.0, 2.0], [3.0, 1.0]]]))
    first = (1 * math.exp(3) + 3 * math.exp(9)) / (math.exp(3) + math.exp(9))  # 2.9951
    second = (2 * math.exp(2) + 1 * math.exp(1)) / (math.exp(2) + math.exp(1))  # 1.7311
    assert_close(output, torch.tensor([[[1.0, 2.0], [first, second]]]))
