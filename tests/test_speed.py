"""Every faster part computes what the plain one does, under the same names."""

import copy

import pytest
import torch
from helpers import logits, randomise
from torch import nn
from torch.testing import assert_close

from config import LINEARS, LoRAConfig
from lora import LoRALinear, apply_lora
from models.adapters import base_sha256
from models.paraphrase_gpt import ParaphraseGPT
from models.sonnet_gpt import SonnetGPT
from modules.attention import DotProductAttention
from modules.loss import VocabularyLoss
from speed import training as fast_parts
from speed.decoding import PackedLinear, speed_up_decoding
from speed.training import LEVELS, FastDropout, WrittenOutAttention, cheap_dropout, speed_up

TOLERANCE = {  # bfloat16 has 8 bits
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 0.05, "rtol": 0.05},
}
COUNT = 800_000
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def results(part, inputs, dtype, *others):
    """Output and gradients of a part in training mode, under autocast if dtype is bfloat16."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = part.train()(*inputs, *others)
    output.backward(random(*output.shape).to(output.dtype))
    return output, [x.grad for x in (*inputs, *part.parameters())]


LORA = LoRALinear(nn.Linear(6, 8), LoRAConfig(rank=2, dropout=0.0))
nn.init.normal_(LORA.lora_b.weight)
LABELS = torch.tensor([3, -100, 7, 1])
PARTS = {  # a plain part, its faster class, inputs
    "linear": (nn.Linear(6, 8).requires_grad_(False), fast_parts.FrozenLinear, [random(2, 5, 6)]),
    "LoRA": (LORA, fast_parts.FastLoRALinear, [random(2, 5, 6)]),
    "no dropout": (nn.Dropout(0.0), FastDropout, [random(2, 5)]),
    "loss": (VocabularyLoss(), fast_parts.FastVocabularyLoss, [random(4, 6), random(9, 6), LABELS]),
}


@pytest.mark.parametrize("name", PARTS)
@DTYPES
def test_every_part_equals_the_plain_one(name, dtype):
    """Outputs, gradients of inputs and parameters, and names."""
    part, fast_class, inputs = PARTS[name]
    plain = copy.deepcopy(part)
    fast = speed_up(nn.ModuleList([copy.deepcopy(part), nn.Linear(1, 1)]))[0]
    assert type(fast) is fast_class
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert_close(results(fast, inputs, dtype), results(plain, inputs, dtype), **TOLERANCE[dtype])
    with torch.no_grad():  # without gradients other code may run
        assert_close(fast.eval()(*inputs), plain.eval()(*inputs), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("tokens", [9, 300])
@DTYPES
def test_attention_written_out_equals_the_fused_one(tokens, dtype):
    """Also over the end of a block of 256 queries.

    A rate of 1e-9 selects the code for dropout and rounds to dropping nothing.
    """
    inputs = [random(2, 3, tokens, 4).roll(step, 2).to(dtype) for step in range(3)]
    parts = DotProductAttention(0.0), WrittenOutAttention(1e-9)
    plain, fast = (results(part, inputs, dtype, None) for part in parts)
    assert_close(fast, plain, **TOLERANCE[dtype])


def test_attention_drops_weights_and_not_values():
    """With all values 1, an output is the scaled sum of the kept weights, and its mean is 1."""
    torch.manual_seed(0)
    zeros, ones = torch.zeros(64, 32, 16, 1), torch.ones(64, 32, 16, 1)
    out = WrittenOutAttention(0.25).train()(zeros, zeros, ones, None)
    assert_close(out.mean((0, 1)), torch.ones(16, 1), atol=0.06, rtol=0)
    assert_close(out[:, :, 0].unique(), torch.tensor([0, 1 / 0.75]))  # it attends only to itself


@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
def test_the_rate_of_cheap_dropout(p):
    """The share of zeros at every position modulo 8, within five standard deviations.

    The scale is that of the rounded rate.
    """
    torch.manual_seed(0)
    values = cheap_dropout(torch.ones(COUNT), p)
    rates = 1 - values.ne(0).view(-1, 8).float().mean(0)
    assert_close(rates, torch.full((8,), p), atol=5 * (p * (1 - p) * 8 / COUNT) ** 0.5, rtol=0)
    scale = 1 / (1 - round(p * LEVELS) / LEVELS)
    assert_close(values.unique(), torch.tensor([0.0, scale]))


def test_cheap_dropout_is_seeded_by_torch_and_passes_the_gradient_of_kept_values():
    """With odd sizes; in evaluation and at the rate 0 it does nothing."""
    x = random(3, 5, 7).requires_grad_()
    torch.manual_seed(3)
    first, second = cheap_dropout(x, 0.5), cheap_dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(first, cheap_dropout(x, 0.5))
    assert not torch.equal(first, second)
    first.sum().backward()
    assert_close(x.grad, (first / x).detach())
    assert cheap_dropout(x, 0.0) is x
    assert FastDropout(0.5).eval()(x) is x


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_frozen_layer_notices_a_change(name):
    """The copy in bfloat16 is made again."""
    layer, x = fast_parts.FrozenLinear(6, 8).requires_grad_(False), random(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        getattr(layer, name).add_(1)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("task", ["sonnets", "paraphrases"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@DTYPES
def test_a_whole_model_has_the_same_loss_gradients_and_names(gpt, ids, task, lora, dtype):
    """Nothing in speed/ is seen in state_dict or by the base's SHA-256."""
    torch.manual_seed(0)
    model, batch = SonnetGPT(gpt), {"labels": ids.roll(-1, 1)}
    if task == "paraphrases":
        model = ParaphraseGPT(gpt, "multihead")
        batch = {"attention_mask": torch.ones_like(ids).tril(17), "labels": torch.tensor([0, 1, 1])}
    if lora:
        randomise(apply_lora(model, LoRAConfig(rank=2, targets=LINEARS)))
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, DotProductAttention):
            part.dropout = 0.0
    fast = speed_up(copy.deepcopy(model))
    for layer in fast.gpt.layers:
        layer.attention.attend.dropout = 1e-9
    losses, gradients = [], []
    for each in (model, fast):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            losses.append(each.train().loss(ids, **batch))
        losses[-1].backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    assert_close(losses[1], losses[0], **TOLERANCE[dtype])
    one, other = (torch.cat([grad.flatten() for grad in each]) for each in gradients)
    # In bfloat16, each differs by 0.08 from float32
    assert (one - other).norm() < (1e-5 if dtype == torch.float32 else 0.15) * one.norm()
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, fast.state_dict().values(), model.state_dict().values()))
    assert base_sha256(fast) == base_sha256(model)


