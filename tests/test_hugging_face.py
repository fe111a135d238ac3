"""Folders of Hugging Face: what transformers loads is loaded and saved, the rest rejected by name.

Nearly all folders here are written by transformers or hold what its earlier versions wrote.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import logits
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers import GPT2Config as Config

from config import ROOT, GPT2Config, InputError, LoRAConfig
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.hugging_face import HUB_ORGANIZATION, SIZES

TEXTS = ["beauty's rose", " Might never die,\n\n", "caf\u00e9 that , he . 's <b>"]
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"


def change_json(path, **settings):
    """Change settings of a JSON file; ... deletes one."""
    config = (json.loads(path.read_text()) if path.exists() else {}) | settings
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def config(**settings):
    return lambda path: change_json(path / "config.json", **settings)


def tensors_by(change):
    """A form whose tensors are those that `change(tensors)` returns."""
    return lambda path: save_file(
        change(load_file(path / WEIGHTS)), path / WEIGHTS, metadata={"format": "pt"}
    )


def transformers_model(path):
    return GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()


def sharded(path):
    model = transformers_model(path)
    (path / WEIGHTS).unlink()
    model.save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2


def pickled(path):
    """With the head, as torch.save(model.state_dict()) does: the same storage twice."""
    tensors = load_file(path / WEIGHTS)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    (path / WEIGHTS).unlink()
    torch.save(tensors, path / PICKLE)


def published(tensors):
    """The names of the published gpt2: no prefix, no head, and causal masks as buffers."""
    tensors = {name.removeprefix("transformer."): part for name, part in tensors.items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def vocab_and_merges(path):
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (path / "tokenizer.json").unlink()
    change_json(path / "vocab.json", **model["vocab"], **{"<|endoftext|>": 299})
    (path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))


def added_pad(path):
    """A padding token beyond the embedding, as `tokenizer.add_special_tokens` gives."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    change_json(path / "config.json", pad_token_id=300)


ALIASES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SAMPLING = {"do_sample": True, "top_k": 3, "eos_token_id": [5, 6]}
# Changes to the folder that transformers has saved; each gives one form that has to load
FORMS = {
    "sharded": sharded,
    "pickle": pickled,
    "float16": lambda path: transformers_model(path).half().save_pretrained(path),
    "without prefix": lambda path: transformers_model(path).transformer.save_pretrained(path),
    "published": tensors_by(published),
    "different dropouts": config(embd_pdrop=0.3, attn_pdrop=0, resid_pdrop=0.05),
    "eos list": config(eos_token_id=[13, 5]),
    "eos null": config(eos_token_id=None, bos_token_id=None),
    "aliases": config(n_embd=..., n_layer=..., n_head=..., **ALIASES),
    "heads and epsilon": config(n_head=2, layer_norm_epsilon=1e-3, n_inner=128, note="caf\u00e9"),
    "vocab and merges": vocab_and_merges,
    "added pad": added_pad,
    "generation": lambda path: change_json(path / "generation_config.json", **SAMPLING),
}


@pytest.fixture
def path(folder, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "model")


def all_files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("form", FORMS)
def test_every_folder_that_transformers_loads_loads_and_is_saved(path, ids, form):
    """Token ids, logits and settings are transformers', and so they are when saved by us."""
    change_json(path / "tokenizer_config.json", eos_token="<|endoftext|>")
    FORMS[form](path)
    theirs, tokenizer = transformers_model(path), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        expected = theirs(ids).logits
    gpt = GPT2Model.from_pretrained(path)
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    assert not gpt.training
    assert_close(logits(gpt, ids), expected, atol=1e-4, rtol=0)
    assert gpt.encode(TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert gpt.end_of_text == (13 if form == "eos list" else 299)

    saved = path.with_name("saved")
    gpt.save_pretrained(saved)
    again, tokenizer_again = transformers_model(saved), AutoTokenizer.from_pretrained(saved)
    with torch.no_grad():
        assert_close(again(ids).logits, expected, atol=1e-4, rtol=0)
    assert [tokenizer_again(text)["input_ids"] for text in TEXTS] == gpt.encode(TEXTS)
    assert tokenizer_again.special_tokens_map == tokenizer.special_tokens_map
    settings = [model.config.to_dict() for model in (theirs, again)]
    for name in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        del settings[0][name], settings[1][name]
    assert settings[0] == settings[1]
    assert again.generation_config.to_dict() == theirs.generation_config.to_dict()
    twice = GPT2Model.from_pretrained(saved)
    assert twice.config == gpt.config
    twice.save_pretrained(path.with_name("twice"))
    assert all_files(path.with_name("twice")) == all_files(saved)


def test_saving_over_the_loaded_folder(path, ids):
    """Its tensors may be mapped into memory."""
    gpt = GPT2Model.from_pretrained(str(path))
    gpt.save_pretrained(path)
    assert torch.equal(logits(GPT2Model.from_pretrained(f"{path}/"), ids), logits(gpt, ids))
    with pytest.raises(InputError, match="merge_lora"):  # the folder would lack the update
        apply_lora(gpt, LoRAConfig()).save_pretrained(path)


def test_a_model_that_was_not_loaded_is_saved(tmp_path):
    """It has no tokenizer, and transformers gets its settings from GPT2Config."""
    config = GPT2Config(2, 32, 4, 300, 64, resid_pdrop=0.2, eos_token_id=5)
    GPT2Model(config).save_pretrained(tmp_path)
    theirs = transformers_model(tmp_path)
    assert (theirs.config.resid_pdrop, theirs.generation_config.eos_token_id) == (0.2, 5)


def test_loading_prints_nothing(path, capfd):
    """transformers' bars and reports would drown the lines of a script."""
    tensors_by(published)(path)
    GPT2Model.from_pretrained(path)
    assert capfd.readouterr() == ("", "")


def tensor(name, function):
    """Replace a tensor by a function of it, or of the embedding if it is new; None removes it."""

    def change(tensors):
        new = function(tensors.pop(name, tensors["transformer.wte.weight"]).clone())
        return tensors if new is None else tensors | {name: new}

    return tensors_by(change)


def without(name):
    return lambda path: (path / name).unlink()


def cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:100])


