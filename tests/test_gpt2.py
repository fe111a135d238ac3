"""The forward pass equals transformers', is causal, and ignores padding and batch mates."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import logits, states
from torch.testing import assert_close

from config import ROOT, GPT2Config, InputError
from models.gpt2 import GPT2Model
from modules.attention import CausalSelfAttention, KVCache

CLOSE = {"atol": 1e-5, "rtol": 0}
# Where the real tokens of three texts are in a batch of 12 tokens
PLACES = {
    "right": ([*range(12)], [*range(5)], [*range(9)]),
    "left": ([*range(12)], [*range(7, 12)], [*range(3, 12)]),
    "between": ([*range(12)], [0, 1, 4, 10, 11], [1, *range(3, 11)]),
}
SIDES = pytest.mark.parametrize("side", PLACES)


def pad(ids, side, filler=7):
    """The texts in a padded batch, and its mask; padding is an ordinary token."""
    batch, mask = torch.full((3, 12), filler), torch.zeros(3, 12, dtype=torch.long)
    for row, places in enumerate(PLACES[side]):
        batch[row, places] = ids[row, : len(places)]
        mask[row, places] = 1
    return batch, mask


@torch.no_grad()
def test_logits_and_hidden_states_equal_transformers(gpt, reference, ids):
    """Of every layer: covers erf GELU, a feed-forward width of 3 d, epsilon and transposes."""
    expected = reference(ids, output_hidden_states=True)
    outputs = []
    for layer in gpt.layers:
        layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    assert_close(logits(gpt, ids), expected.logits, **CLOSE)
    assert_close(outputs[0], expected.hidden_states[1], **CLOSE)
    assert_close(gpt.final_norm(outputs[1]), expected.hidden_states[2], **CLOSE)


@torch.no_grad()
@SIDES
def test_padding_and_batch_mates_change_nothing(gpt, ids, side):
    """Each text is as if it were alone, and what the padding contains is never read."""
    batch, mask = pad(ids, side)
    output = gpt(batch, mask)
    hidden = output["last_hidden_state"]
    assert hidden.isfinite().all()  # at padding too: NaN would reach every gradient
    for row, places in enumerate(PLACES[side]):
        alone = states(gpt, ids[row : row + 1, : len(places)])[0]
        assert_close(hidden[row, places], alone, **CLOSE)
        assert_close(output["last_token"][row], alone[-1], **CLOSE)
    real = mask.bool()
    other = gpt(pad(ids, side, filler=250)[0], mask)["last_hidden_state"]
    assert torch.equal(other[real], hidden[real])
    if side == "right":  # causality hides this padding, also without a mask
        assert_close(states(gpt, batch)[real], hidden[real], **CLOSE)


@pytest.mark.parametrize("position", [1, 10, 19])
def test_causality(gpt, ids, position):
    """A later token changes no bit of an earlier state; it does change its own state."""
    changed = ids.clone()
    changed[:, position] = (changed[:, position] + 1) % 300
    before, after = states(gpt, ids), states(gpt, changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.isclose(before[:, position], after[:, position]).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 4, 3), (1, 10, 1)], ids=str)
@pytest.mark.parametrize("side", [None, *PLACES])
def test_cache_equals_no_cache(gpt, ids, side, chunks):
    """Several tokens after a non-empty cache see neither each other's future nor padding."""
    batch, mask = (ids[:, :12], None) if side is None else pad(ids, side)
    cache, parts = KVCache(gpt.config, 3, 12), []
    for part in batch.split(chunks, 1):
        seen = cache.length + part.shape[1]
        output = gpt(part, None if mask is None else mask[:, :seen], cache)
        parts.append(output["last_hidden_state"])
    whole = gpt(batch, mask)["last_hidden_state"]
    real = slice(None) if mask is None else mask.bool()
    assert_close(torch.cat(parts, 1)[real], whole[real], **CLOSE)


