"""The forward pass: equal to transformers', causal, and the same whatever the padding, the batch or the cache."""

import math

import pytest
import torch
from torch.testing import assert_close

from config import GPT2Config, InputError
from modules.attention import CausalSelfAttention, KVCache

LENGTHS = (12, 5, 9)
CLOSE = {"atol": 1e-5, "rtol": 0}


def pad(rows, left, filler=7):
    """Rows of tokens as one batch and its mask; the padding is an ordinary token, so that looking at it shows."""
    width = max(map(len, rows))
    batch = torch.full((len(rows), width), filler)
    mask = torch.zeros_like(batch)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        batch[index, place], mask[index, place] = row, 1
    return batch, mask


@pytest.fixture
def rows(ids):
    return [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]


def new_cache(gpt, batch, length):
    return KVCache(gpt.config, batch, length, torch.float32, torch.device("cpu"))


@torch.no_grad()
def test_logits_equal_transformers(gpt, reference, ids):
    """Guards every detail of the architecture at once: erf GELU, a 3-d feed-forward, an eps, a transposed weight."""
    ours = gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])
    assert_close(ours, reference(ids).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_and_batch_mates_change_nothing(gpt, rows, left):
    """A row's states must not depend on its padding's side or on the rows beside it."""
    batch, mask = pad(rows, left)
    hidden = gpt(batch, mask)["last_hidden_state"]
    assert hidden.isfinite().all()  # padding too: a NaN there would reach every gradient
    for index, row in enumerate(rows):
        assert_close(hidden[index, mask[index].bool()], gpt(row[None])["last_hidden_state"][0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_what_stands_in_the_padding_is_never_read(gpt, rows, left):
    """A mask that is only nearly -inf, or multiplied into the scores, would let the padding's content through."""
    (batch, mask), (other, _) = pad(rows, left, filler=7), pad(rows, left, filler=250)
    real = mask.bool()
    assert torch.equal(gpt(batch, mask)["last_hidden_state"][real], gpt(other, mask)["last_hidden_state"][real])


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_last_token_is_the_last_real_one(gpt, rows, left):
    """The report's baseline read [:, -1], which is padding in a right-padded row."""
    batch, mask = pad(rows, left)
    alone = torch.cat([gpt(row[None])["last_hidden_state"][:, -1] for row in rows])
    assert_close(gpt(batch, mask)["last_token"], alone, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("position", [1, 10, 19])
def test_a_later_token_moves_no_earlier_state(gpt, ids, position):
    """Causality, bit for bit; and the token itself does move its own state."""
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 1) % 300
    before, after = gpt(ids)["last_hidden_state"], gpt(changed)["last_hidden_state"]
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.isclose(before[:, position], after[:, position]).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 4, 3), (1, 10, 1)], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["unpadded", "left-padded"])
def test_cache_equals_no_cache(gpt, ids, rows, left, chunks):
    """Several tokens on a non-empty cache must not see each other's future, nor lose the past's padding."""
    batch, mask = pad(rows, left=True) if left else (ids[:, :12], torch.ones(3, 12, dtype=torch.long))
    cache, parts, start = new_cache(gpt, 3, 12), [], 0
    for size in chunks:
        stop = start + size
        output = gpt(batch[:, start:stop], mask[:, :stop], cache)
        parts.append(output["last_hidden_state"])
        start = stop
    whole, real = gpt(batch, mask), mask.bool()
    assert cache.length == 12
    assert_close(torch.cat(parts, 1)[real], whole["last_hidden_state"][real], **CLOSE)
    assert_close(output["last_token"], whole["last_token"], **CLOSE)


@torch.no_grad()
def test_right_padded_prompts_continue_on_a_cache(gpt, rows, ids):
    """Padding between a prompt and what follows it must be neither seen nor counted as a position."""
    batch, mask = pad(rows, left=False)
    following = ids[:, 15:17]
    cache = new_cache(gpt, 3, 14)
    gpt(batch, mask, cache)
    states = gpt(following, torch.cat([mask, torch.ones_like(following)], 1), cache)["last_hidden_state"]
    for index, row in enumerate(rows):
        alone = gpt(torch.cat([row, following[index]])[None])["last_hidden_state"]
        assert_close(states[index], alone[0, -2:], **CLOSE)


@torch.no_grad()
def test_cache_keeps_the_rows_asked_for(gpt, ids):
    """After a row has ended, the others must go on with their own keys and values."""
    cache = new_cache(gpt, 3, 12)
    gpt(ids[:, :11], cache=cache)
    cache.keep(torch.tensor([2, 0]))
    state = gpt(ids[[2, 0], 11:12], cache=cache)["last_token"]
    assert_close(state, gpt(ids[[2, 0], :12])["last_token"], **CLOSE)


@pytest.mark.parametrize("held", [0, 60])
def test_past_the_last_position_is_an_error(gpt, held):
    """Without it the embedding's index error would name neither the length nor the limit."""
    cache = new_cache(gpt, 1, 70)
    if held:
        gpt(torch.zeros(1, held, dtype=torch.long), cache=cache)
    with pytest.raises(InputError, match=r"65 tokens, .* 64 positions"):
        gpt(torch.zeros(1, 65 - held, dtype=torch.long), cache=cache)


def test_mask_of_another_shape_is_an_error(gpt, ids):
    """A mask of the new tokens alone, given with a cache, would otherwise be broadcast or misread."""
    with pytest.raises(InputError, match=r"\(3, 19\); expected \(3, 20\)"):
        gpt(ids, torch.ones(3, 19))


def test_token_0_trains(gpt):
    """padding_idx=0 once froze the embedding of the token "!"."""
    gpt(torch.tensor([[0, 1]]))["last_token"].sum().backward()
    assert gpt.token_embedding.weight.grad[0].abs().sum() > 0


def test_dropout_acts_in_training_alone(gpt, ids):
    """Each of the three kinds of dropout, and no randomness in evaluation."""
    assert torch.equal(gpt(ids)["last_token"], gpt(ids)["last_token"])
    for part in (gpt.dropout, gpt.layers[0].dropout, gpt.layers[0].attention):
        part.train()
        assert not torch.equal(gpt(ids)["last_token"], gpt(ids)["last_token"])
        part.eval()


def identity_attention(heads):
    attention = CausalSelfAttention(GPT2Config(layers=1, width=2, heads=heads))
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            projection.weight.copy_(torch.eye(2))
            projection.bias.zero_()
    return attention.eval()


def test_attention_by_hand():
    """One head: the scores of token 2 are 0 and 1/sqrt 2, so its weights are 1 and e^(1/sqrt 2), over their sum."""
    output = identity_attention(heads=1)(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    own = math.exp(1 / math.sqrt(2)) / (1 + math.exp(1 / math.sqrt(2)))  # 0.6698
    assert_close(output, torch.tensor([[[1.0, 0.0], [1 - own, own]]]))


def test_two_heads_by_hand():
    """Heads of width 1 each read their own column: scores 3 and 9 in one, 2 and 1 in the other."""
    output = identity_attention(heads=2)(torch.tensor([[[1.0, 2.0], [3.0, 1.0]]]))
    first = (1 * math.exp(3) + 3 * math.exp(9)) / (math.exp(3) + math.exp(9))  # 2.9951
    second = (2 * math.exp(2) + 1 * math.exp(1)) / (math.exp(2) + math.exp(1))  # 1.7311
    assert_close(output, torch.tensor([[[1.0, 2.0], [first, second]]]))
