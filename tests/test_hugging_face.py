"""Folders in and out: both of Hugging Face's layouts load exactly, and what does not fit is refused by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from config import InputError, LoRAConfig
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.hugging_face import join_conv1d, split_conv1d

CLOSE = {"atol": 1e-5, "rtol": 0}


def logits(model, ids):
    with torch.no_grad():
        return model.hidden_state_to_token(model(ids)["last_hidden_state"])


def write_model(path, folder, tensors=None, **settings):
    """A copy of the folder with other tensors, or other settings in config.json (None deletes one)."""
    config = json.loads((folder / "config.json").read_text()) | settings
    config = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    save_file(load_file(folder / "model.safetensors") if tensors is None else tensors, path / "model.safetensors")
    return path


def test_both_layouts_are_the_same_model(folder, tmp_path, gpt):
    """The published gpt2 has no prefix, no head, and its causal masks as buffers; nothing of that is a weight."""
    tensors = load_file(folder / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    hub = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        hub[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        hub[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    state = GPT2Model.from_pretrained(write_model(tmp_path, folder, hub)).state_dict()
    assert state.keys() == gpt.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in gpt.state_dict().items())


def test_a_head_equal_to_the_embedding_is_accepted(folder, tmp_path, gpt, ids):
    """Some tools save the tied head a second time."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    assert torch.equal(logits(GPT2Model.from_pretrained(write_model(tmp_path, folder, tensors)), ids), logits(gpt, ids))


def test_float16_folder_computes_in_float32(folder, tmp_path, ids):
    """The embedded model is stored in float16; its arithmetic must not be."""
    halves = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    write_model(tmp_path, folder, halves, dtype="float16")
    gpt = GPT2Model.from_pretrained(tmp_path)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    with torch.no_grad():
        assert_close(logits(gpt, ids), reference(ids).logits, **CLOSE)


def test_transformers_reads_what_we_save(gpt, tmp_path, ids):
    """A model saved here is a Hugging Face folder, in the same values, tokenizer included."""
    gpt.save_pretrained(tmp_path / "saved")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert_close(logits(gpt, ids), theirs(ids).logits, **CLOSE)
    again = GPT2Model.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again, ids), logits(gpt, ids))
    assert again.config == gpt.config
    assert again.tokenizer.encode("beauty's rose").ids == gpt.tokenizer.encode("beauty's rose").ids


def test_a_model_with_adapters_is_not_saved_as_a_whole(gpt, tmp_path):
    """It would be a folder without the update, or with tensors that nobody reads."""
    with pytest.raises(InputError, match="merge_lora"):
        apply_lora(gpt, LoRAConfig()).save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("shape", [(4, 6), (6,)])
def test_split_and_join_are_inverses(shape):
    """Split by hand: the first third of a Conv1D's columns, transposed, is the query's weight."""
    fused = torch.arange(24.0)[: torch.Size(shape).numel()].reshape(shape)
    query, key, value = split_conv1d(fused, 3)
    assert torch.equal(join_conv1d([query, key, value]), fused)
    assert torch.equal(query, fused[..., :2].T if fused.ndim == 2 else fused[:2])


MISFITS = {
    "missing": ({"h.1.mlp.c_fc.bias": None}, r"lack h\.1\.mlp\.c_fc\.bias"),
    "extra": ({"h.2.ln_1.weight": (32,)}, r"unknown h\.2\.ln_1\.weight"),
    "not quite a mask": ({"h.0.attn.bias_k": (32,)}, r"unknown h\.0\.attn\.bias_k"),
    "positions": ({"wpe.weight": (63, 32)}, r"wpe\.weight .*\(63, 32\).*\(64, 32\)"),
    "not transposed": ({"h.0.mlp.c_fc.weight": (128, 32)}, r"h\.0\.mlp\.c_fc\.weight"),
    "fused, narrow": ({"h.0.attn.c_attn.weight": (32, 64)}, r"h\.0\.attn\.c_attn\.weight"),
    "fused, not three parts": ({"h.0.attn.c_attn.weight": (32, 4)}, r"h\.0\.attn\.c_attn\.weight"),
    "fused, scalar": ({"h.0.attn.c_attn.bias": ()}, r"h\.0\.attn\.c_attn\.bias"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(folder, tmp_path, misfit):
    """The report's code assigned .data and hid a wrong width; every tensor must be there, once, in its shape."""
    changes, message = MISFITS[misfit]
    tensors = load_file(folder / "model.safetensors")
    for name, shape in changes.items():
        tensors.pop(f"transformer.{name}", None)
        if shape is not None:
            tensors[f"transformer.{name}"] = torch.zeros(shape)
    with pytest.raises(InputError, match=message):
        GPT2Model.from_pretrained(write_model(tmp_path, folder, tensors))


def test_an_untied_head_is_refused(folder, tmp_path):
    """It would be dropped, and the model be another one."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        GPT2Model.from_pretrained(write_model(tmp_path, folder, tensors))


@pytest.mark.parametrize(("setting", "value"), [
    ("activation_function", "gelu"), ("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False),
    ("tie_word_embeddings", False), ("n_inner", 96), ("attn_pdrop", 0.3), ("model_type", "llama"), ("n_layer", None),
    ("n_head", 5), ("add_cross_attention", True),
])  # fmt: skip
def test_a_setting_that_is_not_ours_is_named(folder, tmp_path, setting, value):
    """Computed with GPT-2's own settings, such a model would be wrong without a word."""
    named = {"attn_pdrop": "dropouts .*0.3", "n_head": "32 does not divide into 5 heads"}.get(setting, setting)
    with pytest.raises(InputError, match=named):
        GPT2Model.from_pretrained(write_model(tmp_path, folder, **{setting: value}))


def test_widths_that_a_caller_expects_are_checked(folder):
    """The course's code passes d, l and num_heads; they used to be ignored."""
    assert GPT2Model.from_pretrained(folder, d=32, l=2, num_heads=4).config.width == 32
    with pytest.raises(InputError, match="d=32"):
        GPT2Model.from_pretrained(folder, d=48)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_broken_file_is_named(folder, tmp_path, name):
    """A half-copied folder must say which file is wrong."""
    path = write_model(tmp_path, folder) / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match=re.escape(name)):
        GPT2Model.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        GPT2Model.from_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer_is_named_when_text_is_asked_for(folder, tmp_path):
    """Weights alone do load; nothing else's tokenizer is taken silently."""
    write_model(tmp_path, folder)
    (tmp_path / "tokenizer.json").unlink()
    gpt = GPT2Model.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        gpt.tokenizer.encode("rose")
