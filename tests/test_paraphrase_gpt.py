"""ParaphraseGPT: what the head sees, gradients, files, and classification metrics."""

import json
import math

import pandas as pd
import pytest
import torch
from helpers import randomise, states
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from config import InputError, LoRAConfig
from datasets import PairsDataset
from evaluation import classification_metrics, classify
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT
from pooling import POOLINGS

ENCODINGS = ("joint", "separate")


def make(gpt, pooling="last", pair_encoding="joint", **settings):
    """A model in evaluation mode whose random head and pooling tell texts apart."""
    torch.manual_seed(2)
    model = ParaphraseGPT(gpt, pooling, pair_encoding, **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("gpt."):
                scale = 0.05 if name.startswith("head") else 0.3
                parameter.copy_(scale * torch.randn_like(parameter))
    return model


def batch(ids, pair_encoding):
    """Ids and mask of two pairs of different lengths, right-padded with a real token."""
    ids = ids.repeat(2, 1)[: 2 if pair_encoding == "joint" else 4].clone()
    mask = torch.ones_like(ids)
    for row, length in enumerate((20, 11, 7, 13)[: len(ids)]):
        ids[row, length:], mask[row, length:] = 5, 0
    return (ids, mask) if pair_encoding == "joint" else (ids.view(2, 2, 20), mask.view(2, 2, 20))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pair_encoding", ENCODINGS)
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(gpt, ids, pooling, pair_encoding):
    """Logits depend neither on the batch nor on the side, amount and ids of the padding."""
    model = make(gpt, pooling, pair_encoding)
    ids, mask = batch(ids, pair_encoding)
    together = model(ids, mask)
    assert together.shape == (2, 2)
    for row in range(2):
        longest = int(mask[row].sum(-1).max())
        alone = model(ids[row : row + 1, ..., :longest], mask[row : row + 1, ..., :longest])
        assert_close(alone, together[row : row + 1], rtol=0, atol=1e-6)
    assert_close(model(torch.where(mask == 1, ids, 299), mask), together, rtol=0, atol=1e-6)
    assert_close(model(ids.flip(0), mask.flip(0)), together.flip(0), rtol=0, atol=1e-6)
    padding = 20 - mask.sum(-1, keepdim=True)
    shifted = (torch.arange(20) - padding) % 20  # moves the padding to the left
    left = ids.gather(-1, shifted), mask.gather(-1, shifted)
    assert_close(model(*left), together, rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


@torch.no_grad()
def test_input_of_the_head(gpt, ids):
    """Separate: [v1; v2; |v1 - v2|; v1 * v2] of texts encoded alone; joint: the pooled vector."""
    model = make(gpt, "mean", "separate")
    first, second = (states(gpt, ids[row : row + 1]).mean(1) for row in (0, 1))
    seen = torch.cat([first, second, (first - second).abs(), first * second], 1)
    pair = ids[None, :2]
    assert_close(model(pair, torch.ones_like(pair)), model.head(seen), rtol=1e-5, atol=1e-6)
    assert model.head.in_features == 4 * 32
    model = make(gpt, "mean")
    assert_close(model(ids[:1], torch.ones(1, 20)), model.head(first), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair_encoding", ENCODINGS)
def test_loss_is_cross_entropy_plus_penalty(gpt, ids, pair_encoding):
    """Nats per pair, worked out from the logits."""
    penalties = {"parameter_penalty": 0.0, "vector_penalty": 0.5}
    model = make(gpt, "multihead", pair_encoding, **penalties)
    with torch.no_grad():  # equal heads: each pair of heads has the largest penalty, 1
        for head in range(1, 5):
            model.pooling.inner[head].load_state_dict(model.pooling.inner[0].state_dict())
            model.pooling.outer[head].load_state_dict(model.pooling.outer[0].state_dict())
        logits = model(*batch(ids, pair_encoding))
        loss = model.loss(*batch(ids, pair_encoding), labels=torch.tensor([1, 0]))
    (no, yes), (other_no, other_yes) = logits.tolist()
    nats = [math.log(1 + math.exp(no - yes)), math.log(1 + math.exp(other_yes - other_no))]
    assert loss.item() == pytest.approx(sum(nats) / 2 + 0.5 * 10, rel=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pair_encoding", ENCODINGS)
@torch.no_grad()
def test_token_weights_have_the_shape_of_the_ids(gpt, ids, pooling, pair_encoding):
    """They sum to 1 over the real tokens of a text; None for a pooling that learns none."""
    ids, mask = batch(ids, pair_encoding)
    weights = make(gpt, pooling, pair_encoding).token_weights(ids, mask)
    if pooling not in ("generalized", "multihead"):
        assert weights is None
        return
    assert weights.shape == ids.shape
    assert (weights[mask == 0] == 0).all()
    assert_close(weights.sum(-1), torch.ones(ids.shape[:-1]))


@pytest.mark.parametrize("pooling", ["last", "multihead"])
def test_lora_trains_its_matrices_pooling_and_head(gpt, ids, pooling):
    """Exactly these require and get a gradient; the base model has none."""
    model = apply_lora(make(gpt, pooling), LoRAConfig(rank=2, targets=("q_proj", "out_dense")))
    parameters = dict(model.named_parameters())
    expected = {name for name in parameters if not name.startswith("gpt.")}
    assert expected >= {"head.weight", "head.bias"}
    for layer in ("0.attention.q_proj", "0.out_dense", "1.attention.q_proj", "1.out_dense"):
        expected |= {f"gpt.layers.{layer}.lora_{side}.weight" for side in "ab"}
    assert {name for name in parameters if parameters[name].requires_grad} == expected
    model.loss(*batch(ids, "joint"), labels=torch.tensor([1, 0])).backward()
    assert {name for name in parameters if parameters[name].grad is not None} == expected


def test_full_fine_tuning_reaches_every_parameter(gpt, ids):
    """Only the bias of generalized pooling has (almost) no effect on the softmax."""
    model = make(gpt, "generalized", "separate")
    model.loss(*batch(ids, "separate"), labels=torch.tensor([1, 0])).backward()
    for name, parameter in model.named_parameters():
        assert name == "pooling.score.bias" or parameter.grad.abs().sum() > 0


def test_vocab_logits_have_the_same_argmax():
    """The logits are at the tokens no and yes of the bundled model, and -1e9 elsewhere."""
    model = ParaphraseGPT(GPT2Model.from_pretrained("tiny"))
    logits = torch.tensor([[1.5, -2.0], [-30.0, -20.0]])
    wide = model.vocab_logits(logits)
    assert wide.shape == (2, 8192)
    assert wide[:, [1199, 1649]].equal(logits)
    assert [model.gpt.tokenizer.decode([token]) for token in wide.argmax(1).tolist()] == [
        "no",
        "yes",
    ]
    wide[:, [1199, 1649]] = -1e9
    assert (wide == -1e9).all()


def test_vocab_logits_of_float16():
    """float16 cannot represent -1e9, so the result is float32."""
    model = ParaphraseGPT(GPT2Model.from_pretrained("tiny"))
    wide = model.vocab_logits(torch.ones(1, 2, dtype=torch.float16))
    assert wide[0, 0] < -60000


def test_vocab_logits_need_the_tokens_no_and_yes(gpt):
    """The tokenizer of this model has neither."""
    with pytest.raises(InputError, match="no token no"):
        make(gpt).vocab_logits(torch.zeros(1, 2))


@pytest.fixture
def saved(gpt, ids, tmp_path):
    """Save a model; returns its folder and its logits. LoRA updates are not zero."""

    def run(lora=False, pooling="multihead", pair_encoding="separate"):
        settings = {"vector_penalty": 0.25} if pooling == "multihead" else {}
        model = make(gpt, pooling, pair_encoding, **settings)
        if lora:
            randomise(apply_lora(model, LoRAConfig(rank=2)))
        model.save_pretrained(tmp_path / "one")
        with torch.no_grad():
            return tmp_path / "one", model.eval()(*batch(ids, pair_encoding))

    return run


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("pooling", "pair_encoding"), [("multihead", "separate"), ("last", "joint")]
)
def test_saved_loaded_and_saved_again(saved, folder, ids, tmp_path, lora, pooling, pair_encoding):
    """Logits, settings and files are bit-identical."""
    one, logits = saved(lora, pooling, pair_encoding)
    model = ParaphraseGPT.from_pretrained(one, folder)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(*batch(ids, pair_encoding)), logits)
    assert model.settings["pooling"] == pooling
    if pooling == "multihead":
        assert (model.pooling.parameter_penalty, model.pooling.vector_penalty) == (0.01, 0.25)
    model.save_pretrained(tmp_path / "two")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert ("adapter_model.safetensors" in names) == lora
    for name in names:
        assert (one / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_adapter_of_another_base_is_rejected(saved):
    """Its updates have no meaning there."""
    one, _ = saved(lora=True)
    with pytest.raises(InputError, match="trained on another base"):
        ParaphraseGPT.from_pretrained(one, "tiny")


def test_a_folder_without_a_head_is_rejected(folder, tmp_path):
    """A plain GPT-2 or a missing folder never gets a random head."""
    for path in (folder, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"head\.safetensors not found"):
            ParaphraseGPT.from_pretrained(path)


LAST = {"pooling": "last"}
BROKEN_SETTINGS = {
    "none": None,
    "no json": "{",
    "no object": "[1]",
    "null": "null",
    "deep": "[" * 100_000,
    "unknown pooling": {"pooling": "median"},
    "unhashable": {"pooling": ["last"]},
    "unknown setting": LAST | {"x": 1},
    "gpt": LAST | {"gpt": 1},
    "width": LAST | {"width": 7},
    "another pooling": {"pooling": "generalized"},
    "another encoding": LAST | {"pair_encoding": "separate"},
    "unknown encoding": LAST | {"pair_encoding": "sideways"},
    "negative": {"pooling": "multihead", "heads": -1},
    "text": {"pooling": "multihead", "heads": "5"},
}


@pytest.mark.parametrize("settings", BROKEN_SETTINGS.values(), ids=BROKEN_SETTINGS)
def test_unusable_settings_of_a_head_are_rejected(saved, settings):
    """They come from a file that anybody may have made."""
    path = saved(pooling="last", pair_encoding="joint")[0] / "head.safetensors"
    if settings is not None:
        settings = {"settings": settings if isinstance(settings, str) else json.dumps(settings)}
    save_file(load_file(path), path, metadata=settings)
    with pytest.raises(InputError, match=r"head\.safetensors is not the head"):
        ParaphraseGPT.from_pretrained(path.parent)


@pytest.mark.parametrize("size", [None, -3, 0], ids=["complete", "truncated", "empty"])
def test_truncated_heads_are_rejected(saved, folder, size):
    """Only the complete file loads."""
    path = saved(pooling="last", pair_encoding="joint")[0] / "head.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    if size is None:
        ParaphraseGPT.from_pretrained(path.parent)
        return
    with pytest.raises(InputError, match=r"head\.safetensors is not the head"):
        ParaphraseGPT.from_pretrained(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        {"head.bias": None},
        {"x": torch.ones(1)},
        {"head.weight": torch.ones(2, 3)},
        {"gpt.final_norm.bias": torch.ones(32)},
    ],
    ids=["missing", "unexpected", "misshapen", "of the base model"],
)
def test_heads_with_other_tensors_are_rejected(saved, change):
    """A head has exactly the model's tensors in their shapes."""
    path = saved(pooling="last", pair_encoding="joint")[0] / "head.safetensors"
    tensors = load_file(path) | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, path, metadata={"settings": json.dumps(LAST | {"pair_encoding": "joint"})})
    with pytest.raises(InputError, match=r"head\.safetensors is not the head"):
        ParaphraseGPT.from_pretrained(path.parent)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_logits_are_in_the_order_of_the_pairs(gpt, pooling):
    """Pairs are classified by length in batches, without dropout; each has its own logits."""
    pairs = pd.DataFrame({"id": map(str, range(70)), "sentence2": "thy", "label": 0.0})
    pairs["sentence1"] = ["z" * (index * 17 % 41) + "y" for index in range(70)]
    pairs["line"] = range(2, 72)
    data = PairsDataset(pairs, gpt, "separate")
    model = make(gpt, pooling, "separate").train()
    logits = classify(model, data)
    assert (logits.shape, logits.dtype) == ((70, 2), torch.float32)
    with torch.no_grad():
        for index in range(70):
            one = data.collate([index])
            alone = model(one["input_ids"], one["attention_mask"])[0]
            assert_close(alone, logits[index], rtol=0, atol=1e-6)
    assert len(logits[:, 0].unique()) > 30


def test_logits_that_are_not_finite_are_an_error(gpt):
    """A prediction from NaN would always be no."""
    data = PairsDataset(
        pd.DataFrame([{"id": "a", "sentence1": "x", "sentence2": "y", "label": 1.0, "line": 2}]),
        gpt,
        "separate",
    )
    model = make(gpt, "last", "separate")
    torch.nn.init.constant_(model.head.bias, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        classify(model, data)


def test_classification_metrics_by_hand():
    """Labels no no no yes yes, predicted no no yes yes no: F1 of no is 4 / 6, of yes 2 / 4."""
    logits = torch.tensor([[0.0, -1.0], [2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [1.0, 0.0]])
    metrics = classification_metrics(logits, torch.tensor([0, 0, 0, 1, 1]))
    nats = sum(math.log(1 + math.exp(-margin)) for margin in (1, 2, -1, 3, -1)) / 5
    expected = {
        "loss": nats,
        "accuracy": 3 / 5,
        "accuracy_margin": 1.96 * (0.6 * 0.4 / 5) ** 0.5,
        "majority_class": 3 / 5,
        "macro_f1": (4 / 6 + 2 / 4) / 2,
        "no_predicted_no": 2,
        "no_predicted_yes": 1,
        "yes_predicted_no": 1,
        "yes_predicted_yes": 1,
    }
    assert metrics == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "predicted", "f1"),
    [
        ([0, 1, 1, 0], [1, 1, 1, 1], (0 + 4 / 6) / 2),
        ([0, 0], [0, 0], (1 + 0) / 2),
        ([0, 0], [1, 1], 0),
    ],
)
def test_macro_f1_of_a_class_that_is_never_predicted(labels, predicted, f1):
    """Its F1 is 0, as in scikit-learn."""
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), 2).float()
    metrics = classification_metrics(logits, torch.tensor(labels))
    assert metrics["macro_f1"] == pytest.approx(f1)
