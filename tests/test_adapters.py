"""Adapters on disk: PEFT reads ours, we read PEFT's, and saving a loaded one changes nothing."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import randomise, states
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from adapters import load_adapter, save_adapter
from config import BUNDLED_MODEL, LINEARS, ROOT, GPT2Config, InputError, LoRAConfig
from lora import apply_lora, base_sha256, lora_layers, merge_lora
from models.gpt2 import GPT2Model

# PEFT 0.21 uses an attribute that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")
OLD_ADAPTER = Path(__file__).parent / "fixtures" / "old_adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGET_SETS = [
    ("q_proj", "v_proj", "interm_dense"),
    ("q_proj",),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    LINEARS,
]
TARGETS = pytest.mark.parametrize(
    "targets", TARGET_SETS, ids=["q,v,interm", "q", "q,k,v,out", "all"]
)
CLOSE = {"atol": 1e-5, "rtol": 0}
ALL_LAYERS = {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}


def with_lora(gpt, targets=TARGET_SETS[0], **settings):
    config = LoRAConfig(**{"rank": 3, "alpha": 6.0, "targets": targets} | settings)
    return randomise(apply_lora(gpt, config))


@torch.no_grad()
def logits(gpt, ids):
    return gpt.hidden_state_to_token(states(gpt, ids))


@torch.no_grad()
def peft_logits(model, ids):
    return model.eval()(input_ids=ids).logits


def train_with_peft(model, ids, path, **settings):
    """Save a PEFT adapter of `model` after two steps; returns the model."""
    torch.manual_seed(0)
    defaults = {"r": 3, "lora_alpha": 6, "fan_in_fan_out": True}
    model = get_peft_model(model, LoraConfig(**defaults | settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids)[0].square().mean().backward()
        optimizer.step()
    model.save_pretrained(path)
    return model


@pytest.fixture
def trained_by_peft(reference, ids, tmp_path):
    """A PEFT adapter of c_attn and c_fc: its folder and its logits."""
    path = tmp_path / "peft"
    model = train_with_peft(reference, ids, path, target_modules=["c_attn", "c_fc"])
    return path, peft_logits(model, ids)


def change_settings(path, **settings):
    config = json.loads((path / CONFIG).read_text()) | settings
    (path / CONFIG).write_text(json.dumps(config))


@TARGETS
def test_save_load_save_gives_the_same_files(folder, gpt, tmp_path, targets, ids):
    """Loading restores the targets, rank, alpha, dropout and values that were saved."""
    with_lora(gpt, targets, dropout=0.25)
    save_adapter(gpt, tmp_path / "one")
    again = load_adapter(GPT2Model.from_pretrained(folder), tmp_path / "one")
    save_adapter(again, tmp_path / "two")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert lora_layers(again).keys() == lora_layers(gpt).keys()
    assert torch.equal(states(again, ids), states(gpt, ids))
    assert [name for name, p in again.named_parameters() if p.requires_grad] == [
        name for name, p in gpt.named_parameters() if p.requires_grad
    ]


@TARGETS
def test_peft_reads_ours(gpt, reference, tmp_path, targets, ids):
    """PEFT has one fused c_attn; stacked A and block-diagonal B give q, k, v their own updates."""
    before = logits(gpt, ids)
    save_adapter(with_lora(gpt, targets), tmp_path)
    ours = logits(gpt, ids)
    assert not torch.allclose(ours, before, atol=1e-2)
    assert_close(peft_logits(PeftModel.from_pretrained(reference, tmp_path), ids), ours, **CLOSE)


@pytest.mark.parametrize("targets", [TARGET_SETS[0], LINEARS], ids=["q,v,interm", "all"])
@pytest.mark.parametrize("inside", [True, False], ids=["bundled model", "another folder"])
def test_pefts_auto_class_finds_the_base(folder, tmp_path, monkeypatch, ids, inside, targets):
    """base_model_name_or_path names it: relative if in the repository, otherwise absolute."""
    model = BUNDLED_MODEL if inside else folder
    gpt = with_lora(GPT2Model.from_pretrained("tiny" if inside else folder), targets)
    save_adapter(gpt, tmp_path)
    base = json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"]
    assert base == ("data/tiny-gpt2" if inside else str(model.resolve()))
    monkeypatch.chdir(ROOT)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(peft_logits(theirs, ids), logits(gpt, ids), atol=1e-4, rtol=0)


def test_a_downloaded_base_keeps_its_hub_name(folder, tmp_path, monkeypatch):
    """An absolute path in the local cache would exist on this machine only."""
    monkeypatch.setattr("models.hugging_face.find_on_hub", lambda name: folder)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "openai-community/gpt2"):
        save_adapter(with_lora(GPT2Model.from_pretrained(name)), tmp_path)
        base = json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"]
        assert base in (name, f"openai-community/{name}")


def test_we_read_pefts_and_give_it_back(gpt, reference, trained_by_peft, tmp_path, ids):
    """q, k and v get copies of the fused A; saved by us, PEFT reads the same update again."""
    path, expected = trained_by_peft
    before = logits(gpt, ids)
    load_adapter(gpt, path)
    assert not torch.allclose(expected, before, atol=1e-2)
    assert_close(logits(gpt, ids), expected, **CLOSE)
    save_adapter(gpt, tmp_path / "ours")
    fresh = GPT2LMHeadModel.from_pretrained(gpt.folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, tmp_path / "ours")
    assert_close(peft_logits(theirs, ids), expected, **CLOSE)
    assert_close(logits(merge_lora(gpt), ids), expected, **CLOSE)


# Settings of PEFT with which an adapter loads, and the layers of Hugging Face that it adapts
PEFT_FORMS = {
    "list of one": ({"target_modules": ["c_attn"]}, {"c_attn"}),
    "list of all": ({"target_modules": ["c_attn", "c_proj", "c_fc"]}, ALL_LAYERS),
    "list with a path": ({"target_modules": ["attn.c_proj"]}, {"attn.c_proj"}),
    "PEFT's default for GPT-2": ({}, {"c_attn"}),
    "all-linear": ({"target_modules": "all-linear"}, ALL_LAYERS),
    "regular expression": ({"target_modules": r".*\.mlp\.c_(fc|proj)"}, {"c_fc", "mlp.c_proj"}),
    "expression of every layer": ({"target_modules": r".*h\.[01]\.attn\.c_attn"}, {"c_attn"}),
    "exclusion by list": (
        {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["c_attn"]},
        {"attn.c_proj", "mlp.c_proj"},
    ),
    "exclusion by path": (
        {"target_modules": ["c_proj", "c_fc"], "exclude_modules": ["attn.c_proj"]},
        {"c_fc", "mlp.c_proj"},
    ),
    "exclusion by expression": (
        {"target_modules": r".*c_.*", "exclude_modules": r".*\.mlp\..*"},
        {"c_attn", "attn.c_proj"},
    ),
    "all-linear with exclusion": (
        {"target_modules": "all-linear", "exclude_modules": ["c_fc"]},
        ALL_LAYERS - {"c_fc"},
    ),
    "task type": ({"task_type": "CAUSAL_LM", "target_modules": ["c_fc"]}, {"c_fc"}),
    "dropout": ({"lora_dropout": 0.3, "target_modules": ["c_fc"]}, {"c_fc"}),
    "Gaussian A": ({"init_lora_weights": "gaussian", "target_modules": ["c_fc"]}, {"c_fc"}),
    "random B": ({"init_lora_weights": False, "target_modules": ["c_fc"]}, {"c_fc"}),
    "fractional alpha": ({"lora_alpha": 2.5, "r": 5, "target_modules": ["c_fc"]}, {"c_fc"}),
    "rank 1": ({"r": 1, "target_modules": ["c_attn", "c_fc"]}, {"c_attn", "c_fc"}),
    "revision": ({"revision": "main", "target_modules": ["c_fc"]}, {"c_fc"}),
}
OURS = {
    "c_attn": {"q_proj", "k_proj", "v_proj"},
    "attn.c_proj": {"out_proj"},
    "c_fc": {"interm_dense"},
    "mlp.c_proj": {"out_dense"},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("form", PEFT_FORMS)
def test_every_form_of_a_plain_peft_adapter_loads(gpt, reference, ids, tmp_path, form):
    """The tensors say what is adapted, however the configuration describes it."""
    settings, layers = PEFT_FORMS[form]
    expected = peft_logits(train_with_peft(reference, ids, tmp_path, **settings), ids)
    before = logits(gpt, ids)
    load_adapter(gpt, tmp_path)
    assert (expected - before).abs().max() > 1e-2
    assert_close(logits(gpt, ids), expected, **CLOSE)
    adapted = {name.rsplit(".", 1)[-1] for name in lora_layers(gpt)}
    assert adapted == set().union(*(OURS[layer] for layer in layers))


def test_an_adapter_of_a_model_without_head_loads(gpt, reference, ids, tmp_path):
    """PEFT on transformers' GPT2Model writes tensor names without `transformer.`."""
    settings = {"target_modules": ["c_attn", "c_fc"]}
    model = train_with_peft(reference.transformer, ids, tmp_path, **settings)
    assert "base_model.model.h.0.mlp.c_fc.lora_A.weight" in load_file(tmp_path / WEIGHTS)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).last_hidden_state
    assert (expected - states(gpt, ids)).abs().max() > 1e-2
    assert_close(states(load_adapter(gpt, tmp_path), ids), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_half_precision_loads(gpt, reference, ids, trained_by_peft, dtype):
    """The values are converted to float32 before anything is computed."""
    path = trained_by_peft[0]
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    load_adapter(gpt, path)
    fresh = GPT2LMHeadModel.from_pretrained(gpt.folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, path)
    assert_close(logits(gpt, ids), peft_logits(theirs, ids), **CLOSE)


def test_an_adapter_of_the_old_code_loads(ids):
    """The SHA-256 of a base is the value that this project has always written into adapters.

    tests/fixtures/old_adapter was saved before the rewrite, with q_proj at rank 1 and alpha 4.
    """
    gpt = GPT2Model.from_pretrained("tiny")
    before = logits(gpt, ids)
    load_adapter(gpt, OLD_ADAPTER)
    layers = lora_layers(gpt)
    assert [name.rsplit(".", 1)[-1] for name in layers] == ["q_proj"] * 4
    first = next(iter(layers.values()))
    assert (first.rank, first.alpha, first.dropout.p) == (1, 4.0, 0.1)
    assert base_sha256(gpt).startswith("fe5527d709b5dd7e")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32), OLD_ADAPTER
    )
    assert (logits(gpt, ids) - before).abs().max() > 0.1
    assert_close(logits(gpt, ids), peft_logits(theirs, ids), atol=1e-4, rtol=0)


