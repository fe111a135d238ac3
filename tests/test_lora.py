"""LoRA starts as the identity, trains nothing else, and merges into W + (alpha / r) B A."""

import pytest
import torch
from helpers import randomise, states
from torch import nn
from torch.testing import assert_close

from config import LINEARS, GPT2Config, InputError, LoRAConfig
from lora import LoRALinear, apply_lora, lora_layers, merge_lora
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from speed.training import speed_up


def test_starts_as_the_identity(gpt, ids):
    """B is zero, so step 0 is the pretrained model bit for bit; A is not, or B would not train."""
    before = states(gpt, ids)
    apply_lora(gpt, LoRAConfig(targets=("all",)))
    assert torch.equal(states(gpt, ids), before)
    assert len(lora_layers(gpt)) == 12
    assert all(layer.lora_a.weight.all() for layer in lora_layers(gpt).values())


@pytest.mark.parametrize(
    ("targets", "trainable"), [(LoRAConfig().targets, 331_776), (("all",), 663_552)]
)
def test_parameter_counts_of_gpt2(targets, trainable):
    """By hand: 12 layers x rank 4 x (q 1536 + v 1536 + interm_dense 3840) = 331,776.

    All six: 12 x 4 x (4 x 1536 + 2 x 3840) = 663,552.
    """
    with torch.device("meta"):
        gpt = apply_lora(GPT2Model(GPT2Config()), LoRAConfig(targets=targets))
    counts = [parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad]
    assert sum(counts) == trainable
    assert sum(parameter.numel() for parameter in gpt.parameters()) == 124_439_808 + trainable


@pytest.mark.parametrize("fast", [False, True])
def test_training_changes_lora_only(gpt, ids, fast):
    """The base has no gradient and the same bits; heads around the GPT-2 stay trainable."""
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    model = SonnetGPT(gpt)
    model.head = nn.Linear(32, 2)
    apply_lora(model, LoRAConfig()).train()
    if fast:
        speed_up(model)
    assert model.head.weight.requires_grad
    trained = [p for name, p in model.named_parameters() if ".lora_" in name]
    start = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):  # in the first step, A has no gradient because B is zero
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    assert not any(map(torch.equal, trained, start))
    base = [(n, p) for n, p in gpt.named_parameters() if ".lora_" not in n]
    assert {name.replace(".base.", ".") for name, _ in base} == before.keys()
    for name, parameter in base:
        assert parameter.grad is None
        assert torch.equal(parameter, before[name.replace(".base.", ".")]), name


def test_by_hand():
    """W = [[1, 2], [3, 4]], b = [10, 20], A = [1, -1], B = [2, 3] and alpha / r = 5.

    W + 5 B A = [[11, -8], [18, -11]].
    """
    layer = LoRALinear(nn.Linear(2, 2), LoRAConfig(rank=1, alpha=5, dropout=0.0))
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.base.bias.copy_(torch.tensor([10.0, 20.0]))
        layer.lora_a.weight.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_b.weight.copy_(torch.tensor([[2.0], [3.0]]))
    # x = [1, 2]: W x + b = [15, 31], A x = -1, so the update is 5 * [-2, -3]
    assert_close(layer(torch.tensor([1.0, 2.0])), torch.tensor([5.0, 16.0]))
    assert_close(layer.merged().weight, torch.tensor([[11.0, -8.0], [18.0, -11.0]]))
    assert LoRALinear(nn.Linear(8, 8), LoRAConfig(rank=4, alpha=16)).scaling == 4


def test_dropout_is_only_on_the_input_of_the_update():
    """In training the updates of a constant input differ, but W x never does."""
    layer = LoRALinear(nn.Linear(8, 8), LoRAConfig(rank=2, dropout=0.5)).train()
    x = torch.ones(8)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.ones_(layer.lora_b.weight)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("fast", [False, True])
def test_merged_equals_unmerged_and_merging_twice_equals_once(gpt, ids, fast):
    """A second merge does not add the update again, and plain layers with the old names remain."""
    names = gpt.state_dict().keys()
    randomise(apply_lora(gpt, LoRAConfig(rank=3, alpha=6, targets=LINEARS)))
    unmerged = states(gpt, ids)
    if fast:
        speed_up(gpt)
    merged = states(merge_lora(gpt), ids)
    assert_close(merged, unmerged, atol=1e-5, rtol=0)
    assert gpt.state_dict().keys() == names
    assert torch.equal(states(merge_lora(gpt), ids), merged)


def test_a_second_apply_lora_is_an_error(gpt):
    """It would wrap the linear layers of the first one, or train both."""
    apply_lora(gpt, LoRAConfig())
    with pytest.raises(InputError, match="already"):
        apply_lora(gpt, LoRAConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank.* not 0"),
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


def test_a_rank_above_the_width_is_an_error():
    """It would have more parameters than the weight that it updates."""
    gpt = GPT2Model(GPT2Config(1, 8, 2, vocab_size=10, n_positions=4))
    with pytest.raises(InputError, match="rank 9 does not fit a 8 x 8 weight"):
        apply_lora(gpt, LoRAConfig(rank=9))
