"""LoRA starts as the identity, trains nothing else, and merges into W + (alpha / r) B A."""

import hashlib

import pytest
import torch
from helpers import randomise, states
from torch import nn
from torch.testing import assert_close

from adapters import load_adapter, mixed_adapters, save_adapter
from config import LINEARS, PRESETS, GPT2Config, InputError, LoRAConfig
from lora import (
    LoRALinear,
    apply_lora,
    base_sha256,
    cast_frozen_weights,
    lora_layers,
    merge_lora,
)
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT


def test_starts_as_the_identity(gpt, ids):
    """B is zero, so step 0 is the pretrained model bit for bit; A is not, or B would not train."""
    before = states(gpt, ids)
    apply_lora(gpt, LoRAConfig(targets=("all",)))
    assert torch.equal(states(gpt, ids), before)
    assert len(lora_layers(gpt)) == 12
    assert all(layer.lora_a.weight.all() for layer in lora_layers(gpt).values())


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [(LoRAConfig().targets, 331_776), (("all",), 663_552)],
    ids=["default", "all"],
)
def test_parameter_counts_of_gpt2(targets, trainable):
    """By hand: 12 layers x rank 4 x (q 1536 + v 1536 + interm_dense 3840) = 331,776.

    All six: 12 x 4 x (4 x 1536 + 2 x 3840) = 663,552.
    """
    with torch.device("meta"):
        gpt = apply_lora(GPT2Model(PRESETS["gpt2"]), LoRAConfig(targets=targets))
    counts = [parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad]
    assert sum(counts) == trainable
    assert sum(parameter.numel() for parameter in gpt.parameters()) == 124_439_808 + trainable


def test_training_changes_lora_only(gpt, ids):
    """The report's LoRA computed gradients of the base and never used or cleared them."""
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    model = apply_lora(SonnetGPT(gpt), LoRAConfig()).train()
    trainable = {name: part for name, part in model.named_parameters() if part.requires_grad}
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
    after = {
        name.replace(".base.", "."): tensor
        for name, tensor in gpt.state_dict().items()
        if ".lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_heads_around_the_model_stay_trainable(gpt):
    """The GPT-2 is frozen, and not everything without LoRA."""
    model = apply_lora(nn.ModuleDict({"gpt": gpt, "head": nn.Linear(32, 2)}), LoRAConfig())
    assert all(parameter.requires_grad for parameter in model["head"].parameters())
    assert not model["gpt"].token_embedding.weight.requires_grad


def test_by_hand():
    """W = [[1, 2], [3, 4]], b = [10, 20], A = [1, -1], B = [2, 3] and alpha / r = 5.

    W + 5 B A = [[11, -8], [18, -11]].
    """
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
    """Without the division, a larger rank would also be a larger step."""
    assert LoRALinear(nn.Linear(8, 8), rank=4, alpha=16, dropout=0.0).scaling == 4


def test_dropout_is_only_on_the_input_of_the_update():
    """In training the updates of a constant input differ, but W x never does."""
    layer = LoRALinear(nn.Linear(8, 8), rank=2, alpha=2, dropout=0.5).train()
    x = torch.ones(8)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.ones_(layer.lora_b.weight)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_merged_equals_unmerged_and_merging_twice_equals_once(gpt, ids):
    """A second merge does not add the update again, and no LoRA layer remains."""
    randomise(apply_lora(gpt, LoRAConfig(rank=3, alpha=6, targets=LINEARS)))
    unmerged = states(gpt, ids)
    merged = states(merge_lora(gpt), ids)
    assert_close(merged, unmerged, atol=1e-5, rtol=0)
    assert not lora_layers(gpt)
    assert torch.equal(states(merge_lora(gpt), ids), merged)


def test_frozen_matrices_are_cast_once(gpt, ids):
    """LoRA, norms and positions stay float32, and the loss is autocast's except for rounding."""
    model = randomise(apply_lora(SonnetGPT(gpt), LoRAConfig())).eval()
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        before = model.loss(ids[:, :-1], ids[:, 1:])
        after = cast_frozen_weights(model, torch.bfloat16).loss(ids[:, :-1], ids[:, 1:])
    assert_close(after, before, atol=0.02, rtol=0)
    state = model.state_dict()
    cast = {name for name, tensor in state.items() if tensor.dtype == torch.bfloat16}
    assert len(cast) == 1 + 2 * 6 * 2  # the embedding; weights and biases of six linear layers
    assert not any(".lora_" in name or "norm" in name or "position" in name for name in cast)
    assert all(torch.equal(state[name], exact[name].to(state[name].dtype)) for name in exact)


def test_a_cast_model_saves_its_original_base_and_is_not_merged(gpt, tmp_path):
    """The adapter names the float32 base; merged into the cast one, it would lose precision."""
    model = randomise(apply_lora(gpt, LoRAConfig()))
    save_adapter(model, tmp_path / "before")
    cast_frozen_weights(model, torch.bfloat16)
    save_adapter(model, tmp_path / "after")
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    with pytest.raises(InputError, match="load"):
        merge_lora(model)


def test_without_frozen_weights_nothing_is_cast(gpt):
    """Full fine-tuning keeps float32 weights: small steps on bfloat16 weights round to nothing."""
    cast_frozen_weights(gpt, torch.bfloat16)
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    assert merge_lora(gpt) is gpt


def edits(gpt):
    """Ways of changing one weight, some of which torch does not count as a new version."""
    other = {name: part + 1 for name, part in gpt.state_dict().items()}
    return {
        "data": lambda: gpt.layers[1].out_dense.weight.data[-1, -1:].add_(1),
        "data of the embedding": lambda: gpt.token_embedding.weight.data[250].mul_(2),
        "numpy": lambda: gpt.final_norm.bias.detach().numpy().__iadd__(1),
        "load_state_dict": lambda: gpt.load_state_dict(other),
        "load_state_dict with assign": lambda: gpt.load_state_dict(other, assign=True),
        "new parameter": lambda: setattr(gpt.final_norm, "bias", nn.Parameter(torch.ones(32))),
    }


EDITS = pytest.mark.parametrize(
    "edit",
    [
        "data",
        "data of the embedding",
        "numpy",
        "load_state_dict",
        "load_state_dict with assign",
        "new parameter",
    ],
)


@EDITS
def test_every_edit_of_a_weight_changes_the_sha256(gpt, edit):
    """An adapter would otherwise load on a base that it was not trained on."""
    before = base_sha256(gpt)
    assert base_sha256(gpt) == before
    edits(gpt)[edit]()
    assert base_sha256(gpt) != before


@pytest.mark.parametrize("edit", ["negate", "fill", "swap rows", "swap columns", "one bit"])
def test_edits_that_cancel_in_a_checksum_change_the_sha256(gpt, edit):
    """The XOR of all values stays the same, except for one bit, which a sum rounds off."""
    weight = gpt.layers[0].out_dense.weight.data
    weight.fill_(0.5)
    weight[:, 1] = weight[1] = -0.25
    before = base_sha256(gpt)
    if edit == "negate":
        weight.neg_()
    elif edit == "fill":
        weight.fill_(1.0)
    elif edit == "swap rows":
        weight[[1, 2]] = weight[[2, 1]]
    elif edit == "swap columns":
        weight[:, [1, 2]] = weight[:, [2, 1]]
    else:
        weight[5, 5] = torch.nextafter(weight[5, 5], torch.tensor(1.0))
    assert base_sha256(gpt) != before


def test_an_unchanged_base_is_hashed_once(gpt, tmp_path, monkeypatch):
    """Swapping adapters would otherwise spend most of its time on the SHA-256 of the base."""
    hashed, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *data: hashed.append(1) or sha256(*data))
    with torch.autocast("cpu", torch.bfloat16):
        base_sha256(gpt)
    assert base_sha256(gpt) == base_sha256(apply_lora(gpt, LoRAConfig()))
    assert len(hashed) == 1
    cast_frozen_weights(gpt, torch.bfloat16)
    save_adapter(gpt, tmp_path)
    assert len(hashed) == 2  # before and after the cast
    load_adapter(gpt, tmp_path)
    load_adapter(SonnetGPT(gpt), tmp_path)
    for name, layer in lora_layers(gpt).items():
        gpt.set_submodule(name, layer.base)
    with mixed_adapters(gpt, [tmp_path, None]):
        pass
    assert len(hashed) == 2