@pytest.mark.parametrize("cached", [0, 60])
def test_past_the_last_position_is_an_error(gpt, cached):
    """The embedding's index error would name neither the length nor the limit."""
    cache = KVCache(gpt.config, 1, 70)
    if cached:
        gpt(torch.zeros(1, cached, dtype=torch.long), cache=cache)
    with pytest.raises(InputError, match=r"65 tokens, .* 64 positions"):
        gpt(torch.zeros(1, 65 - cached, dtype=torch.long), cache=cache)


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
    assert torch.equal(states(gpt, ids), states(gpt, ids))
    for part in (gpt.dropout, gpt.layers[0].dropout, gpt.layers[0].attention.attend):
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


def test_two_heads_by_hand():
    """Heads of width 1 read one column each: scores 3 and 9 in one, 2 and 1 in the other."""
    attention = CausalSelfAttention(GPT2Config(n_layer=1, n_embd=2, n_head=2)).eval()
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            linear.weight.copy_(torch.eye(2))
            linear.bias.zero_()
    output = attention(torch.tensor([[[1.0, 2.0], [3.0, 1.0]]]))
    first = (1 * math.exp(3) + 3 * math.exp(9)) / (math.exp(3) + math.exp(9))  # 2.9951
    second = (2 * math.exp(2) + 1 * math.exp(1)) / (math.exp(2) + math.exp(1))  # 1.7311
    assert_close(output, torch.tensor([[[1.0, 2.0], [first, second]]]))


def test_initialization():
    """Normal with 0.02, the two matrices that end in the residual with 0.02 / sqrt(2 L)."""
    torch.manual_seed(0)
    gpt = GPT2Model(GPT2Config(8, 128, 4, vocab_size=500, n_positions=100))
    for name, parameter in gpt.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == float("norm.weight" in name)).all()
        else:
            residual = "out_proj" in name or "out_dense" in name
            expected = 0.02 / 4 if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03)
            assert abs(parameter.mean().item()) < 0.001


def test_sizes_that_a_caller_expects_are_checked(folder):
    """The course's code passes d, l and num_heads, also by position."""
    assert GPT2Model.from_pretrained(folder, 32, 2, 4).config.n_embd == 32
    for name, wrong in {"d": 48, "l": 12, "num_heads": 12}.items():
        with pytest.raises(InputError, match=f"{name}=.*{wrong}"):
            GPT2Model.from_pretrained(folder, **{name: wrong})


def test_the_core_runs_without_the_rest(tmp_path):
    """A student copies modules/, models/gpt2.py and config.py; transformers is not imported."""
    shutil.copytree(ROOT / "modules", tmp_path / "modules")
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "models" / "gpt2.py", tmp_path / "models")
    shutil.copy(ROOT / "config.py", tmp_path)
    code = """
import sys, torch
from config import GPT2Config
from models.gpt2 import GPT2Model
gpt = GPT2Model(GPT2Config(1, 8, 2, vocab_size=10, n_positions=4))
print(tuple(gpt(torch.tensor([[1, 2, 3]]))["last_token"].shape), "transformers" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout == "(1, 8) False\n"


def test_a_special_token_in_a_text_is_ordinary_text(gpt):
    """Otherwise a text could end itself; decoding gives the text back."""
    texts = ["beauty's rose", " Might <|endoftext|> never die,\n\n", "caf\u00e9 that , he . 's", ""]
    rows = gpt.encode(texts)
    assert not any(gpt.end_of_text in row for row in rows)
    assert [gpt.decode([*row, gpt.end_of_text]) for row in rows] == texts
    assert gpt.encode([]) == []


def test_a_token_beyond_the_vocabulary_is_named(gpt):
    """The embedding has no such row; without that token the text can be encoded."""
    gpt.tokenizer.add_tokens(["[PAD]"])
    with pytest.raises(InputError, match=r"\[PAD\].*300"):
        gpt.encode(["a rose", "a [PAD] rose"])
    assert gpt.encode(["a rose"]) == [gpt.tokenizer("a rose")["input_ids"]]
