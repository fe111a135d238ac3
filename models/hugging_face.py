"""Hugging Face folders: transformers reads and writes them, one table maps the parameter names.

transformers is not strict: it loads other architectures, untied heads and NaN silently and
initializes missing layers randomly. The checks here turn each of these into an InputError.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import model_info, snapshot_download
from torch import Tensor
from transformers.utils import logging

from config import ROOT, GPT2Config, InputError

logging.set_verbosity(logging.CRITICAL)  # errors are reported as InputError
logging.disable_progress_bar()
BUNDLED_MODEL = ROOT / "data" / "tiny-gpt2"
SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_ORGANIZATION = "openai-community/"  # the hub's `gpt2` redirects here
CONV1D_LAYERS = {  # Hugging Face's Conv1D layers in h.N and ours; c_attn fuses query, key and value
    "attn.c_attn": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.c_proj": ("attention.out_proj",),
    "mlp.c_fc": ("interm_dense",),
    "mlp.c_proj": ("out_dense",),
}
NORMS = {"ln_1": ("attention_norm",), "ln_2": ("feed_forward_norm",)}
MASK_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # in the published gpt2
# config.json: the values that this GPT-2 implements, the first being transformers' default
SUPPORTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}


class StrictGPT2(transformers.GPT2LMHeadModel):
    """Reports every unexpected tensor; transformers hides more than mask buffers."""

    def post_init(self) -> None:
        super().post_init()
        self._keys_to_ignore_on_load_unexpected = set()


class Loaded(NamedTuple):
    """The contents of a model folder."""

    name: str  # a size name or path, relative if it is inside of the project
    config: GPT2Config
    state: dict[str, Tensor]  # in float32, with our names
    tokenizer: Any
    settings: tuple[Any, Any]  # transformers' configuration and generation configuration


def load(model: str | Path) -> Loaded:
    """Load a size name or folder; raises InputError for a model that cannot be used."""
    folder = find_model(model)
    config = read_config(folder)
    with input_errors(f"{folder}: the tokenizer cannot be read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) < 2:  # what transformers makes of a folder without a tokenizer
        raise InputError(f"{folder} has no tokenizer: expected tokenizer.json, or vocab.json")
    if config.eos_token_id is None and tokenizer.eos_token_id in range(config.vocab_size):
        config = dataclasses.replace(config, eos_token_id=tokenizer.eos_token_id)
    theirs = read_weights(folder)
    settings = theirs.config, theirs.generation_config
    tensors = theirs.transformer.state_dict()
    del theirs  # so that each tensor is freed once it is converted
    name, path = str(model), folder.resolve()
    if path.is_relative_to(ROOT):
        name = path.relative_to(ROOT).as_posix()
    elif folder == Path(model):
        name = str(path)
    return Loaded(name, config, from_hugging_face(tensors, config), tokenizer, settings)


def find_model(model: str | Path) -> Path:
    """The local folder of a size name or path. Models of the hub come from its cache or download.

    Raises InputError if there is no such model.
    """
    if str(model) == "tiny":
        return BUNDLED_MODEL
    folder, name = Path(model), str(model).removeprefix(HUB_ORGANIZATION)
    if (folder / "config.json").is_file():
        return folder
    if name not in SIZES:
        sizes = ", ".join(("tiny", *SIZES))
        raise InputError(f"{model} is neither one of {sizes} nor a folder with a config.json")
    for cached in (name, HUB_ORGANIZATION + name):
        with contextlib.suppress(Exception):  # not in the cache
            folder = Path(snapshot_download(cached, local_files_only=True))
            if list(folder.glob("*model.*")) and list(folder.glob("*vocab.json")):
                return folder
    files = ["*.json", "model.safetensors", "merges.txt"]
    try:
        # A failing download retries for minutes. One request tells whether the hub can be reached.
        model_info(HUB_ORGANIZATION + name, timeout=10)
        return Path(snapshot_download(HUB_ORGANIZATION + name, allow_patterns=files))
    except Exception as error:  # the errors of the hub client, its HTTP library and the system
        raise InputError(
            f"{name} is not in the local cache and cannot be downloaded ({type(error).__name__}). "
            "Use --model_size tiny, or the folder of a model, or set HF_HOME to a cache that has it"
        ) from error


@contextlib.contextmanager
def input_errors(failure: str) -> Iterator[None]:
    """Turn the errors of transformers, which have many types, into an InputError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 120)
        raise InputError(f"{failure} ({type(error).__name__}: {reason})") from error


