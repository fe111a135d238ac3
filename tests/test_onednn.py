"""Packed weights: they compute the same, and nothing of them remains after decoding."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from config import LoRAConfig
from lora import apply_lora
from modules.onednn import Linear, PackedLinear, is_available, packed_linears

pytestmark = pytest.mark.skipif(not is_available("cpu", torch.float32), reason="needs oneDNN")


@torch.no_grad()
def logits(gpt):
    ids = torch.arange(24).view(3, 8)
    return gpt.hidden_state_to_token(gpt(ids)["last_hidden_state"])


@pytest.mark.parametrize("lora", [False, True])
def test_packed_layers_compute_the_same(gpt, lora):
    """All linear layers and the output embedding are packed; LoRA's small matrices are not."""
    if lora:
        apply_lora(gpt, LoRAConfig())
        for name, weight in gpt.named_parameters():
            if ".lora_b" in name:
                nn.init.normal_(weight, std=0.1)
    expected = logits(gpt)
    with packed_linears(gpt, rows=3):
        assert_close(logits(gpt), expected)
        packed = sum(isinstance(part, PackedLinear) for part in gpt.modules())
        assert packed == 6 * gpt.config.n_layer + 1


@pytest.mark.parametrize("trained", [[], ["weight"], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_computes_what_nn_linear_computes(trained, dtype):
    """Output and gradients are equal, whichever parameters are trained."""
    layer, theirs = Linear(6, 4), nn.Linear(6, 4)
    theirs.load_state_dict(layer.state_dict())
    results = []
    for part in (layer, theirs):
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(name in trained)
        x = torch.linspace(-1, 1, 30).view(1, 5, 6).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = part(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, part.weight.grad, part.bias.grad])
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert ours.dtype == expected.dtype
            assert_close(ours, expected)


def test_the_layers_return_after_an_error(gpt):
    """The parameters are the same objects as before, so that training can go on."""
    before = dict(gpt.named_parameters())
    with pytest.raises(KeyboardInterrupt), packed_linears(gpt, rows=3):
        raise KeyboardInterrupt
    after = dict(gpt.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)
    assert not any(isinstance(part, PackedLinear) for part in gpt.modules())


@pytest.mark.skipif(not is_available("cpu", torch.bfloat16), reason="no bfloat16 unit")
def test_weights_are_packed_in_the_precision_of_autocast(gpt):
    """Otherwise every token would cast them again."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(gpt)
        with packed_linears(gpt, rows=3):
            assert gpt.packed_head.weight.dtype == torch.bfloat16
            assert_close(logits(gpt), expected, rtol=0.02, atol=0.02)
