"""The forward pass equals transformers', is causal, and ignores padding and batch mates."""

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
from modules.attention import KVCache

CLOSE = {"atol": 1e-5, "rtol": 0}
# Where the real tokens of three texts are in a batch of 12 tokens
PLACES = {
    "right": ([*range(12)], [*range(5)], [*range(9)]),
    "left": ([*range(12)], [*range(7, 12)], [*range(3, 12)]),
    "between": ([*range(12)], [0, 1, 4, 10, 11], [1, *range(3, 11)]),
}


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
    gpt.layers[0].register_forward_hook(lambda layer, args, output: outputs.append(output))
    assert_close(logits(gpt, ids), expected.logits, **CLOSE)
    assert_close(outputs[0], expected.hidden_states[1], **CLOSE)
    assert_close(states(gpt, ids), expected.hidden_states[2], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", PLACES)
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


def test_causality(gpt, ids):
    """A later token changes no bit of an earlier state; it does change its own state."""
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 300
    before, after = states(gpt, ids), states(gpt, changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.isclose(before[:, 10], after[:, 10]).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 1, 6)], ids=str)
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


def test_past_the_last_position_is_an_error(gpt):
    """The embedding's index error would name neither the length nor the limit."""
    cache, ids = KVCache(gpt.config, 1, 70), torch.zeros(1, 65, dtype=torch.long)
    gpt(ids[:, :60], cache=cache)
    for settings in ({"input_ids": ids}, {"input_ids": ids[:, 60:], "cache": cache}):
        with pytest.raises(InputError, match=r"65 tokens, .* 64 positions"):
            gpt(**settings)


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
    for gpt.gradient_checkpointing in (False, True):
        gpt.train().zero_grad()
        torch.manual_seed(0)
        gpt(ids)["last_hidden_state"].square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in gpt.parameters()])
    assert all(map(torch.equal, *gradients))


def test_initialization():
    """Normal with 0.02, the two matrices that end in the residual with 0.02 / sqrt(2 L)."""
    torch.manual_seed(0)
    gpt = GPT2Model(GPT2Config(8, 128, 4, vocab_size=500, n_positions=100))
    for name, parameter in gpt.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == float("norm.weight" in name)).all()
        else:
            expected = 0.02 / 4 if "out_proj" in name or "out_dense" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03)


def test_sizes_that_a_caller_expects_are_checked(folder):
    """The course's code passes d, l and num_heads, also by position."""
    assert GPT2Model.from_pretrained(folder, 32, 2, 4).config.n_embd == 32
    for name, wrong in {"d": 48, "l": 12, "num_heads": 12}.items():
        with pytest.raises(InputError, match=f"{name}=.*{wrong}"):
            GPT2Model.from_pretrained(folder, **{name: wrong})


CODE = """
import sys, torch
from config import GPT2Config
from models.gpt2 import GPT2Model
gpt = GPT2Model(GPT2Config(1, 8, 2, vocab_size=10, n_positions=4))
print(gpt(torch.tensor([[1, 2, 3]]))["last_token"].shape[1], "transformers" in sys.modules)
"""


def test_the_core_runs_without_the_rest(tmp_path):
    """A student copies modules/, models/gpt2.py and config.py; transformers is not imported."""
    shutil.copytree(ROOT / "modules", tmp_path / "modules")
    (tmp_path / "models").mkdir()
    for name in ("config.py", "models/gpt2.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    settings = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": ""}, "text": True}
    assert subprocess.check_output([sys.executable, "-c", CODE], **settings) == "8 False\n"


def test_a_special_token_in_a_text_is_ordinary_text(gpt):
    """Otherwise a text could end itself; a token beyond the vocabulary is named."""
    texts = ["beauty's rose", " Might <|endoftext|> never die,\n\n", "caf\u00e9 that , he . 's", ""]
    rows = gpt.encode(texts)
    assert not any(gpt.end_of_text in row for row in rows)
    assert [gpt.decode([*row, gpt.end_of_text]) for row in rows] == texts
    assert gpt.encode([]) == []
    gpt.tokenizer.add_tokens(["[PAD]"])
    with pytest.raises(InputError, match=r"\[PAD\].*not have"):
        gpt.encode(["a rose", "a [PAD] rose"])
