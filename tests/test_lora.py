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

PLAIN_AND_FAST = pytest.mark.parametrize("prepare", [lambda model: model, speed_up])


def test_starts_as_the_identity(gpt, ids):
    """B is zero, so step 0 is the pretrained model bit for bit; A is not, or B would not train."""
    before = states(gpt, ids)
    apply_lora(gpt, LoRAConfig(targets=("all",)))
    assert torch.equal(states(gpt, ids), before)
    assert len(lora_layers(gpt)) == 12
    assert all(layer.lora_a.weight.all() for layer in lora_layers(gpt).values())
    with pytest.raises(InputError, match="already"):
        apply_lora(gpt, LoRAConfig())


@pytest.mark.parametrize(
    ("targets", "count"), [(LoRAConfig().targets, 331_776), (LINEARS, 663_552)]
)
def test_parameter_counts_of_gpt2(targets, count):
    """By hand: 12 layers x rank 4 x (q 1536 + v 1536 + interm_dense 3840) = 331,776.

    All six: 12 x 4 x (4 x 1536 + 2 x 3840) = 663,552.
    """
    with torch.device("meta"):
        gpt = apply_lora(GPT2Model(GPT2Config()), LoRAConfig(targets=targets))
    assert sum(part.numel() for part in gpt.parameters() if part.requires_grad) == count
    assert sum(part.numel() for part in gpt.parameters()) == 124_439_808 + count


@PLAIN_AND_FAST
def test_training_changes_lora_only(gpt, ids, prepare):
    """The base has no gradient and the same bits after AdamW with weight decay."""
    before = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    model = prepare(apply_lora(SonnetGPT(gpt), LoRAConfig()).train())
    start = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):  # in the first step, A has no gradient because B is zero
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    for name, parameter in gpt.named_parameters():
        assert torch.equal(parameter, start[name]) == (".lora_" not in name)
        assert (parameter.grad is None) == (".lora_" not in name)
    merged = merge_lora(gpt).state_dict()
    assert merged.keys() == before.keys()
    assert torch.equal(merged["layers.0.out_dense.weight"], before["layers.0.out_dense.weight"])


def test_by_hand():
    """W = [[1, 2], [3, 4]], b = [10, 20], A = [1, -1], B = [2, 3] and alpha / r = 5.

    W + 5 B A = [[11, -8], [18, -11]].
    """
    layer = LoRALinear(nn.Linear(2, 2), LoRAConfig(rank=1, alpha=5, dropout=0.0))
    layer.base.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    layer.base.bias.data = torch.tensor([10.0, 20.0])
    layer.lora_a.weight.data = torch.tensor([[1.0, -1.0]])
    layer.lora_b.weight.data = torch.tensor([[2.0], [3.0]])
    # x = [1, 2]: W x + b = [15, 31], A x = -1, so the update is 5 * [-2, -3]
    assert_close(layer(torch.tensor([1.0, 2.0])), torch.tensor([5.0, 16.0]))
    assert_close(layer.merge().weight, torch.tensor([[11.0, -8.0], [18.0, -11.0]]))
    assert LoRALinear(nn.Linear(8, 8), LoRAConfig(rank=4, alpha=16)).scaling == 4


def test_dropout_is_only_on_the_input_of_the_update():
    """In training the updates of a constant input differ, but W x never does."""
    layer, x = LoRALinear(nn.Linear(8, 8), LoRAConfig(rank=2, dropout=0.5)).train(), torch.ones(8)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.ones_(layer.lora_b.weight)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@PLAIN_AND_FAST
def test_merged_equals_unmerged_and_merging_twice_equals_once(gpt, ids, prepare):
    """A second merge does not add the update again."""
    randomise(apply_lora(gpt, LoRAConfig(rank=3, alpha=6, targets=LINEARS)))
    unmerged = states(gpt, ids)
    merged = states(merge_lora(prepare(gpt)), ids)
    assert_close(merged, unmerged, atol=1e-5, rtol=0)
    assert not lora_layers(gpt)
    assert torch.equal(states(merge_lora(gpt), ids), merged)


def test_unusable_settings_are_named():
    """Rank 0 would divide by zero, and an unknown target would adapt nothing."""
    for settings in (
        {"rank": 0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"targets": ("c_fc",)},
    ):
        with pytest.raises(InputError, match=next(iter(settings))):
            LoRAConfig(**settings)