@pytest.mark.parametrize("bias", [True, False])
@DTYPES
def test_a_packed_layer_equals_the_plain_one(bias, dtype):
    """For any number of rows; outputs are float32."""
    layer = nn.Linear(32, 48, bias).requires_grad_(False)
    packed = PackedLinear(layer.weight, layer.bias, dtype, 3)
    half = PackedLinear(layer.weight, layer.bias, torch.float16, 3)  # is float32
    for rows in (random(3, 1, 32), random(7, 5, 32)):
        assert_close(packed(rows), layer(rows), **TOLERANCE[dtype])
        assert_close(half(rows), layer(rows), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_decoding_gives_the_same_text_and_leaves_the_model_untouched(gpt, ids, lora):
    """The copy shares its parameters; LoRA is merged into it and not into the model."""
    model = SonnetGPT(gpt)
    if lora:
        randomise(apply_lora(model, LoRAConfig(rank=2)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"temperature": 0, "max_new_tokens": 12, "max_lines": 0}
    prompts = ["From", "That thereby beauty's", "a"]
    fast = speed_up_decoding(model, torch.float32, len(prompts))
    assert fast.generate(prompts, **settings) == model.generate(prompts, **settings)
    assert fast.gpt.token_embedding.weight.data_ptr() == gpt.token_embedding.weight.data_ptr()
    assert_close(logits(fast.gpt, ids), logits(gpt, ids), **TOLERANCE[torch.float32])
    rough = logits(speed_up_decoding(model, torch.bfloat16, 3).gpt, ids)
    assert (rough - logits(gpt, ids)).abs().mean() < 0.05
    assert model.state_dict().keys() == before.keys()
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert all(p.requires_grad == (not lora or ".lora_" in n) for n, p in model.named_parameters())


def test_generation_between_steps_leaves_training_usable(gpt, ids):
    """Sampling during training: frozen layers are cast without a gradient, nothing is frozen."""
    model = speed_up(apply_lora(SonnetGPT(gpt), LoRAConfig(rank=2)))
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(["From"], max_new_tokens=2)
        model.loss(ids, ids).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_decoding_without_onednn_leaves_the_model_trainable(gpt, monkeypatch):
    """As on a GPU: the copy is frozen, and the model is not."""
    monkeypatch.setattr("speed.decoding.onednn_is_available", lambda device_type: False)
    model = SonnetGPT(gpt.requires_grad_(True))
    fast = speed_up_decoding(model, torch.float32, 1)
    settings = {"temperature": 0, "max_new_tokens": 5}
    assert fast.generate(["From"], **settings) == model.generate(["From"], **settings)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in fast.parameters())