def lost_shard(path):
    sharded(path)
    sorted(path.glob("model-*.safetensors"))[1].unlink()


def narrow(path):
    GPT2LMHeadModel(Config.from_pretrained(path, n_inner=96)).save_pretrained(path)


H = "transformer.h"
# Changes to the folder and a pattern of the error, which names what does not fit
REJECTED = {
    "gelu": (config(activation_function="gelu"), "activation_function to 'gelu', not 'gelu_"),
    "untied": (config(tie_word_embeddings=False), "tie_word_embeddings to False"),
    "cross-attention": (config(add_cross_attention=True), "add_cross_attention to True"),
    "n_inner": (narrow, r"interm_dense\.weight.*\[96, 32\].*\[128, 32\]"),
    "llama": (config(model_type="llama"), "model_type to 'llama'"),
    "quantized": (config(quantization_config={"load_in_4bit": True}), "quantization_config"),
    "heads": (config(n_head=5), "n_embd 32 .* n_head 5"),
    "broken config": (cut("config.json"), r"config\.json"),
    "missing": (
        tensor(f"{H}.1.mlp.c_fc.bias", lambda old: None),
        r"missing or unknown: h\.1\.mlp\.c_fc\.bias",
    ),
    "extra layer": (
        tensor(f"{H}.2.ln_1.weight", lambda old: old),
        r"missing or unknown: h\.2\.ln_1\.weight",
    ),
    "misshapen": (
        tensor("transformer.wpe.weight", lambda old: old[1:]),
        r"position_embedding\.weight.*\[63, 32\].*\[64, 32\]",
    ),
    "another head": (tensor("lm_head.weight", lambda old: old + 1), r"lm_head\.weight differs"),
    "NaN": (tensor(f"{H}.1.ln_2.weight", lambda old: old / 0 * 0), r"ln_2\.weight is not finite"),
    "no weights": (without(WEIGHTS), "missing or unknown"),
    "lost shard": (lost_shard, "missing or unknown"),
    "no tokenizer": (without("tokenizer.json"), "no tokenizer"),
    "broken tokenizer": (cut("tokenizer.json"), "cannot be loaded"),
}


@pytest.mark.parametrize("problem", REJECTED)
def test_a_folder_that_does_not_fit_is_rejected_by_name(path, problem):
    """transformers loads most of these without a word, as another model."""
    change, message = REJECTED[problem]
    change(path)
    with pytest.raises(InputError, match=f"(?s){path}.*{message}"):
        GPT2Model.from_pretrained(path)


def test_an_unknown_model_is_named():
    """The error lists the sizes."""
    with pytest.raises(InputError, match=r"gpt3 .*tiny, gpt2.*gpt2-xl"):
        GPT2Model.from_pretrained("gpt3")


class Malicious:
    """Unpickled without checks, it would create a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", [WEIGHTS, PICKLE])
def test_a_folder_runs_no_code(path, tmp_path, name):
    """Neither that of a pickle nor a Python file that its settings name."""
    trace = tmp_path / "trace"
    (path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    change_json(path / "config.json", auto_map={"AutoConfig": "evil.Evil"})
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    change_json(path / "tokenizer_config.json", **evil)
    assert GPT2Model.from_pretrained(path).encode(["a rose"])
    (path / WEIGHTS).unlink()
    torch.save({"transformer.wte.weight": Malicious(trace)}, path / name)
    with pytest.raises(InputError, match=f"{path} cannot be loaded"):
        GPT2Model.from_pretrained(path)
    assert not trace.exists()


HUB = """
import sys
from config import InputError
from models.gpt2 import GPT2Model
for name in sys.argv[1:]:
    try:
        print(GPT2Model.from_pretrained(name).name)
    except InputError as error:
        print(error)
"""


def test_the_cache_of_the_hub(path, tmp_path):
    """Models in the cache are found without the hub, which refuses connections here.

    Others are refused soon, with the ways out.
    """
    vocab_and_merges(path)
    found = ["gpt2", f"{HUB_ORGANIZATION}gpt2-medium"]
    for cached in found:
        place = tmp_path / "hub" / f"models--{cached.replace('/', '--')}"
        shutil.copytree(path, place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)
    hub = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", HUB, *found, *SIZES[2:]]
    output = subprocess.check_output(command, cwd=ROOT, env=os.environ | hub, text=True, timeout=90)
    lines = output.splitlines()
    assert lines[:2] == found
    for error in lines[2:]:
        assert "is not in the local cache and cannot be downloaded" in error
        assert all(way in error for way in ("--model_size tiny", "folder", "HF_HOME"))
