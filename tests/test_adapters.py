"""Adapters on disk: PEFT reads ours, we read PEFT's, and saving a loaded one changes nothing."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers import logits, randomise, states
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from config import LINEARS, ROOT, InputError, LoRAConfig
from lora import apply_lora, lora_layers, merge_lora
from models.adapters import base_sha256, load_adapter, load_model, save_adapter
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT

# PEFT 0.21 uses an attribute that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
OLD_ADAPTER = Path(__file__).parent / "fixtures" / "old_adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLOSE = {"atol": 1e-5, "rtol": 0}
ALL_LAYERS = ["c_attn", "c_proj", "c_fc"]


def with_lora(gpt, **settings):
    return randomise(apply_lora(gpt, LoRAConfig(**{"rank": 3, "alpha": 6.0} | settings)))


@torch.no_grad()
def peft_logits(model, ids):
    return model.eval()(input_ids=ids).logits


def make_peft(model, **settings):
    """A PEFT model with an update that is not zero."""
    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 6, "fan_in_fan_out": True} | settings
    model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def trained_by_peft(reference, tmp_path):
    """A PEFT adapter of c_attn and c_fc: its folder."""
    path = tmp_path / "peft"
    make_peft(reference, target_modules=["c_attn", "c_fc"]).save_pretrained(path)
    return path


def change_settings(path, **settings):
    config = json.loads((path / CONFIG).read_text()) | settings
    (path / CONFIG).write_text(json.dumps(config))


def change_tensors(path, change):
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS)


TARGET_SETS = [part for size in range(1, 7) for part in itertools.combinations(LINEARS, size)]


def test_every_target_set_goes_to_peft_and_back(gpt, reference, ids, tmp_path):
    """PEFT gives our logits, and what it saves again is the same update for us.

    Ours is saved again with the same bytes. alpha / A.shape[0] is PEFT's scaling of a layer; it is
    ours for every layer without patterns. Loading replaces the adapter of the targets before.
    """
    ours, again, theirs = (tmp_path / name for name in ("ours", "again", "theirs"))
    plain, base = copy.deepcopy(gpt), logits(gpt, ids)
    for targets in TARGET_SETS:
        model = with_lora(copy.deepcopy(plain), targets=targets, dropout=0.25)
        expected = logits(model, ids)
        assert (expected - base).abs().max() > 0.01
        save_adapter(SonnetGPT(model), ours)
        save_adapter(load_adapter(gpt, ours), again)
        assert torch.equal(logits(gpt, ids), expected)
        for name in (CONFIG, WEIGHTS):
            assert (ours / name).read_bytes() == (again / name).read_bytes()
        settings = json.loads((ours / CONFIG).read_text())
        assert not {"rank_pattern", "alpha_pattern"} & settings.keys()
        for name, tensor in load_file(ours / WEIGHTS).items():
            assert "lora_B" in name or settings["lora_alpha"] / len(tensor) == 6.0 / 3
        peft = PeftModel.from_pretrained(copy.deepcopy(reference), ours)
        assert_close(peft_logits(peft, ids), expected, **CLOSE)
        peft.save_pretrained(theirs)
        assert_close(logits(load_adapter(gpt, theirs), ids), expected, **CLOSE)


@pytest.mark.parametrize("inside", [True, False], ids=["bundled model", "another folder"])
def test_the_base_of_an_adapter_is_found(folder, tmp_path, monkeypatch, ids, inside):
    """PEFT's Auto class (from our folder) and load_model (from anywhere) load what is named."""
    gpt = with_lora(GPT2Model.from_pretrained("tiny" if inside else folder))
    save_adapter(gpt, tmp_path)
    base = json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"]
    assert base == ("data/tiny-gpt2" if inside else str(folder))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(load_model(tmp_path), ids), logits(gpt, ids))
    monkeypatch.chdir(ROOT)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(peft_logits(theirs, ids), logits(gpt, ids), atol=1e-4, rtol=0)
    change_settings(tmp_path, base_model_name_or_path="no/such")
    with pytest.raises(InputError, match="adapter of the base model 'no/such'"):
        load_model(tmp_path)


