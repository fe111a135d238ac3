"""The judge of pairs: what it sees and what it does not, its gradient, its files, and the figures it is judged by."""

import json
import math

import pytest
import torch
from helpers import randomise, states
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from config import InputError, LoRAConfig
from datasets import Pair, PairsDataset
from evaluation import classification_figures, classify, overlap_accuracy, overlap_threshold, word_overlap
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT
from pooling import POOLINGS

ENCODINGS = ("joint", "separate")


def judge(gpt, pooling="last", pair_encoding="joint", **settings):
    """A model in evaluation mode whose head and pooling are random, and large enough to tell texts apart."""
    torch.manual_seed(2)
    model = ParaphraseGPT(gpt, pooling, pair_encoding, **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("gpt."):
                parameter.copy_((0.05 if name.startswith("head") else 0.3) * torch.randn_like(parameter))
    return model


def batch(ids, pair_encoding):
    """Two pairs of different lengths: ids and mask, right-padded with a token that is also a real one."""
    ids = ids.repeat(2, 1)[: 2 if pair_encoding == "joint" else 4].clone()
    mask = torch.ones_like(ids)
    for row, length in enumerate((20, 11, 7, 13)[: len(ids)]):
        ids[row, length:], mask[row, length:] = 5, 0
    return (ids, mask) if pair_encoding == "joint" else (ids.view(2, 2, 20), mask.view(2, 2, 20))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pair_encoding", ENCODINGS)
@torch.no_grad()
def test_padding_and_batch_mates_change_nothing(gpt, ids, pooling, pair_encoding):
    """A pair alone, among others, padded on either side, with any ids in its padding: the same logits."""
    model = judge(gpt, pooling, pair_encoding)
    ids, mask = batch(ids, pair_encoding)
    together = model(ids, mask)
    assert together.shape == (2, 2)
    for row in range(2):
        longest = int(mask[row].sum(-1).max())
        alone = model(ids[row : row + 1, ..., :longest], mask[row : row + 1, ..., :longest])
        assert_close(alone, together[row : row + 1], rtol=0, atol=1e-6)
    assert_close(model(torch.where(mask == 1, ids, 299), mask), together, rtol=0, atol=1e-6)
    assert_close(model(*(value.flip(0) for value in (ids, mask))), together.flip(0), rtol=0, atol=1e-6)
    left = torch.zeros_like(ids), torch.zeros_like(mask)
    for text, real, *padded in zip(*(value.view(-1, 20) for value in (ids, mask, *left)), strict=True):
        length = int(real.sum())
        padded[0][20 - length :], padded[1][20 - length :] = text[:length], 1
    assert_close(model(*left), together, rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-3


@torch.no_grad()
def test_what_the_head_sees_of_two_texts(gpt, ids):
    """[v1; v2; |v1 - v2|; v1 * v2], each text read alone; of a joint prompt, the pooled vector."""
    model = judge(gpt, "mean", "separate")
    first, second = (states(gpt, ids[row : row + 1]).mean(1) for row in (0, 1))
    seen = torch.cat([first, second, (first - second).abs(), first * second], 1)
    pair = ids[None, :2]
    assert_close(model(pair, torch.ones_like(pair)), model.head(seen), rtol=1e-5, atol=1e-6)
    assert model.head.in_features == 4 * 32
    model = judge(gpt, "mean")
    assert_close(model(ids[:1], torch.ones(1, 20)), model.head(first), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair_encoding", ENCODINGS)
def test_loss_is_cross_entropy_and_the_penalty(gpt, ids, pair_encoding):
    """Nats a pair, worked out from the logits."""
    model = judge(gpt, "multihead", pair_encoding, parameter_penalty=0.0, vector_penalty=0.5)
    with torch.no_grad():  # equal heads: the penalty of each pair of them is at its largest
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
    """1 a text over its real tokens; None for a pooling that learns none."""
    ids, mask = batch(ids, pair_encoding)
    weights = judge(gpt, pooling, pair_encoding).token_weights(ids, mask)
    if pooling not in ("generalized", "multihead"):
        assert weights is None
        return
    assert weights.shape == ids.shape
    assert (weights[mask == 0] == 0).all()
    assert_close(weights.sum(-1), torch.ones(ids.shape[:-1]))


@pytest.mark.parametrize("pooling", ["last", "multihead"])
def test_lora_trains_its_matrices_the_pooling_and_the_head(gpt, ids, pooling):
    """Exactly these require a gradient and get one; every weight of the base has none."""
    model = apply_lora(judge(gpt, pooling), LoRAConfig(rank=2, targets=("q_proj", "out_dense")))
    own = {name for name, _ in ParaphraseGPT(gpt, pooling).named_parameters() if not name.startswith("gpt.")}
    assert own >= {"head.weight", "head.bias"}
    expected = own | {f"gpt.layers.{layer}.{part}.lora_{side}.weight" for layer in (0, 1)
                      for part in ("attention.q_proj", "out_dense") for side in "ab"}  # fmt: skip
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    model.loss(*batch(ids, "joint"), labels=torch.tensor([1, 0])).backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected


def test_full_fine_tuning_reaches_every_parameter(gpt, ids):
    """But the end of the position table and tokens that do not occur, whose gradient is 0."""
    model = judge(gpt, "generalized", "separate")
    model.loss(*batch(ids, "separate"), labels=torch.tensor([1, 0])).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters()
               if parameter is not model.pooling.score.bias)  # fmt: skip


def test_the_cloze_form_is_the_same_judgement():
    """no and yes at their places in the embedded vocabulary, -1e9 elsewhere: the argmax stays what it was."""
    model = ParaphraseGPT(GPT2Model.from_pretrained("tiny"))
    logits = torch.tensor([[1.5, -2.0], [-30.0, -20.0]])
    wide = model.vocab_logits(logits)
    assert wide.shape == (2, 8192)
    assert wide[:, [1199, 1649]].equal(logits)
    assert [model.gpt.tokenizer.decode([token]) for token in wide.argmax(1).tolist()] == ["no", "yes"]
    wide[:, [1199, 1649]] = -1e9
    assert (wide == -1e9).all()


def test_the_cloze_form_of_float16():
    """On CUDA without bfloat16 autocast makes float16 logits, which hold no -1e9."""
    wide = ParaphraseGPT(GPT2Model.from_pretrained("tiny")).vocab_logits(torch.ones(1, 2, dtype=torch.float16))
    assert wide[0, 0] < -60000


def test_a_vocabulary_without_no_and_yes_is_named(gpt):
    """None as an index would broadcast over the whole vocabulary."""
    with pytest.raises(InputError, match="lacks one of the tokens no, yes"):
        judge(gpt).vocab_logits(torch.zeros(1, 2))


@pytest.fixture
def saved(gpt, ids, tmp_path):
    """A model of each kind in a folder, and the logits it gives; LoRA's updates are not zero."""

    def make(lora=False, pooling="multihead", pair_encoding="separate"):
        model = judge(gpt, pooling, pair_encoding, **({"vector_penalty": 0.25} if pooling == "multihead" else {}))
        if lora:
            randomise(apply_lora(model, LoRAConfig(rank=2)))
        model.save_pretrained(tmp_path / "one")
        with torch.no_grad():
            return tmp_path / "one", model.eval()(*batch(ids, pair_encoding))

    return make


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("pooling", "pair_encoding"), [("multihead", "separate"), ("last", "joint")])
def test_saved_loaded_and_saved_again(saved, folder, ids, tmp_path, lora, pooling, pair_encoding):
    """The same logits bit for bit, settings with them, and the same files."""
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
    assert all((one / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_an_adapter_on_another_base_is_refused(saved):
    """Its updates mean nothing there."""
    one, _ = saved(lora=True)
    with pytest.raises(InputError, match="trained on another base"):
        ParaphraseGPT.from_pretrained(one, "tiny")


def test_a_folder_without_a_head_is_named(folder, tmp_path):
    """A plain GPT-2, or a folder that is not there: nothing starts from a random head unasked."""
    for path in (folder, tmp_path / "absent"):
        with pytest.raises(InputError, match=r"head\.safetensors not found"):
            ParaphraseGPT.from_pretrained(path)


BROKEN_SETTINGS = {
    "none": None, "no json": "{", "no object": "[1]", "null": "null", "deep": "[" * 100_000,
    "unknown pooling": {"pooling": "median"}, "unhashable": {"pooling": ["last"]},
    "unknown setting": {"pooling": "last", "x": 1},
    "gpt": {"pooling": "last", "gpt": 1}, "width": {"pooling": "last", "width": 7},
    "another pooling": {"pooling": "generalized"}, "another encoding": {"pooling": "last", "pair_encoding": "separate"},
    "negative": {"pooling": "multihead", "heads": -1}, "text": {"pooling": "multihead", "heads": "5"},
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_SETTINGS)
def test_settings_of_a_head_that_cannot_be_used(saved, kind):
    """They come out of a file that anyone may have made."""
    one, _ = saved(pooling="last", pair_encoding="joint")
    settings = BROKEN_SETTINGS[kind]
    text = settings if isinstance(settings, str) else json.dumps(settings)
    tensors = load_file(one / "head.safetensors")
    save_file(tensors, one / "head.safetensors", metadata=settings and {"settings": text})
    with pytest.raises(InputError, match=r"head\.safetensors is not the head"):
        ParaphraseGPT.from_pretrained(one)


def test_an_unknown_pair_encoding_is_refused(saved):
    """A slip would silently be joint."""
    one, _ = saved(pooling="last", pair_encoding="joint")
    settings = {"settings": json.dumps({"pooling": "last", "pair_encoding": "sideways"})}
    save_file(load_file(one / "head.safetensors"), one / "head.safetensors", metadata=settings)
    with pytest.raises(InputError, match=r"head\.safetensors is not the head"):
        ParaphraseGPT.from_pretrained(one)


HEADS = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "empty": lambda path: path.write_bytes(b""),
    "lacking": lambda path: change(path, lambda tensors: tensors.pop("head.bias")),
    "extra": lambda path: change(path, lambda tensors: tensors.update(x=torch.ones(1))),
    "misshapen": lambda path: change(path, lambda tensors: tensors.update({"head.weight": torch.ones(2, 3)})),
    "another base's": lambda path: change(
        path, lambda tensors: tensors.update({"gpt.final_norm.bias": torch.ones(32)})
    ),
}


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    settings = json.dumps({"pooling": "last", "pair_encoding": "joint"})
    save_file(tensors, path, metadata={"settings": settings})


@pytest.mark.parametrize("edit", HEADS.values(), ids=HEADS)
def test_a_broken_head_is_refused(saved, edit):
    """Every tensor that the model has, no other, in its shape."""
    one, _ = saved(pooling="last", pair_encoding="joint")
    edit(one / "head.safetensors")
    with pytest.raises(InputError, match=r"head\.safetensors is not the head"):
        ParaphraseGPT.from_pretrained(one)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_logits_are_in_the_order_of_the_file(gpt, tmp_path, pooling):
    """Pairs are judged sorted by length, 32 at a time; each must get its own logits, without dropout."""
    lengths = [row * 17 % 41 for row in range(70)]  # none in order
    path = tmp_path / "pairs.csv"
    path.write_text("id\tsentence1\tsentence2\tis_duplicate\n"
                    + "".join(f"{row}\t{'z' * length}y\tthy\t0\n" for row, length in enumerate(lengths)))  # fmt: skip
    data = PairsDataset(path, gpt, "separate")
    model = judge(gpt, pooling, "separate").train()
    logits = classify(model, data)
    assert (logits.shape, logits.dtype) == ((70, 2), torch.float32)
    with torch.no_grad():
        for row in range(70):
            one = data.collate([row])
            assert_close(model(one["input_ids"], one["attention_mask"])[0], logits[row], rtol=0, atol=1e-6)
    assert len(logits[:, 0].unique()) > 30


def test_classification_figures_by_hand():
    """Gold no no no yes yes, judged no no yes yes no: F1 of no is 4 / (4 + 2), of yes 2 / (2 + 2)."""
    logits = torch.tensor([[0.0, -1.0], [2.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [1.0, 0.0]])
    figures = classification_figures(logits, torch.tensor([0, 0, 0, 1, 1]))
    nats = sum(math.log(1 + math.exp(-margin)) for margin in (1, 2, -1, 3, -1)) / 5
    assert figures == pytest.approx({
        "loss": nats, "accuracy": 3 / 5, "macro_f1": (4 / 6 + 2 / 4) / 2,
        "no_judged_no": 2, "no_judged_yes": 1, "yes_judged_no": 1, "yes_judged_yes": 1,
    })  # fmt: skip


@pytest.mark.parametrize(("labels", "judged", "f1"), [
    ([0, 1, 1, 0], [1, 1, 1, 1], (0 + 4 / 6) / 2), ([0, 0], [0, 0], (1 + 0) / 2), ([0, 0], [1, 1], 0),
])  # fmt: skip
def test_macro_f1_of_a_class_never_judged(labels, judged, f1):
    """Its F1 is 0, as scikit-learn has it, and not a division by 0."""
    logits = torch.nn.functional.one_hot(torch.tensor(judged), 2).float()
    assert classification_figures(logits, torch.tensor(labels))["macro_f1"] == pytest.approx(f1)


def pairs(*rows):
    return [Pair(2, "a", first, second, label) for first, second, label in rows]


def test_word_overlap_by_hand():
    """Words in common over words in all, each once and whatever its case."""
    overlaps = [word_overlap(pair) for pair in pairs(("A b", "b  a A", 1), ("a b c", "c d", 0), ("a", "b", 0))]
    assert overlaps == [1, 1 / 4, 0]


def test_word_overlap_threshold_by_hand():
    """Overlaps 1/3 no, 1/2 yes, 1 yes: the first threshold above 1/3 is right on all; on others it may not be."""
    train = pairs(("a b", "b c", 0), ("a b", "b", 1), ("a", "a", 1))
    threshold = overlap_threshold(train)
    assert threshold == pytest.approx(0.34)
    assert overlap_accuracy(train, threshold) == 1
    assert overlap_accuracy(pairs(("a", "a", 0), ("a", "b", 0), ("a b", "b", 1)), threshold) == pytest.approx(2 / 3)


def test_word_overlap_may_be_no_use():
    """With all labels alike, a threshold that always says so."""
    for label in (0, 1):
        rows = pairs(("a", "a", label), ("a", "b", label))
        assert overlap_accuracy(rows, overlap_threshold(rows)) == 1


def test_word_overlap_is_compared_alike_where_the_threshold_is_found_and_used():
    """4 of 5 words in common, with the threshold at 0.8: in float32 yes, in Python's floats no."""
    words = "abcdefghijklmnopqrstuvwxyz"
    train = pairs((" ".join(words[:19]), " ".join(words[:15]), 0), ("a b c d e", "a b c d", 1))
    assert overlap_accuracy(train, overlap_threshold(train)) == 1