def test_loading_replaces_present_adapters(folder, gpt, tmp_path, ids):
    """The new adapter is neither added to the old one nor next to it on other targets."""
    save_adapter(with_lora(GPT2Model.from_pretrained(folder), ("q_proj",)), tmp_path)
    with_lora(gpt, ("k_proj", "out_dense"))
    load_adapter(gpt, tmp_path)
    fresh = load_adapter(GPT2Model.from_pretrained(folder), tmp_path)
    assert_close(states(gpt, ids), states(fresh, ids), **CLOSE)
    assert {name.rsplit(".", 1)[-1] for name in lora_layers(gpt)} == {"q_proj"}


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_has_the_mode_of_its_model(gpt, tmp_path, ids, training):
    """from_pretrained evaluates, so an adapter that is loaded then has no dropout."""
    save_adapter(with_lora(GPT2Model.from_pretrained(gpt.folder), dropout=0.5), tmp_path)
    load_adapter(gpt.train(training), tmp_path)
    one, other = (gpt(ids)["last_hidden_state"] for _ in range(2))
    assert torch.equal(one, other) == (not training)


def test_another_base_is_named(folder, gpt, tmp_path):
    """With one changed weight it is another model, and the update would not fit it."""
    save_adapter(with_lora(gpt), tmp_path)
    other = GPT2Model.from_pretrained(folder)
    with torch.no_grad():
        other.layers[1].out_dense.bias[3] += 1e-3
    with pytest.raises(InputError, match=r"another base.*SHA-256"):
        load_adapter(other, tmp_path)