@pytest.mark.parametrize("fused", [False, True])
def test_every_training_step_changes_the_sha256(gpt, ids, fused):
    """Fused optimizers do not bump the version of a tensor."""
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3, fused=fused)
    seen = [base_sha256(gpt)]
    for _ in range(2):
        gpt(ids)["last_hidden_state"].square().sum().backward()
        optimizer.step()
        seen.append(base_sha256(gpt))
    assert len(set(seen)) == 3


def test_lora_does_not_change_the_sha256(gpt):
    """It identifies the base, also while an adapter is trained on it."""
    before = base_sha256(gpt)
    randomise(apply_lora(SonnetGPT(gpt), LoRAConfig()))
    assert base_sha256(gpt) == base_sha256(SonnetGPT(gpt)) == before


def test_a_cast_does_not_change_the_sha256(gpt):
    """Neither does a second cast; the value is that of the float32 weights."""
    apply_lora(gpt, LoRAConfig())
    before = base_sha256(gpt)
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        assert base_sha256(cast_frozen_weights(gpt, dtype)) == before


@EDITS
def test_an_edit_after_a_cast_is_an_error(gpt, edit):
    """The float32 weights are gone, so that the new SHA-256 cannot be computed."""
    cast_frozen_weights(gpt.requires_grad_(False), torch.bfloat16)
    edits(gpt)[edit]()
    with pytest.raises(InputError, match="changed after"):
        base_sha256(gpt)


def test_a_second_apply_lora_is_an_error(gpt):
    """It would wrap the linear layers of the first one, or train both."""
    apply_lora(gpt, LoRAConfig())
    with pytest.raises(InputError, match="already"):
        apply_lora(gpt, LoRAConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank.* not 0"),
        ({"rank": -1}, "rank.* not -1"),
        ({"rank": 2.0}, r"rank.* not 2\.0"),
        ({"alpha": 0.0}, r"alpha.* not 0\.0"),
        ({"alpha": float("nan")}, "alpha.* not nan"),
        ({"dropout": 1.0}, r"dropout.* not 1\.0"),
        ({"targets": ("q_proj", "c_attn")}, "c_attn"),
        ({"targets": ()}, "empty"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    """Rank 0 would divide by zero, and an unknown target would adapt nothing."""
    with pytest.raises(InputError, match=message):
        LoRAConfig(**settings)


def test_all_names_the_six_linear_layers():
    """In the order of LINEARS, as other targets are."""
    assert LoRAConfig(targets=("all",)) == LoRAConfig(targets=LINEARS)
    assert LoRAConfig(targets=("v_proj", "q_proj")) == LoRAConfig(targets=("q_proj", "v_proj"))


def test_a_rank_above_the_width_is_an_error():
    """It would have more parameters than the weight that it updates."""
    gpt = GPT2Model(GPT2Config(1, 8, 2, vocab_size=10, n_positions=4))
    with pytest.raises(InputError, match="rank 9 does not fit a 8 x 8 weight"):
        apply_lora(gpt, LoRAConfig(rank=9))
