"""Folders of Hugging Face: what transformers loads is loaded and saved, the rest rejected by name.

Nearly all folders here are written by transformers or hold what its earlier versions wrote.
"""

import json
import pickle
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch.testing import assert_close
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2TokenizerFast
from transformers.utils import logging

from config import InputError, LoRAConfig
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.hugging_face import find_model, join_conv1d, load_tokenizer, split_conv1d

TEXTS = [
    "beauty's rose",
    " Might never die,\n\n",
    "caf\u00e9",
    "a",
    "that , he . 's <b>",
    "He died.",
]
WEIGHTS = "model.safetensors"


def logits(model, ids):
    with torch.no_grad():
        return model.hidden_state_to_token(model(ids)["last_hidden_state"])


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change_json(path, **settings):
    """Change settings of a JSON file; ... deletes one."""
    config = (read_json(path) if path.exists() else {}) | settings
    config = {name: value for name, value in config.items() if value is not ...}
    path.write_text(json.dumps(config), encoding="utf-8")


def config(**settings):
    return lambda path: change_json(path / "config.json", **settings)


def change_tensors(change):
    """A form whose tensors are changed by `change(tensors)`, in place or into a new dict."""

    def form(path):
        tensors = load_file(path / WEIGHTS)
        tensors = change(tensors) or tensors
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    return form


def transformers_model(path):
    return GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()


def sharded(path):
    model = transformers_model(path)
    (path / WEIGHTS).unlink()
    model.save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2


def renamed_shards(path):
    """model.safetensors.index.json may name any files."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"part{index}.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    change_json(path / f"{WEIGHTS}.index.json", metadata={}, weight_map=weight_map)


def named_by_config(path):
    """config.json may name the weights' file."""
    (path / WEIGHTS).rename(path / "weights.safetensors")
    change_json(path / "config.json", transformers_weights="weights.safetensors")


def pickled(dtype=torch.float32, head=False, **settings):
    def form(path):
        tensors = {name: part.to(dtype) for name, part in load_file(path / WEIGHTS).items()}
        if head:  # as torch.save(model.state_dict()) does: the same storage twice
            tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
        (path / WEIGHTS).unlink()
        torch.save(tensors, path / "pytorch_model.bin", **settings)

    return form


def sharded_pickle(path):
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[:9], names[9:])):
        file = f"pytorch_model-{index + 1:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    change_json(path / "pytorch_model.bin.index.json", metadata={}, weight_map=weight_map)


def in_dtype(dtype):
    def form(path):
        transformers_model(path).to(dtype).save_pretrained(path)

    return form


def without_head(path):
    transformers_model(path).transformer.save_pretrained(path)
    assert not any(name.startswith("transformer.") for name in load_file(path / WEIGHTS))


