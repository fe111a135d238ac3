"""Adapters on disk: PEFT reads ours, we read PEFT's, and saving what was loaded is the same file."""

import dataclasses
import json

import pytest
import torch
from helpers import randomise, states
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from config import LINEARS, GPT2Config, InputError, LoRAConfig
from lora import adapters, apply_lora, load_adapter, merge_lora, save_adapter
from models.gpt2 import GPT2Model

# PEFT 0.21 asks transformers for an attribute by the name that 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TARGET_SETS = [("q_proj", "v_proj", "interm_dense"), ("q_proj",), ("q_proj", "k_proj", "v_proj", "out_proj"), LINEARS]
TARGETS = pytest.mark.parametrize("targets", TARGET_SETS, ids=["q,v,interm", "q", "q,k,v,out", "all"])
CLOSE = {"atol": 1e-5, "rtol": 0}


def adapted(gpt, targets=TARGET_SETS[0], **settings):
    return randomise(apply_lora(gpt, LoRAConfig(**{"rank": 3, "alpha": 6.0, "targets": targets} | settings)))


@torch.no_grad()
def logits(gpt, ids):
    return gpt.hidden_state_to_token(states(gpt, ids))


@torch.no_grad()
def peft_logits(model, ids):
    return model.eval()(input_ids=ids).logits


@pytest.fixture
def trained_by_peft(reference, ids, tmp_path):
    """A PEFT adapter of c_attn and c_fc after two steps: its folder and its logits."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = get_peft_model(reference, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft", peft_logits(model, ids)


@TARGETS
def test_save_load_save_is_the_same_file(folder, gpt, tmp_path, targets, ids):
    """Loading must give back exactly the targets, rank and values that were saved, dropout and alpha included."""
    adapted(gpt, targets, dropout=0.25)
    save_adapter(gpt, tmp_path / "one")
    again = load_adapter(GPT2Model.from_pretrained(folder), tmp_path / "one")
    save_adapter(again, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert adapters(again).keys() == adapters(gpt).keys()
    assert torch.equal(states(again, ids), states(gpt, ids))
    assert [name for name, p in again.named_parameters() if p.requires_grad] == [
        name for name, p in gpt.named_parameters() if p.requires_grad
    ]


@TARGETS
def test_peft_reads_ours(gpt, reference, tmp_path, targets, ids):
    """PEFT has one fused c_attn; stacked A and block B must give q, k and v exactly their own updates."""
    before = logits(gpt, ids)
    save_adapter(adapted(gpt, targets), tmp_path)
    ours = logits(gpt, ids)
    assert not torch.allclose(ours, before, atol=1e-2)
    assert_close(peft_logits(PeftModel.from_pretrained(reference, tmp_path), ids), ours, **CLOSE)


def test_we_read_pefts_and_give_it_back(gpt, folder, reference, trained_by_peft, tmp_path, ids):
    """q, k and v each take a copy of the fused A; saved by us, PEFT must read the same update again."""
    path, expected = trained_by_peft
    before = logits(gpt, ids)
    load_adapter(gpt, path)
    assert not torch.allclose(expected, before, atol=1e-2)
    assert_close(logits(gpt, ids), expected, **CLOSE)
    save_adapter(gpt, tmp_path / "ours")
    fresh = type(reference).from_pretrained(folder, dtype=torch.float32)
    assert_close(peft_logits(PeftModel.from_pretrained(fresh, tmp_path / "ours"), ids), expected, **CLOSE)
    assert_close(logits(merge_lora(gpt), ids), expected, **CLOSE)


def test_loading_replaces_the_adapters_that_are_there(folder, gpt, tmp_path, ids):
    """Neither stacked on the old ones nor beside them on other targets; the base is the same."""
    save_adapter(adapted(GPT2Model.from_pretrained(folder), ("q_proj",)), tmp_path)
    adapted(gpt, ("k_proj", "out_dense"))
    load_adapter(gpt, tmp_path)
    assert_close(states(gpt, ids), states(load_adapter(GPT2Model.from_pretrained(folder), tmp_path), ids), **CLOSE)
    assert {name.rsplit(".", 1)[-1] for name in adapters(gpt)} == {"q_proj"}


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_is_in_the_mode_of_its_model(gpt, tmp_path, ids, training):
    """from_pretrained evaluates: an adapter loaded then must not drop, or every call gives other logits."""
    save_adapter(adapted(GPT2Model.from_pretrained(gpt.folder), dropout=0.5), tmp_path)
    load_adapter(gpt.train(training), tmp_path)
    one, other = (gpt(ids)["last_hidden_state"] for _ in range(2))
    assert torch.equal(one, other) == (not training)


def test_another_base_is_named(folder, gpt, tmp_path):
    """One weight of another value is another model: the update would be added to the wrong thing."""
    save_adapter(adapted(gpt), tmp_path)
    other = GPT2Model.from_pretrained(folder)
    with torch.no_grad():
        other.layers[1].out_dense.bias[3] += 1e-3
    with pytest.raises(InputError, match=r"another base.*SHA-256"):
        load_adapter(other, tmp_path)


def test_another_width_is_refused(trained_by_peft):
    """PEFT's adapters name no base, so the shapes must tell."""
    wide = GPT2Model(GPT2Config(layers=2, width=48, heads=4, vocab_size=300, positions=64))
    with pytest.raises(InputError, match=r"layers\.0\..*\(3, 32\).*another model"):
        load_adapter(wide, trained_by_peft[0])