def test_another_width_is_an_error(trained_by_peft):
    """PEFT's adapters have no SHA-256 of a base, so shapes are compared."""
    wide = GPT2Model(GPT2Config(2, 48, 4, vocab_size=300, n_positions=64))
    with pytest.raises(InputError, match=r"another model: layers\.0\..*\(3, 32\)"):
        load_adapter(wide, trained_by_peft[0])


def test_an_adapter_of_some_layers_is_an_error(gpt, reference, ids, tmp_path):
    """This LoRA adapts a linear layer in every block or in none."""
    train_with_peft(reference, ids, tmp_path, target_modules=r".*h\.0\.mlp\.c_fc")
    with pytest.raises(InputError, match="interm_dense in some layers only"):
        load_adapter(gpt, tmp_path)


# Real adapters of PEFT that are not plain LoRA, by the setting that the error names
PEFT_VARIANTS = {
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["wpe"]},
    "rank_pattern": {"rank_pattern": {"c_fc": 1}},
    "alpha_pattern": {"alpha_pattern": {"c_fc": 1}},
    "lora_bias": {"lora_bias": True, "target_modules": ["c_fc"]},
    "layers_to_transform": {"layers_to_transform": [0]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("setting", PEFT_VARIANTS)
def test_a_variant_of_peft_is_rejected_by_its_own_name(gpt, reference, ids, tmp_path, setting):
    """Not by the shapes or names of its tensors; read as plain LoRA it would be another model."""
    settings = {"target_modules": ["c_attn", "c_fc"]} | PEFT_VARIANTS[setting]
    train_with_peft(reference, ids, tmp_path, **settings)
    with pytest.raises(InputError, match=f"sets {setting}, "):
        load_adapter(gpt, tmp_path)


REJECTED = {name: settings[name] for name, settings in PEFT_VARIANTS.items()}
REJECTED["layer_replication"] = [[0, 2], [0, 2]]  # PEFT cannot apply it to a GPT-2


@pytest.mark.parametrize("setting", REJECTED)
def test_unsupported_settings_are_checked_first(gpt, trained_by_peft, setting):
    """Even if nothing else fits either: rank, tensors, and the kind of adapter."""
    path = trained_by_peft[0]
    save_file({"unknown": torch.zeros(3)}, path / WEIGHTS)
    change_settings(path, r=-1, lora_alpha=None, peft_type="LOHA", **{setting: REJECTED[setting]})
    with pytest.raises(InputError, match=f"sets {setting}, "):
        load_adapter(gpt, path)


def test_settings_of_peft_are_known_and_an_unknown_one_is_rejected(gpt, trained_by_peft):
    """A variant that a new PEFT adds does not pass as plain LoRA."""
    path = trained_by_peft[0]
    written = json.loads((path / CONFIG).read_text())
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert written.keys() >= fields - {"runtime_config"}
    load_adapter(gpt, path)
    change_settings(path, use_something_new=True)
    with pytest.raises(InputError, match="use_something_new"):
        load_adapter(gpt, path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("r", None), ("r", 0), ("r", 2.5), ("lora_alpha", None), ("lora_alpha", "x"), ("r", [3])],
)
def test_a_setting_of_another_type_is_an_error(gpt, trained_by_peft, setting, value):
    """A file that was edited by hand gives a message, not a traceback."""
    change_settings(trained_by_peft[0], **{setting: value})
    with pytest.raises(InputError, match=r"rank|alpha"):
        load_adapter(gpt, trained_by_peft[0])


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("h.1.mlp.c_fc.lora_B", r"h\.1\.mlp\.c_fc"),
        ("h.0.attn.c_attn.lora_A", r"h\.0\.attn\.c_attn"),
        ("c_fc.lora_B", "c_fc"),
        ("", "another model"),
    ],
)
def test_a_missing_tensor_is_named(gpt, trained_by_peft, lost, message):
    """A without B is not dropped, not even if it is missing in every layer."""
    path = trained_by_peft[0] / WEIGHTS
    save_file({name: part for name, part in load_file(path).items() if lost not in name}, path)
    with pytest.raises(InputError, match=message):
        load_adapter(gpt, trained_by_peft[0])


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_broken_or_missing_file_is_named(gpt, trained_by_peft, name):
    """An incompletely copied adapter gives a message that says what is wrong."""
    path = trained_by_peft[0] / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="not a readable LoRA adapter"):
        load_adapter(gpt, trained_by_peft[0])
    path.unlink()
    with pytest.raises(InputError, match=name):
        load_adapter(gpt, trained_by_peft[0])


def test_a_model_without_lora_is_not_saved_as_an_adapter(gpt, tmp_path):
    """An empty adapter folder would look like the result of a run."""
    with pytest.raises(InputError, match="no LoRA adapters"):
        save_adapter(gpt, tmp_path)