def published(tensors):
    """The names of the published gpt2: no prefix, no head, and causal masks as buffers."""
    tensors = {name.removeprefix("transformer."): part for name, part in tensors.items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def prefixed_masks(tensors):
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()


def copy_of_head(tensors):
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


def only_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")


def vocab_and_merges(path, **settings):
    model = read_json(path / "tokenizer.json")["model"]
    (path / "tokenizer.json").unlink()
    vocab = model["vocab"] | {"<|endoftext|>": 299}
    (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    if settings:
        change_json(path / "tokenizer_config.json", **settings)


def vocab_with_added_files(path):
    """What save_pretrained of a slow tokenizer wrote until transformers 4."""
    vocab_and_merges(path, tokenizer_class="GPT2Tokenizer", model_max_length=64)
    change_json(path / "added_tokens.json", **{"<|pad|>": 300})
    change_json(path / "special_tokens_map.json", pad_token="<|pad|>", eos_token="<|endoftext|>")


def saved_tokenizer(**settings):
    """The tokenizer as transformers saves it, with changed attributes."""

    def form(path):
        tokenizer = GPT2TokenizerFast.from_pretrained(path)
        for name, value in settings.items():
            setattr(tokenizer, name, value)
        tokenizer.save_pretrained(path)

    return form


def added_pad(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 300
    tokenizer.save_pretrained(path)
    change_json(path / "config.json", pad_token_id=300)


def added_pad_and_embedding(path):
    added_pad(path)
    model = transformers_model(path)
    model.resize_token_embeddings(301, mean_resizing=False)
    model.save_pretrained(path)


def padding_and_truncation(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.enable_padding(length=32, pad_id=299, pad_token="<|endoftext|>")
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.save(str(path / "tokenizer.json"))
    stored = read_json(path / "tokenizer.json")
    assert stored["padding"]
    assert stored["truncation"]


def bert_tokenizer(path):
    """GPT-2s of other languages come with BERT's tokenizer."""
    (path / "tokenizer.json").unlink()
    letters = sorted(set("".join(TEXTS).lower()) - {" ", "\n"})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    words += [f"##{letter}" for letter in letters if letter.isalpha()] + ["beauty", "rose"]
    (path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    change_json(path / "tokenizer_config.json", tokenizer_class="BertTokenizer")


def generation(**settings):
    return lambda path: change_json(path / "generation_config.json", **settings)


def symbolic_links(path):
    """A snapshot in the hub's cache."""
    blobs = path / "blobs"
    blobs.mkdir()
    for index, file in enumerate(sorted(path.glob("*.*"))):
        target = blobs / str(index)
        shutil.move(file, target)
        file.symlink_to(target)


def both_weights(path):
    """transformers prefers safetensors; the pickle is not read."""
    (path / "pytorch_model.bin").write_bytes(b"old")


# Changes to the folder that transformers has saved; each gives one form that has to load
FORMS = {
    "as saved": lambda path: None,
    # weights
    "sharded": sharded,
    "shards of any name": renamed_shards,
    "named by config.json": named_by_config,
    "pickle": pickled(),
    "pickle with head": pickled(head=True),
    "old pickle": pickled(_use_new_zipfile_serialization=False),
    "sharded pickle": sharded_pickle,
    "float16": in_dtype(torch.float16),
    "bfloat16": in_dtype(torch.bfloat16),
    "float64": in_dtype(torch.float64),
    "float16 pickle": pickled(torch.float16),
    "without head": without_head,
    "published": change_tensors(published),
    "masks with prefix": change_tensors(prefixed_masks),
    "copy of head": change_tensors(copy_of_head),
    "only head": change_tensors(only_head),
    "two formats": both_weights,
    "symbolic links": symbolic_links,
    # configuration
    "eos 13": config(eos_token_id=13),
    "eos list": config(eos_token_id=[13, 5]),
    "eos empty list": config(eos_token_id=[]),
    "eos null": config(eos_token_id=None),
    "eos out of range": config(eos_token_id=50256),
    "eos list out of range": config(eos_token_id=[50256, 13]),
    "eos not set": config(eos_token_id=..., bos_token_id=...),
    "pad token": config(pad_token_id=7),
    "different dropouts": config(embd_pdrop=0.3, attn_pdrop=0.0, resid_pdrop=0.05),
    "integer dropouts": config(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0),
    "aliases": config(
        n_embd=..., hidden_size=32, n_layer=..., num_hidden_layers=2, n_head=...,
        num_attention_heads=4, n_positions=..., max_position_embeddings=64,
    ),
    "other heads and epsilon": config(n_head=2, layer_norm_epsilon=1e-3),
    "gelu_pytorch_tanh": config(activation_function="gelu_pytorch_tanh"),
    "explicit n_inner": config(n_inner=128),
    "float32 attention": config(reorder_and_upcast_attn=True),
    "no cache": config(use_cache=False),
    "old dtype": config(torch_dtype="float16", dtype=...),
    "no architecture": config(architectures=..., transformers_version=...),
    "other settings": config(task_specific_params={"a": {"b": 1}}, n_ctx=64, note="caf\u00e9"),
    "labels": config(id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1}),
    # tokenizer
    "tokenizer saved": saved_tokenizer(),
    "left padding": saved_tokenizer(padding_side="left", pad_token="<|endoftext|>"),
    "prefix space": saved_tokenizer(add_prefix_space=True),
    "chat template": saved_tokenizer(chat_template="{{ messages[0].content }}"),
    "vocab and merges": vocab_and_merges,
    "vocab, merges, config": lambda path: vocab_and_merges(path, tokenizer_class="GPT2Tokenizer"),
    "bos token": lambda path: vocab_and_merges(path, add_bos_token=True),
    "vocab and added tokens": vocab_with_added_files,
    "added pad": added_pad,
    "added pad and embedding": added_pad_and_embedding,
    "padding and truncation": padding_and_truncation,
    "BERT's tokenizer": bert_tokenizer,
    # generation
    "generation settings": generation(do_sample=True, temperature=0.7, top_k=3, max_length=9),
    "invalid generation settings": generation(do_sample=False, temperature=0.7, top_p=0.5),
    "generation eos": generation(eos_token_id=[5, 6], pad_token_id=5),
}  # fmt: skip
# `end_of_text` where it is not 299, the configuration's and the tokenizer's
END_OF_TEXT = {"eos 13": 13, "eos list": 13}


@pytest.fixture
def path(folder, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "model")


@pytest.mark.parametrize("form", FORMS)
def test_every_folder_that_transformers_loads_loads_and_is_saved(path, ids, form):
    """Token ids and logits equal transformers', before and after saving."""
    FORMS[form](path)
    theirs, tokenizer = transformers_model(path), AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        expected = theirs(ids).logits
    gpt = GPT2Model.from_pretrained(path)
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    assert not gpt.training
    assert_close(logits(gpt, ids), expected, atol=1e-4, rtol=0)
    token_ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert gpt.encode(TEXTS) == token_ids
    assert [gpt.tokenizer(text)["input_ids"] for text in TEXTS] == token_ids

    saved = path.with_name("saved")
    gpt.save_pretrained(saved)
    again, tokenizer_again = transformers_model(saved), AutoTokenizer.from_pretrained(saved)
    with torch.no_grad():
        assert_close(again(ids).logits, expected, atol=1e-4, rtol=0)
    assert [tokenizer_again(text)["input_ids"] for text in TEXTS] == token_ids
    for name in (
        "eos_token",
        "bos_token",
        "pad_token",
        "unk_token",
        "padding_side",
        "chat_template",
    ):
        assert getattr(tokenizer_again, name) == getattr(tokenizer, name), name
    before, after = theirs.config.to_dict(), again.config.to_dict()
    changed = ("_name_or_path", "architectures", "dtype", "transformers_version")
    for name in (*changed, "transformers_weights"):  # weights are saved as model.safetensors
        before.pop(name, None)
        after.pop(name, None)
    assert after == before
    assert again.generation_config.to_dict() == theirs.generation_config.to_dict()
    generation_config = path / "generation_config.json"
    if generation_config.exists():
        copy = saved / "generation_config.json"
        assert copy.read_bytes() == generation_config.read_bytes()
    twice = GPT2Model.from_pretrained(saved)
    assert twice.config == gpt.config
    assert torch.equal(logits(twice, ids), logits(gpt, ids))


@pytest.mark.parametrize("form", ["as saved", *(name for name in FORMS if "eos" in name)])
def test_end_of_text_is_that_of_the_configuration(path, form):
    """If it sets none in the vocabulary, the tokenizer's; saving changes neither."""
    change_json(path / "tokenizer_config.json", eos_token="<|endoftext|>")
    FORMS[form](path)
    gpt = GPT2Model.from_pretrained(path)
    assert gpt.end_of_text == END_OF_TEXT.get(form, 299)
    gpt.save_pretrained(path.with_name("saved"))
    assert GPT2Model.from_pretrained(path.with_name("saved")).end_of_text == gpt.end_of_text


def test_a_tokenizer_without_end_of_text_has_none(path):
    """Then generation only stops at its limits."""
    change_json(path / "config.json", eos_token_id=None)
    change_json(path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert AutoTokenizer.from_pretrained(path).eos_token_id is None
    assert GPT2Model.from_pretrained(path).end_of_text is None


def test_a_text_with_a_token_beyond_the_vocabulary_names_it(path):
    """The embedding has no such row; without that token the text can be encoded."""
    added_pad(path)
    gpt = GPT2Model.from_pretrained(path)
    with pytest.raises(InputError, match=r"\[PAD\].*300"):
        gpt.encode(["a rose", "a [PAD] rose"])
    assert gpt.encode(["a rose"]) == [gpt.tokenizer("a rose")["input_ids"]]


def test_the_settings_of_a_tokenizer_do_not_reach_a_batch(path):
    """A stored padding or truncation would change the token ids of every text."""
    padding_and_truncation(path)
    gpt = GPT2Model.from_pretrained(path)
    rows = gpt.encode(["a", "From fairest creatures we desire increase"])
    assert len(rows[0]) == 1
    assert len(rows[1]) > 10


def test_an_appended_end_of_text_is_left_out(path):
    """The collator appends it to training texts, and a prompt must not end with it."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    before = tokenizer("a rose")["input_ids"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 299)]
    )
    tokenizer.backend_tokenizer.save(str(path / "tokenizer.json"))
    gpt = GPT2Model.from_pretrained(path)
    assert gpt.tokenizer("a rose")["input_ids"] == [*before, 299]
    assert gpt.encode(["a rose"]) == [before]


def test_decoding_inverts_encoding(gpt):
    """Spaces before punctuation and apostrophes stay, and special tokens are left out."""
    for text in TEXTS:
        (row,) = gpt.encode([text])
        assert gpt.decode(row) == text
        assert gpt.decode([*row, gpt.end_of_text]) == text


def test_the_bundled_model_equals_transformers():
    """Its float16 file is computed in float32, and "tiny" names its folder."""
    ids = torch.randint(0, 8192, (2, 40), generator=torch.Generator().manual_seed(0))
    folder = find_model("tiny")
    gpt, tokenizer = GPT2Model.from_pretrained("tiny"), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        assert_close(logits(gpt, ids), transformers_model(folder)(ids).logits, atol=1e-4, rtol=0)
    assert gpt.encode(TEXTS) == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert gpt.end_of_text == 0


@pytest.mark.parametrize("kind", [str, lambda path: path, lambda path: f"{path}/"])
def test_a_folder_may_be_a_path_or_a_string(path, kind, ids, gpt):
    assert torch.equal(logits(GPT2Model.from_pretrained(kind(path)), ids), logits(gpt, ids))


def test_saving_over_the_loaded_folder(path, ids):
    """Files must not be copied onto themselves, and the tokenizer stays."""
    gpt = GPT2Model.from_pretrained(path)
    before = logits(gpt, ids)
    gpt.save_pretrained(path)
    again = GPT2Model.from_pretrained(path)
    assert torch.equal(logits(again, ids), before)
    assert again.encode(TEXTS) == gpt.encode(TEXTS)


def test_saving_in_another_dtype(gpt, tmp_path, ids):
    """The bundled model is saved in float16, and transformers then loads float16."""
    gpt.save_pretrained(tmp_path, torch.float16)
    assert GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16
    assert_close(
        logits(GPT2Model.from_pretrained(tmp_path), ids), logits(gpt, ids), atol=0.1, rtol=0
    )


def test_a_model_with_lora_is_not_saved_as_a_model(gpt, tmp_path):
    """The folder would lack the update, or have tensors that nobody reads."""
    with pytest.raises(InputError, match="merge_lora"):
        apply_lora(gpt, LoRAConfig()).save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("shape", [(4, 6), (6,)])
def test_split_and_join_are_inverses(shape):
    """By hand: the first third of a Conv1D's columns, transposed, is the query's weight."""
    fused = torch.arange(24.0)[: torch.Size(shape).numel()].reshape(shape)
    query, key, value = split_conv1d(fused, 3)
    assert torch.equal(join_conv1d([query, key, value]), fused)
    assert torch.equal(query, fused[..., :2].T if fused.ndim == 2 else fused[:2])


@pytest.mark.parametrize("verbosity", [logging.ERROR, logging.INFO])
@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_settings_of_transformers_are_restored(path, verbosity, bars, fails):
    """Loading is silent, but the caller's own use of transformers is not."""
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    logging.set_verbosity(verbosity)
    try:
        if fails:
            (path / WEIGHTS).write_bytes(b"")
            with pytest.raises(InputError):
                GPT2Model.from_pretrained(path)
        else:
            assert GPT2Model.from_pretrained(path).tokenizer
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


def test_loading_prints_nothing(path, capfd):
    """transformers' bars and reports would drown the lines of a script."""
    change_tensors(published)(path)
    assert GPT2Model.from_pretrained(path).encode(TEXTS)
    assert capfd.readouterr() == ("", "")


def tensor(name, shape):
    """Replace a tensor by one of another shape; None removes it."""

    def change(tensors):
        tensors.pop(f"transformer.{name}", None)
        if shape is not None:
            tensors[f"transformer.{name}"] = torch.zeros(shape)

    return change_tensors(change)


def add_to(name, value):
    """Change one value of a tensor."""

    def change(tensors):
        tensors[name] = tensors.get(name, tensors["transformer.wte.weight"]).clone()
        tensors[name].view(-1)[-1] += value

    return change_tensors(change)


def without(*names):
    def form(path):
        for name in names:
            (path / name).unlink()

    return form


def truncated(path):
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[: len(content) // 2])


def truncated_pickle(path):
    pickled()(path)
    content = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def lost_shard(path):
    sharded(path)
    sorted(path.glob("model-*.safetensors"))[1].unlink()


QUANTIZATION = {"quant_method": "bitsandbytes", "load_in_4bit": True}
# Changes to the folder and a pattern of the error, which names what does not fit
REJECTED = {
    "relu": (config(activation_function="relu"), "activation_function.*relu"),
    "gelu": (config(activation_function="gelu"), "activation_function.*gelu"),
    "gelu_fast": (config(activation_function="gelu_fast"), "activation_function.*gelu_fast"),
    "untied": (config(tie_word_embeddings=False), "tie_word_embeddings.*False"),
    "unscaled": (config(scale_attn_weights=False), "scale_attn_weights.*False"),
    "layer scale": (config(scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx.*True"),
    "cross-attention": (config(add_cross_attention=True), "add_cross_attention.*True"),
    "n_inner": (config(n_inner=96), "n_inner.*96"),
    "llama": (config(model_type="llama"), "model_type.*llama"),
    "quantized": (config(quantization_config=QUANTIZATION), "quantization_config"),
    "no n_layer": (config(n_layer=...), r"h\.10\."),
    "heads": (config(n_head=5), r"32.*5"),
    "text for a number": (config(n_layer="2"), "n_layer"),
    "negative": (config(n_embd=-32), "n_embd"),
    "list": (lambda path: (path / "config.json").write_text("[1]"), r"config\.json"),
    "broken config": (lambda path: (path / "config.json").write_text('{"n_'), r"config\.json"),
    "no config": (without("config.json"), r"config\.json"),
    "missing": (tensor("h.1.mlp.c_fc.bias", None), r"lack.*h\.1\.mlp\.c_fc\.bias"),
    "missing embedding": (tensor("wte.weight", None), r"lack.*wte\.weight"),
    "missing norm": (tensor("ln_f.weight", None), r"lack.*ln_f\.weight"),
    "extra layer": (tensor("h.2.ln_1.weight", (32,)), r"unknown.*h\.2\.ln_1\.weight"),
    "ignored": (tensor("h.0.attn.bias_k", (32,)), r"unknown.*h\.0\.attn\.bias_k"),
    "value head": (tensor("v_head.summary.weight", (1, 32)), r"unknown.*v_head"),
    "fewer layers": (config(n_layer=1), r"unknown.*h\.1\."),
    "more layers": (config(n_layer=3), r"lack.*h\.2\."),
    "positions": (tensor("wpe.weight", (63, 32)), r"wpe\.weight.*\(63, 32\).*\(64, 32\)"),
    "vocabulary": (config(vocab_size=301), r"wte\.weight.*\(300, 32\).*\(301, 32\)"),
    "not transposed": (tensor("h.0.mlp.c_fc.weight", (128, 32)), r"h\.0\.mlp\.c_fc\.weight"),
    "fused, narrow": (tensor("h.0.attn.c_attn.weight", (32, 64)), r"h\.0\.attn\.c_attn\.weight"),
    "fused, scalar": (tensor("h.0.attn.c_attn.bias", ()), r"h\.0\.attn\.c_attn\.bias"),
    "one value": (tensor("h.0.ln_1.bias", (1,)), r"h\.0\.ln_1\.bias"),
    "another head": (add_to("lm_head.weight", 1), r"lm_head\.weight"),
    "NaN": (add_to("transformer.h.1.mlp.c_proj.weight", torch.nan), r"h\.1\.mlp\.c_proj\.weight"),
    "infinite": (add_to("transformer.wpe.weight", torch.inf), r"wpe\.weight"),
    "no weights": (without(WEIGHTS), "no weights"),
    "truncated": (truncated, re.escape(WEIGHTS)),
    "truncated pickle": (truncated_pickle, r"pytorch_model\.bin"),
    "empty": (lambda path: (path / WEIGHTS).write_bytes(b""), re.escape(WEIGHTS)),
    "lost shard": (lost_shard, r"model-0000"),
}  # fmt: skip


@pytest.mark.parametrize("problem", REJECTED)
def test_a_folder_that_does_not_fit_is_rejected_by_name(path, problem):
    """transformers loads most of these without a word, as another model."""
    change, message = REJECTED[problem]
    change(path)
    with pytest.raises(InputError, match=f"(?s){message}"):
        GPT2Model.from_pretrained(path)


@pytest.mark.parametrize("n_layer", [300, 10**9])
def test_a_huge_configuration_is_rejected_at_once(path, n_layer):
    """A malformed number must not allocate a model first."""
    change_json(path / "config.json", n_layer=n_layer)
    start = time.perf_counter()
    with pytest.raises(InputError, match=f"n_layer.*{n_layer}"):
        GPT2Model.from_pretrained(path)
    assert time.perf_counter() - start < 2


class Malicious:
    """Unpickled without checks, it would create a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))]
)
def test_a_pickle_runs_no_code(path, tmp_path, write):
    """The error does not pass on torch's advice to load such a file without checks."""
    trace = tmp_path / "trace"
    (path / WEIGHTS).unlink()
    write({"transformer.wte.weight": Malicious(trace)}, path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin") as caught:
        GPT2Model.from_pretrained(path)
    assert not trace.exists()
    assert not re.search(r"weights_only|trust|unsafe|safe_globals|\bpickle", str(caught.value))


def test_no_code_of_a_folder_runs(path, tmp_path):
    """trust_remote_code is never set, neither for the model nor for the tokenizer."""
    trace = tmp_path / "trace"
    (path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change_json(path / "config.json", auto_map=classes)
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    change_json(path / "tokenizer_config.json", **tokenizer)
    assert GPT2Model.from_pretrained(path).encode(["a rose"])
    assert not trace.exists()


def test_sizes_that_a_caller_expects_are_checked(folder):
    """The course's code passes d, l and num_heads, which used to be ignored."""
    assert GPT2Model.from_pretrained(folder, d=32, l=2, num_heads=4).config.n_embd == 32
    for name, wrong in {"d": 48, "l": 12, "num_heads": 12}.items():
        with pytest.raises(InputError, match=f"{name}=.*{wrong}"):
            GPT2Model.from_pretrained(folder, **{name: wrong})


@pytest.mark.parametrize("name", ["gpt3", "no/such/folder", ""])
def test_an_unknown_model_is_named(name):
    """The error lists the sizes."""
    with pytest.raises(InputError, match=f"{name}.*gpt2-xl"):
        GPT2Model.from_pretrained(name)


def test_an_adapter_is_not_a_model(path):
    """A folder that holds an adapter names its base model."""
    change_json(path / "adapter_config.json", peft_type="LORA")
    with pytest.raises(InputError, match="adapter"):
        GPT2Model.from_pretrained(path)


def test_a_folder_without_tokenizer_is_named_when_text_is_read(path):
    """Weights alone do load; no other tokenizer replaces the missing one."""
    (path / "tokenizer.json").unlink()
    gpt = GPT2Model.from_pretrained(path)
    with pytest.raises(InputError, match=f"{path}.*no tokenizer"):
        gpt.encode(["rose"])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}'])
def test_a_broken_tokenizer_is_named(path, content):
    """Its own errors have no type and do not name the file."""
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=f"{path}.*tokenizer"):
        load_tokenizer(path)