@pytest.mark.parametrize(("setting", "value"), [
    ("use_rslora", True), ("use_dora", True), ("bias", "all"), ("modules_to_save", ["wte"]),
    ("target_modules", ".*c_attn"), ("layers_to_transform", [0]), ("init_lora_weights", "pissa"),
    ("rank_pattern", {"c_fc": 1}), ("alpha_pattern", {"c_fc": 1}), ("lora_bias", True), ("exclude_modules", ["c_fc"]),
])  # fmt: skip
def test_a_setting_we_do_not_implement_is_named(gpt, trained_by_peft, setting, value):
    """Read as plain LoRA, such an adapter would be a wrong model without a word."""
    path = trained_by_peft[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(InputError, match=setting):
        load_adapter(gpt, trained_by_peft[0])


def test_plain_settings_of_peft_are_accepted_and_an_unknown_one_refused(gpt, trained_by_peft):
    """A variant that a new PEFT adds must not slip through as plain LoRA."""
    path = trained_by_peft[0] / "adapter_config.json"
    written = json.loads(path.read_text())
    assert written.keys() >= {field.name for field in dataclasses.fields(LoraConfig)} - {"runtime_config"}
    load_adapter(gpt, trained_by_peft[0])
    path.write_text(json.dumps(written | {"use_something_new": True}))
    with pytest.raises(InputError, match="use_something_new"):
        load_adapter(gpt, trained_by_peft[0])


@pytest.mark.parametrize(("setting", "value"), [("r", None), ("r", 0), ("lora_alpha", None), ("lora_alpha", "x")])
def test_a_setting_of_another_kind_is_refused(gpt, trained_by_peft, setting, value):
    """A file edited by hand ends in a message, not in a traceback."""
    path = trained_by_peft[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(InputError):
        load_adapter(gpt, trained_by_peft[0])


@pytest.mark.parametrize("lost", ["h.1.mlp.c_fc.lora_B", "h.0.attn.c_attn.lora_A"])
def test_half_of_a_pair_is_refused(gpt, trained_by_peft, lost):
    """An A whose B is missing must not be dropped."""
    path = trained_by_peft[0] / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if lost not in name}
    save_file(tensors, path)
    with pytest.raises(InputError):
        load_adapter(gpt, trained_by_peft[0])


def test_a_pair_that_lost_its_half_in_every_layer_is_refused(gpt, trained_by_peft):
    """With all of c_fc's B gone, c_attn alone is still complete; c_fc must not vanish silently."""
    path = trained_by_peft[0] / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "c_fc.lora_B" not in name}, path)
    with pytest.raises(InputError, match="c_fc"):
        load_adapter(gpt, trained_by_peft[0])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_broken_or_missing_file_is_named(gpt, trained_by_peft, name):
    """A half-copied adapter must say what is wrong."""
    path = trained_by_peft[0] / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="not a LoRA adapter that can be read"):
        load_adapter(gpt, trained_by_peft[0])
    path.unlink()
    with pytest.raises(InputError, match=name):
        load_adapter(gpt, trained_by_peft[0])


def test_a_model_without_adapters_saves_none(gpt, tmp_path):
    """An empty adapter folder would look like a run's result."""
    with pytest.raises(InputError, match="no LoRA adapters"):
        save_adapter(gpt, tmp_path)
