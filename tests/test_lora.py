"""LoRA on a model: starts as the identity, trains nothing else, and merges into W + (alpha / r) B A."""

import pytest
import torch
from helpers import randomise, states
from torch import nn
from torch.testing import assert_close

from config import LINEARS, PRESETS, GPT2Config, InputError, LoRAConfig
from lora import LoRALinear, adapters, apply_lora, hold_frozen, merge_lora, save_adapter
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT


def test_starts_as_the_identity(gpt, ids):
    """B is zero, so step 0 is the pretrained model, bit for bit; A is not, or nothing would ever train."""
    before = states(gpt, ids)
    apply_lora(gpt, LoRAConfig(targets=LINEARS))
    assert torch.equal(states(gpt, ids), before)
    assert len(adapters(gpt)) == 12
    assert all(adapter.lora_a.weight.any() for adapter in adapters(gpt).values())


def test_parameter_counts_of_the_paper_size_model():
    """By hand: 12 layers x rank 4 x (q 1536 + v 1536 + interm_dense 3840) = 331,776, on 124,439,808."""
    with torch.device("meta"):
        gpt = apply_lora(GPT2Model(PRESETS["gpt2"]), LoRAConfig())
    trainable = sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad)
    assert (trainable, sum(parameter.numel() for parameter in gpt.parameters())) == (331_776, 124_771_584)


def test_training_moves_the_adapters_alone(gpt, ids):
    """The report's LoRA computed the base's full gradients, and never used or cleared them."""
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    model = apply_lora(SonnetGPT(gpt), LoRAConfig()).train()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    assert all(".lora_" in name for name in start)
    for name, parameter in model.named_parameters():
        if name in start:
            assert not torch.equal(parameter, start[name]), name
        else:
            assert parameter.grad is None, name
    after = {name.replace(".base.", "."): tensor for name, tensor in gpt.state_dict().items() if ".lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_heads_around_the_model_stay_trainable(gpt):
    """Freezing is of the backbone, not of whatever name does not match."""
    model = apply_lora(nn.ModuleDict({"gpt": gpt, "head": nn.Linear(32, 2)}), LoRAConfig())
    assert all(parameter.requires_grad for parameter in model["head"].parameters())
    assert not model["gpt"].token_embedding.weight.requires_grad


def test_by_hand():
    """W = [[1, 2], [3, 4]], b = [10, 20], A = [1, -1], B = [2, 3], alpha / r = 5: W + 5 B A = [[11, -8], [18, -11]]."""
    layer = LoRALinear(nn.Linear(2, 2), rank=1, alpha=5, dropout=0.0)
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.base.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_a.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_b.weight.copy_(torch.tensor([[2.0], [3.0]]))
    # x = [1, 2]: W x + b = [15, 31], A x = -1, so the update is 5 * [-2, -3]
    assert_close(layer(torch.tensor([1.0, 2.0])), torch.tensor([5.0, 16.0]))
    assert_close(layer.merged().weight, torch.tensor([[11.0, -8.0], [18.0, -11.0]]))


def test_alpha_is_divided_by_the_rank():
    """Without the division a larger rank would also be a larger step."""
    assert LoRALinear(nn.Linear(8, 8), rank=4, alpha=16, dropout=0.0).scaling == 4


def test_dropout_is_on_the_updates_input_alone():
    """In training a constant input gives updates that differ, while the base's part never does."""
    layer = LoRALinear(nn.Linear(8, 8), rank=2, alpha=2, dropout=0.5).train()
    x = torch.ones(8)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.ones_(layer.lora_b.weight)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_merged_equals_unmerged_and_twice_is_once(gpt, ids):
    """A second merge must not add the update again, and no adapter may be left."""
    randomise(apply_lora(gpt, LoRAConfig(rank=3, alpha=6, targets=LINEARS)))
    unmerged = states(gpt, ids)
    merged = states(merge_lora(gpt), ids)
    assert_close(merged, unmerged, atol=1e-5, rtol=0)
    assert not adapters(gpt)
    assert torch.equal(states(merge_lora(gpt), ids), merged)


def test_frozen_matrices_are_held_in_bfloat16(gpt, ids):
    """Cast once: what trains, norms and positions stay in float32, and the loss is autocast's but for rounding."""
    model = randomise(apply_lora(SonnetGPT(gpt), LoRAConfig())).eval()
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        before = model.loss(ids[:, :-1], ids[:, 1:])
        after = hold_frozen(model, torch.bfloat16).loss(ids[:, :-1], ids[:, 1:])
    assert_close(after, before, atol=0.02, rtol=0)
    halves = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert len(halves) == 1 + 2 * 6 * 2  # the embedding, and weight and bias of six linears a layer
    assert not any(".lora_" in name or "norm" in name or "position" in name for name in halves)
    assert all(torch.equal(tensor, exact[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


def test_a_model_held_in_bfloat16_saves_its_true_base_and_is_not_merged(gpt, tmp_path):
    """The adapter's file must name the float32 base; merged into the cast one, its digits would be lost."""
    model = randomise(apply_lora(gpt, LoRAConfig()))
    save_adapter(model, tmp_path / "before")
    hold_frozen(model, torch.bfloat16)
    save_adapter(model, tmp_path / "after")
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    with pytest.raises(InputError, match="load the base and the adapter anew"):
        merge_lora(model)


def test_nothing_is_held_where_nothing_is_frozen(gpt):
    """Full fine-tuning keeps float32 weights: small steps on bfloat16 ones round to nothing."""
    hold_frozen(gpt, torch.bfloat16)
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    assert merge_lora(gpt) is gpt


def test_a_second_adapter_is_refused(gpt):
    """It would wrap the first one's linears, or train both."""
    apply_lora(gpt, LoRAConfig())
    with pytest.raises(InputError, match="already"):
        apply_lora(gpt, LoRAConfig())


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 0}, "rank.* not 0"), ({"rank": -1}, "rank.* not -1"), ({"rank": 2.0}, "rank.* not 2.0"),
    ({"alpha": 0.0}, "alpha.* not 0.0"), ({"alpha": float("nan")}, "alpha.* not nan"),
    ({"dropout": 1.0}, "dropout.* not 1.0"), ({"targets": ("q_proj", "c_attn")}, "c_attn"), ({"targets": ()}, "empty"),
])  # fmt: skip
def test_a_setting_out_of_range_is_named(settings, message):
    """Rank 0 would divide by zero, and an unknown target adapt nothing."""
    with pytest.raises(InputError, match=message):
        LoRAConfig(**settings)


def test_a_rank_above_the_width_is_refused():
    """It would hold more parameters than the weight that it updates."""
    with pytest.raises(InputError, match="rank 9 does not fit a 8 x 8 weight"):
        apply_lora(GPT2Model(GPT2Config(layers=1, width=8, heads=2, vocab_size=10, positions=4)), LoRAConfig(rank=9))