def read_config(folder: Path) -> GPT2Config:
    """The configuration of a folder; raises InputError for settings that are not implemented."""
    path = folder / "config.json"
    with input_errors(f"{path} is not the configuration of a GPT-2"):
        raw = json.loads(path.read_text(encoding="utf-8"))
        theirs = transformers.GPT2Config.from_dict(raw).to_dict()
        settings = {entry.name: theirs[entry.name] for entry in dataclasses.fields(GPT2Config)}
        tokens = settings["eos_token_id"]
        if isinstance(tokens, list):
            tokens = tokens[0] if tokens else None
        settings["eos_token_id"] = tokens if tokens in range(settings["vocab_size"]) else None
        config = GPT2Config(**settings)
    for name, values in (SUPPORTED | {"n_inner": (None, 4 * config.n_embd)}).items():
        value = raw.get(name, values[0])
        if value not in values:
            raise InputError(
                f"{path} sets {name} to {value!r}; this GPT-2 implements {values[-1]!r}"
            )
    return config


def read_weights(folder: Path) -> StrictGPT2:
    """transformers' model of a folder, in float32; raises InputError, naming wrong tensors."""
    with input_errors(f"{folder}: the weights cannot be read; copy them again"):
        model, info = StrictGPT2.from_pretrained(
            folder,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    problems = [
        f"{name} has the shape {tuple(found)}, config.json requires {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    unexpected = [name for name in info["unexpected_keys"] if not MASK_BUFFER.fullmatch(name)]
    problems += [f"{name} is unknown" for name in sorted(unexpected)]
    state = model.state_dict()
    problems += [f"{name} is not finite" for name in state if not state[name].isfinite().all()]
    if not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
        problems.append("lm_head.weight differs from wte.weight, but the head must be tied")
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems[:3])}; copy the weights again")
    return model


def from_hugging_face(tensors: dict[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """Our state dict of a GPT2Model's tensors: Conv1D holds (in, out), nn.Linear (out, in)."""
    state = {}
    for theirs, ours in tensor_names(config.n_layer).items():
        tensor = tensors.pop(theirs)
        parts = [part.t() for part in tensor.chunk(len(ours), -1)] if ".c_" in theirs else [tensor]
        for name, part in zip(ours, parts, strict=True):
            state[name] = part.clone(memory_format=torch.contiguous_format)
    return state


def tensor_names(n_layer: int) -> dict[str, tuple[str, ...]]:
    """For each tensor name of Hugging Face's GPT2Model, the names of ours that it holds."""
    names = {
        "wte.weight": ("token_embedding.weight",),
        "wpe.weight": ("position_embedding.weight",),
    }
    for kind in ("weight", "bias"):
        names[f"ln_f.{kind}"] = (f"final_norm.{kind}",)
        for layer in range(n_layer):
            for theirs, ours in (NORMS | CONV1D_LAYERS).items():
                parts = tuple(f"layers.{layer}.{part}.{kind}" for part in ours)
                names[f"h.{layer}.{theirs}.{kind}"] = parts
    return names


def save(gpt: Any, folder: Path) -> None:
    """Write a GPT2Model as a folder that GPT2LMHeadModel and AutoTokenizer read."""
    state, tensors = gpt.state_dict(), {}
    if any(".lora_a." in name for name in state):
        raise InputError("the model has LoRA adapters: call merge_lora, or use save_adapter")
    for theirs, ours in tensor_names(gpt.config.n_layer).items():
        parts = [state[name].cpu() for name in ours]
        fused = torch.cat([part.t() for part in parts], -1) if ".c_" in theirs else parts[0]
        tensors[theirs] = fused.contiguous()
    if gpt.settings is None:  # of a model that was not loaded
        end = gpt.config.eos_token_id
        config = transformers.GPT2Config(**dataclasses.asdict(gpt.config), bos_token_id=end)
        generation_config = transformers.GenerationConfig(eos_token_id=end)
    else:
        config, generation_config = gpt.settings
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
        model.generation_config = generation_config
        model.transformer.load_state_dict(tensors, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
    if gpt.tokenizer is not None:
        gpt.tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # safetensors makes files that only the owner reads
        shutil.copymode(folder / "config.json", path)
