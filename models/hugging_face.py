"""Hugging Face folders: one table maps the parameter names, and loading is strict.

transformers loads other architectures, untied heads and NaN silently and initializes missing layers
randomly. Here each of these is an InputError.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from config import ROOT, GPT2Config, InputError
from models.gpt2 import GPT2Model

logging.set_verbosity(logging.CRITICAL)  # errors are reported as InputError
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
# Settings of config.json that must have the default value, which is what this GPT-2 implements
FIXED_SETTINGS = """
    model_type activation_function tie_word_embeddings scale_attn_weights
    scale_attn_by_inverse_layer_idx add_cross_attention quantization_config
""".split()
# In the order of transformers; the first that exists is read, with all of its shards
WEIGHTS = "model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"
CAUSAL_MASKS = ".attn.bias", ".attn.masked_bias"  # buffers of the published gpt2


def load(model: str | Path) -> GPT2Model:
    """Load a size name or folder; raises InputError for a model that cannot be used."""
    folder = find_model(model)
    with input_errors(f"{folder} cannot be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if len(tokenizer) < 2:  # what transformers makes of a folder without a tokenizer
            raise InputError("there is no tokenizer: expected tokenizer.json, or vocab.json")
        theirs = read_config(folder)
        settings = [theirs]
        if (folder / "generation_config.json").is_file():
            settings.append(transformers.GenerationConfig.from_pretrained(folder))
        shape = theirs.to_dict() | {"eos_token_id": end_of_text(theirs, tokenizer)}
        config = GPT2Config(**{name: shape[name] for name in GPT2Config.__annotations__})
        with torch.device("meta"):  # no random initialization
            gpt = GPT2Model(config)
        gpt.load_state_dict(read_weights(folder, config.n_layer), assign=True)
    inside = folder.resolve().as_posix().removeprefix(f"{ROOT.as_posix()}/")
    gpt.name = inside if folder in (BUNDLED_MODEL, Path(model)) else str(model)
    gpt.tokenizer, gpt.settings = tokenizer, settings
    return gpt.eval()


def find_model(model: str | Path) -> Path:
    """The local folder of a size name or path. The hub's models are downloaded or in its cache.

    Raises InputError if there is no such model.
    """
    if str(model) == "tiny":
        return BUNDLED_MODEL
    if (Path(model) / "config.json").is_file():
        return Path(model)
    if str(model).removeprefix(HUB_ORGANIZATION) not in SIZES:
        raise InputError(f"{model} is neither one of tiny, {', '.join(SIZES)} nor a model folder")
    ways = "use --model_size tiny or a model's folder, or set HF_HOME to a cache that has it"
    with input_errors(f"{model} is not in the local cache and cannot be downloaded; {ways}"):
        files = ["*.json", "merges.txt", "model.safetensors"]
        return Path(snapshot_download(str(model), allow_patterns=files))


@contextlib.contextmanager
def input_errors(failure: str) -> Iterator[None]:
    """Turn the errors of other libraries, which have many types, into an InputError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{failure} ({type(error).__name__}: {reason})") from error


def read_config(folder: Path) -> transformers.GPT2Config:
    """The config.json of a folder; raises InputError for settings that are not implemented."""
    config = transformers.AutoConfig.from_pretrained(folder)
    given, implemented = config.to_dict(), transformers.GPT2Config().to_dict()
    for name in FIXED_SETTINGS:
        if given.get(name) != implemented.get(name):
            values = f"{given.get(name)!r}, not {implemented.get(name)!r}"
            raise InputError(f"config.json sets {name} to {values}")
    config.architectures, config.dtype = ["GPT2LMHeadModel"], torch.float32  # as we save it
    return config


def end_of_text(config: transformers.GPT2Config, tokenizer: Any) -> int:
    """The first end of text in config.json, or else the tokenizer's, that has an embedding.

    Raises InputError if there is none.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    candidates = [*ends, tokenizer.eos_token_id]
    for end in candidates:
        if end in range(config.vocab_size):
            return end
    raise InputError("config.json and tokenizer name no end of text: set eos_token_id")


def read_weights(folder: Path, n_layer: int) -> dict[str, Tensor]:
    """Our parameters in float32; raises InputError, naming wrong tensors."""
    files, tensors = [sorted(folder.glob(pattern)) for pattern in WEIGHTS], {}
    for path in next(filter(None, files), []):
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        for name, tensor in stored.items():
            tensors[name.removeprefix("transformer.")] = tensor  # the published gpt2 has no prefix
    names, head = tensor_names(n_layer), tensors.pop("lm_head.weight", None)
    wrong = [name for name in names.keys() ^ tensors.keys() if not name.endswith(CAUSAL_MASKS)]
    if wrong:
        raise InputError(f"missing or unknown: {', '.join(sorted(wrong)[:3])}; copy them again")
    if head is not None and not torch.equal(head, tensors["wte.weight"]):
        raise InputError("lm_head.weight differs from wte.weight, but the head must be tied")
    state = {}
    for theirs, ours in names.items():
        tensor = tensors.pop(theirs).float()  # so that it is freed once it is converted
        if not tensor.isfinite().all():
            raise InputError(f"{theirs} is not finite")
        for name, part in zip(ours, tensor.chunk(len(ours), -1), strict=True):
            part = part.t() if ".c_" in theirs else part  # Conv1D holds (in, out)
            state[name] = part.clone(memory_format=torch.contiguous_format)
    return state


def tensor_names(n_layer: int) -> dict[str, list[str]]:
    """For each tensor of Hugging Face's GPT2Model, the names of ours that it holds."""
    names = {"wte.weight": ["token_embedding.weight"], "wpe.weight": ["position_embedding.weight"]}
    for kind in ("weight", "bias"):
        names[f"ln_f.{kind}"] = [f"final_norm.{kind}"]
        for layer in range(n_layer):
            for theirs, ours in (CONV1D_LAYERS | NORMS).items():
                parts = [f"layers.{layer}.{part}.{kind}" for part in ours]
                names[f"h.{layer}.{theirs}.{kind}"] = parts
    return names


def save(gpt: GPT2Model, folder: Path) -> None:
    """Write a GPT2Model as a folder that GPT2LMHeadModel and AutoTokenizer read."""
    state, end, tensors = gpt.state_dict(), gpt.config.eos_token_id, {}
    if any(".lora_a." in name for name in state):
        raise InputError("the model has LoRA adapters: call merge_lora, or use save_adapter")
    for theirs, ours in tensor_names(gpt.config.n_layer).items():
        tensor = torch.cat([state[name].cpu() for name in ours])
        tensors[f"transformer.{theirs}"] = tensor.t().contiguous() if ".c_" in theirs else tensor
    # A model that was not loaded has no settings.
    new = transformers.GPT2Config(**dataclasses.asdict(gpt.config), bos_token_id=end)
    for settings in gpt.settings or [new]:
        settings.save_pretrained(folder)
    if gpt.tokenizer is not None:
        gpt.tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
