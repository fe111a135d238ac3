"""ParaphraseGPT: what the head sees, what is trained, and its files."""

import json
import math

import pytest
import torch
from helpers import randomise, states
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from config import InputError, LoRAConfig
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT
from pooling import POOLINGS

ENCODINGS = pytest.mark.parametrize("pair_encoding", ["joint", "separate"])
LABELS = torch.tensor([1, 0])


def make(gpt, pooling="last", pair_encoding="joint"):
    """A model in evaluation mode whose random head and pooling tell texts apart."""
    torch.manual_seed(2)
    model = ParaphraseGPT(gpt, pooling, pair_encoding).eval()
    for name, parameter in model.head_modules().named_parameters():
        torch.nn.init.normal_(parameter, std=0.05 if name.startswith("head") else 0.3)
    return model


def batch(ids, pair_encoding="joint"):
    """Ids and mask of two pairs of different lengths, right-padded with a real token."""
    ids = ids.repeat(2, 1)[: 2 if pair_encoding == "joint" else 4].clone()
    mask = torch.ones_like(ids)
    for row, length in enumerate((20, 11, 7, 13)[: len(ids)]):
        ids[row, length:], mask[row, length:] = 5, 0
    return (ids, mask) if pair_encoding == "joint" else (ids.view(2, 2, 20), mask.view(2, 2, 20))


@pytest.mark.parametrize("pooling", POOLINGS)
@ENCODINGS
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(gpt, ids, pooling, pair_encoding):
    """Logits depend neither on the batch nor on the side, amount and ids of the padding."""
    model = make(gpt, pooling, pair_encoding)
    ids, mask = batch(ids, pair_encoding)
    together = model(ids, mask)
    assert (together.shape, together.dtype) == ((2, 2), torch.float32)
    for row in range(2):
        longest = int(mask[row].sum(-1).max())
        alone = model(ids[row : row + 1, ..., :longest], mask[row : row + 1, ..., :longest])
        assert_close(alone, together[row : row + 1], rtol=0, atol=1e-6)
    assert_close(model(torch.where(mask == 1, ids, 299), mask), together, rtol=0, atol=1e-6)
    padding = 20 - mask.sum(-1, keepdim=True)
    shifted = (torch.arange(20) - padding) % 20  # moves the padding to the left
    left = ids.gather(-1, shifted), mask.gather(-1, shifted)
    assert_close(model(*left), together, rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3
    weights = model.token_weights(ids, mask)  # None for a pooling that learns none
    assert (weights is None) == (pooling not in ("generalized", "multihead"))
    if weights is not None:
        assert_close((weights * mask).sum(-1), torch.ones(ids.shape[:-1]))


@torch.no_grad()
def test_input_of_the_head(gpt, ids):
    """Separate: [v1; v2; |v1 - v2|; v1 * v2] of texts encoded alone; joint: the pooled vector."""
    model = make(gpt, "mean", "separate")
    first, second = (states(gpt, ids[row : row + 1]).mean(1) for row in (0, 1))
    seen = torch.cat([first, second, (first - second).abs(), first * second], 1)
    pair = ids[None, :2]
    assert_close(model(pair, torch.ones_like(pair)), model.head(seen), rtol=1e-5, atol=1e-6)
    model = make(gpt, "mean")
    assert_close(model(ids[:1], torch.ones(1, 20)), model.head(first), rtol=1e-5, atol=1e-6)


def test_loss_is_the_cross_entropy(gpt, ids):
    """Nats per pair, worked out from the logits."""
    model = make(gpt, "multihead", "separate")
    inputs = batch(ids, "separate")
    (no, yes), (other_no, other_yes) = model(*inputs).tolist()
    nats = [math.log(1 + math.exp(no - yes)), math.log(1 + math.exp(other_yes - other_no))]
    assert model.loss(*inputs, LABELS).item() == pytest.approx(sum(nats) / 2, rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["frozen", "lora"])
def test_what_is_trained(gpt, ids, lora):
    """Pooling, head and LoRA get gradients, the base none; a frozen GPT-2 has no dropout."""
    model = make(gpt, "generalized")
    expected = model.loss(*batch(ids), LABELS)
    gpt.requires_grad_(False)
    if lora:
        apply_lora(model, LoRAConfig(rank=2))
    loss = model.train().loss(*batch(ids), LABELS)
    loss.backward()
    assert (model.pooling.training, gpt.training) == (True, lora)
    assert torch.equal(loss, expected) != lora
    for name, parameter in model.named_parameters():
        trained = not name.startswith("gpt.") or ".lora_" in name
        assert (parameter.grad is not None) == trained, name


def test_vocab_logits():
    """The logits are at the tokens no and yes of the bundled model, and -1e9 elsewhere."""
    model = ParaphraseGPT(GPT2Model.from_pretrained("tiny"))
    wide = model.vocab_logits(torch.tensor([[1.5, -2.0], [-30.0, -20.0]]))
    assert (wide.shape, wide.dtype) == ((2, 8192), torch.float32)
    assert [model.gpt.decode([token]) for token in wide.argmax(1).tolist()] == ["no", "yes"]
    assert wide.sort().values[:, -3:].tolist() == [[-1e9, -2.0, 1.5], [-1e9, -30.0, -20.0]]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("settings", [("multihead", "separate"), ("last", "joint")], ids=str)
def test_saved_loaded_and_saved_again(gpt, ids, tmp_path, lora, settings):
    """Logits, settings and files are bit-identical."""
    model = make(gpt, *settings)
    if lora:
        randomise(apply_lora(model, LoRAConfig(rank=2)))
    one, two = tmp_path / "one", tmp_path / "two"
    model.save_pretrained(one)
    again = ParaphraseGPT.from_pretrained(one)
    assert not again.training
    with torch.no_grad():
        inputs = batch(ids, settings[1])
        assert torch.equal(again(*inputs), model.eval()(*inputs))
    assert again.settings == {"pooling": settings[0], "pair_encoding": settings[1]}
    again.save_pretrained(two)
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert files == {path.name: path.read_bytes() for path in two.iterdir()}
    assert ("adapter_model.safetensors" in files) == lora


LAST = {"pooling": "last", "pair_encoding": "joint"}
# Settings and changed tensors of a head with the pooling `last`
BROKEN = {
    "no object": ([1], {}),
    "unknown pooling": (LAST | {"pooling": "median"}, {}),
    "unknown setting": (LAST | {"x": 1}, {}),
    "another encoding": (LAST | {"pair_encoding": "separate"}, {}),
    "unexpected": (LAST, {"x": torch.ones(1)}),
    "misshapen": (LAST, {"head.weight": torch.ones(2, 3)}),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_an_unusable_head_is_rejected(gpt, tmp_path, problem):
    """It comes from a file that anybody may have made."""
    settings, changes = BROKEN[problem]
    make(gpt).save_pretrained(tmp_path)
    path = tmp_path / "head.safetensors"
    save_file(load_file(path) | changes, path, metadata={"settings": json.dumps(settings)})
    with pytest.raises(InputError, match=r"head\.safetensors is not"):
        ParaphraseGPT.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"head\.safetensors is not .*best/"):
        ParaphraseGPT.from_pretrained(tmp_path)