PATTERNS = {"rank_pattern": {"c_attn": 1, "attn.c_proj": 5}}
PATTERNS |= {"alpha_pattern": {"mlp.c_proj": 2, r"h\.\d+\.mlp\.c_fc": 1.5}}
# Settings of PEFT with which an adapter loads, and how many linear layers of a block it adapts
PEFT_FORMS = {
    "all": ({"target_modules": ALL_LAYERS}, 6),
    "exclusion": ({"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["c_attn"]}, 2),
    "Gaussian A": ({"init_lora_weights": "gaussian", "lora_dropout": 0.3}, 3),
    "alpha 2.5": ({"lora_alpha": 2.5, "r": 5, "target_modules": ["c_fc"]}, 1),
    "patterns": ({"target_modules": ALL_LAYERS} | PATTERNS, 6),
}


@pytest.mark.parametrize("form", PEFT_FORMS)
def test_pefts_adapters_load(gpt, reference, ids, tmp_path, form):
    """The tensors say what is adapted, however the settings describe it; saved again, PEFT reads
    it, and merging it gives the same logits."""
    settings, count = PEFT_FORMS[form]
    base, plain = logits(gpt, ids), copy.deepcopy(reference)
    theirs = make_peft(reference, **settings)
    expected = peft_logits(theirs, ids)
    assert (expected - base).abs().max() > 0.01
    theirs.save_pretrained(tmp_path)
    assert_close(logits(load_adapter(gpt, tmp_path), ids), expected, **CLOSE)
    assert len(lora_layers(gpt)) == 2 * count
    save_adapter(gpt, tmp_path / "ours")
    again = PeftModel.from_pretrained(plain, tmp_path / "ours")
    assert_close(peft_logits(again, ids), expected, **CLOSE)
    change_settings(tmp_path, lora_alpha=0, alpha_pattern={})  # no update, as in PEFT
    assert torch.equal(logits(load_adapter(copy.deepcopy(gpt), tmp_path), ids), base)
    assert_close(logits(merge_lora(gpt), ids), expected, **CLOSE)


@pytest.mark.parametrize("way", ["linear", "ties"])
def test_adapters_that_peft_has_combined_load(gpt, reference, ids, tmp_path, way):
    """add_weighted_adapter keeps alpha / rank of the file for each layer only if ranks agree."""
    for name in ("one", "two"):
        other = GPT2Model.from_pretrained(gpt.name)
        save_adapter(with_lora(other, targets=("q_proj", "v_proj", "out_dense")), tmp_path / name)
    theirs = PeftModel.from_pretrained(reference, tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", adapter_name="two")
    theirs.add_weighted_adapter(["one", "two"], [0.7, 0.6], "both", way, density=0.5)
    theirs.set_adapter("both")
    theirs.save_pretrained(tmp_path, selected_adapters=["both"])
    expected = peft_logits(theirs, ids)
    assert_close(logits(load_adapter(gpt, tmp_path / "both"), ids), expected, **CLOSE)


def test_an_adapter_of_a_model_without_head_loads(gpt, reference, ids, tmp_path):
    """PEFT on transformers' GPT2Model writes tensor names without `transformer.`."""
    theirs = make_peft(reference.transformer, target_modules=["c_attn", "c_fc"])
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).last_hidden_state
    assert_close(states(load_adapter(gpt, tmp_path), ids), expected, **CLOSE)


def test_an_adapter_of_the_first_code_loads(ids):
    """The SHA-256 of a base is the value that this project has always written into adapters.

    tests/fixtures/old_adapter has q_proj at rank 1 and alpha 4, on the bundled model.
    """
    gpt = GPT2Model.from_pretrained("tiny")
    sha256 = "fe5527d709b5dd7e50637282246dd09048175103f2ee7b7a2dae02d71dd5462e"
    assert base_sha256(gpt) == sha256
    before = logits(gpt, ids)
    layers = lora_layers(load_adapter(SonnetGPT(gpt), OLD_ADAPTER))
    assert [layer.config for layer in layers.values()] == [LoRAConfig(1, 4.0, 0.1, ("q_proj",))] * 4
    plain = AutoModelForCausalLM.from_pretrained(ROOT / gpt.name, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, OLD_ADAPTER)
    assert_close(peft_logits(theirs, ids), logits(gpt, ids), atol=1e-4, rtol=0)
    assert (logits(gpt, ids) - before).abs().max() > 0.1
    assert base_sha256(gpt) == sha256  # LoRA does not change it


def test_another_base_is_named(gpt, tmp_path):
    """With one changed weight it is another model, and the update would not fit it."""
    with pytest.raises(InputError, match="no LoRA adapters"):
        save_adapter(gpt, tmp_path)
    save_adapter(with_lora(gpt), tmp_path)
    gpt.layers[1].out_dense.bias.data[3] += 1e-3
    with pytest.raises(InputError, match=rf"its base {gpt.name} has another SHA-256"):
        load_adapter(gpt, tmp_path)


# Settings of PEFT that make another model
REJECTED = {"use_dora": True, "use_rslora": True, "bias": "all", "modules_to_save": ["wpe"]}
REJECTED |= {
    "peft_type": "LOHA",
    "lora_bias": True,
    "layers_to_transform": [0],
    "use_something_new": True,
}


@pytest.mark.parametrize("setting", REJECTED)
def test_a_variant_of_peft_is_rejected_by_its_own_name(gpt, trained_by_peft, setting):
    """Not by the shapes or names of its tensors; read as plain LoRA it would be another model."""
    save_file({"unknown": torch.zeros(3)}, trained_by_peft / WEIGHTS)
    change_settings(trained_by_peft, **{setting: REJECTED[setting]})
    with pytest.raises(InputError, match=rf"not implement {setting}\b"):
        load_adapter(gpt, trained_by_peft)


def without(part):
    keep = lambda tensors: {name: t for name, t in tensors.items() if part not in name}  # noqa: E731
    return lambda path: change_tensors(path, keep)


def scaled(value):
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
    return lambda path: change_tensors(path, lambda t: t | {name: t[name] * value})


def narrower(path):
    change_tensors(path, lambda t: {n: p[1:] if "lora_B" in n else p for n, p in t.items()})


def truncated(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:40])


UNUSABLE = {
    "one B": (without("h.1.mlp.c_fc.lora_B"), r"h\.1\.mlp\.c_fc"),
    "all B of a layer": (without("c_fc.lora_B"), "c_fc"),
    "NaN": (scaled(torch.nan), r"h\.1\.mlp\.c_fc\.lora_B.* not finite"),
    "infinite": (scaled(torch.inf), r"h\.1\.mlp\.c_fc\.lora_B.* not finite"),
    "another width": (narrower, r"layers\.0\.\S+ has A and B of"),
    "no alpha": (
        lambda path: change_settings(path, lora_alpha=None),
        "is not an adapter of this model",
    ),
    "dropout 1": (lambda path: change_settings(path, lora_dropout=1.0), "dropout"),
    "truncated settings": (truncated(CONFIG), CONFIG),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), WEIGHTS),
}


@pytest.mark.parametrize("problem", UNUSABLE)
def test_an_unusable_adapter_is_named(gpt, trained_by_peft, problem, ids):
    """An incompletely copied or diverged adapter gives a message; the model stays as it was."""
    before = states(gpt, ids)
    change, message = UNUSABLE[problem]
    change(trained_by_peft)
    with pytest.raises(InputError, match=f"(?s){message}"):
        load_adapter(gpt, trained_by_peft)
    assert torch.equal(states(gpt, ids), before)
