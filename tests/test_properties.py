"""Generated inputs: readers, option parsers and JSON of model folders let nothing out but our own error.

HYPOTHESIS_EXAMPLES=1500 pytest tests/test_properties.py      # the exhaustive profile: 12,000 inputs
"""

import contextlib
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kill_everywhere import SCRIPTS, make_model
from safetensors.torch import load_file, save_file

from config import InputError, LoRAConfig, TrainConfig, from_options
from datasets import Pair, Sonnet, read_pairs, read_sonnets
from lora import apply_lora, load_adapter, save_adapter
from models.gpt2 import GPT2Model
from models.hugging_face import read_config
from models.paraphrase_gpt import ParaphraseGPT
from models.sonnet_gpt import check_sampling

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))
generated = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
PIECES = ["id", "text", "sentence1", "sentence2", "is_duplicate", "\t", ",", "\n", "\r\n", "\r", '"', '""', "0", "1",
          "1.0", "nan", "yes", "\0", "\ufeff", " ", "a", "é", "😀", "の", "\u2028", "\x85", "id,text\n",
          "id\tsentence1\tsentence2\tis_duplicate\n"]  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=30).map("".join)
CONTENT = st.binary(max_size=200) | st.tuples(
    TEXT, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
).map(lambda pair: pair[0].encode(pair[1], "surrogatepass"))
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**40, 1e-320, 1e308])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    root = tmp_path_factory.mktemp("kit")
    make_model(root / "model")
    save_adapter(apply_lora(GPT2Model.from_pretrained(root / "model"), LoRAConfig(rank=2)), root / "adapter")
    ParaphraseGPT(GPT2Model.from_pretrained(root / "model"), "multihead").save_pretrained(root / "judge")
    return root


@contextlib.contextmanager
def refused(word=""):
    """Lets nothing out but our own error, with the file's name in it, and what --help ends with."""
    try:
        yield
    except InputError as error:
        if not str(error) or word not in str(error):
            raise AssertionError(f"{error} does not say {word}") from error
    except SystemExit as stop:
        if stop.code:
            raise AssertionError("ended without our error") from stop


@pytest.mark.parametrize("name", ["file.csv", "file.txt"])
@generated
@given(content=CONTENT)
def test_sonnets(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with refused(name):
        found = read_sonnets(path)
        assert found
        for sonnet in found:
            assert isinstance(sonnet, Sonnet)
            assert sonnet.lines
            assert sonnet.prompt.strip()


@generated
@given(content=CONTENT)
def test_pairs(tmp_path, content):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with refused("pairs.csv"):
        for pair in read_pairs(path, "check the path", []):
            assert isinstance(pair, Pair)
            assert pair.sentence1.strip()
            assert pair.sentence2.strip()
            assert pair.label in (0, 1, None)


WORDS = (
    st.sampled_from(["nan", "inf", "-1", "0", "1e400", "", "tiny", "report", "q_proj", "max", "joint", "--", "-"])
    | NUMBERS.map(str)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
)
OPTIONS = [
    "epochs", "lr", "batch_size", "seed", "schedule", "warmup", "max_grad_norm", "weight_decay", "patience",
    "checkpoint_every", "dtype", "device", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "use_lora",
    "use_gpu", "preset", "out_dir", "resume", "model_size", "temperature", "top_p", "top_k", "max_new_tokens",
    "generate_only", "adapter", "model", "sonnet_path", "sonnet_out", "pooling", "pair_encoding", "dataset",
    "para_train", "para_dev", "para_test", "para_dev_out", "para_test_out", "predict_only", "attention_penalty",
    "held_out_sonnet_path",
]  # fmt: skip
FLAGS = {"use_lora", "use_gpu", "resume", "generate_only", "predict_only"}
ARGUMENT = st.sampled_from(OPTIONS).flatmap(
    lambda name: st.just([f"--{name}"]) if name in FLAGS else WORDS.map(lambda word: [f"--{name}", word])
)
ARGUMENTS = st.lists(ARGUMENT | ARGUMENT | ARGUMENT | WORDS.map(lambda word: [word]), max_size=4).map(
    lambda parts: [word for part in parts for word in part]
)


@pytest.mark.parametrize("task", SCRIPTS)
@generated
@given(arguments=ARGUMENTS)
def test_options(tmp_path, monkeypatch, task, arguments):
    """Parsed, and the settings made from them."""
    monkeypatch.chdir(tmp_path)
    with refused():
        options = SCRIPTS[task].parse_options(arguments)
        from_options(TrainConfig, options)
        from_options(LoRAConfig, options, prefix="lora_")
        if task == "sonnets":
            check_sampling(options.temperature, options.top_p, options.top_k, options.max_new_tokens)


def changed(known):
    """A JSON object with some settings replaced, or anything at all."""
    some = st.dictionaries(st.sampled_from(sorted(known)), JSON, max_size=3).map(lambda new: known | new)
    broken = st.sampled_from(["", "{", "[" * 100_000, '{"a":' * 100_000, "NaN", "1e999", "\ufeff{}"])
    return (some | some | JSON).map(json.dumps) | broken


CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 256, "vocab_size": 300,
          "activation_function": "gelu_new", "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "n_inner": None,
          "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "scale_attn_weights": True}  # fmt: skip


@generated
@given(text=changed(CONFIG))
def test_configurations_of_models(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with refused("config.json"):
        assert read_config(tmp_path).feed_forward_width > 0


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 16.0, "lora_dropout": 0.05, "bias": "none", "target_modules": [],
           "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "use_dora": False}  # fmt: skip
NOTE = {"targets": ["q_proj", "v_proj", "interm_dense"], "base_sha256": "0"}


@generated
@given(text=changed(ADAPTER), note=changed(NOTE) | st.none())
def test_adapters(kit, tmp_path, text, note):
    """adapter_config.json and the note in the safetensors' metadata."""
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    metadata = None if note is None else {"adapter": note.encode("utf-8", "replace").decode()}
    save_file(load_file(kit / "adapter" / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors",
              metadata=metadata)  # fmt: skip
    with refused():
        load_adapter(GPT2Model.from_pretrained(kit / "model"), tmp_path)


HEAD = {"pooling": "multihead", "pair_encoding": "joint", "heads": 5, "parameter_penalty": 0.01}


@generated
@given(text=changed(HEAD))
def test_heads(kit, text):
    """The settings in head.safetensors' metadata."""
    path = kit / "judge" / "head.safetensors"
    save_file(load_file(path), path, metadata={"settings": text.encode("utf-8", "replace").decode()})
    with refused():
        ParaphraseGPT.from_pretrained(kit / "judge")
