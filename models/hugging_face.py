"""Hugging Face folders: where they are, what their files hold, and the same tensors under this project's names."""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import HUGGING_FACE_LINEARS, PRESETS, ROOT, GPT2Config, InputError

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
HUB_FILES = ("config.json", "tokenizer.json", "model.safetensors")

LAYER_NAMES = {"ln_1": ("attention_norm",), "ln_2": ("feed_forward_norm",), **HUGGING_FACE_LINEARS}  # inside h.N
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks, which the published gpt2 holds


def tensor_names(layers: int) -> dict[str, list[str]]:
    """For each tensor that Hugging Face saves, without its `transformer.` prefix, the names of ours that it holds."""
    names = {"wte.weight": ["token_embedding.weight"], "wpe.weight": ["position_embedding.weight"]}
    for kind in ("weight", "bias"):
        names[f"ln_f.{kind}"] = [f"final_norm.{kind}"]
        for layer in range(layers):
            for theirs, ours in LAYER_NAMES.items():
                names[f"h.{layer}.{theirs}.{kind}"] = [f"layers.{layer}.{part}.{kind}" for part in ours]
    return names


def split_conv1d(tensor: Tensor, parts: int) -> list[Tensor]:
    """A Conv1D's weight (in, parts * out) or bias (parts * out,) as that many nn.Linear's, (out, in) or (out,) each."""
    return [part.T if part.ndim == 2 else part for part in tensor.chunk(parts, dim=-1)]


def join_conv1d(tensors: list[Tensor]) -> Tensor:
    """The inverse of split_conv1d."""
    return torch.cat([tensor.T if tensor.ndim == 2 else tensor for tensor in tensors], dim=-1)


def from_hugging_face(tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Hugging Face GPT-2 tensors, in either layout, as a state dict of these shapes in float32.

    Raises InputError for a missing, extra or misshapen tensor, and for a head that differs from the embedding.
    """
    given = {name.removeprefix("transformer."): tensor.float() for name, tensor in tensors.items()}
    given = {name: tensor for name, tensor in given.items() if not MASK_BUFFER.fullmatch(name)}
    head = given.pop("lm_head.weight", None)
    names = tensor_names(1 + max(int(name.split(".")[1]) for name in expected if name.startswith("layers.")))
    for problem, wrong in (("lack", names.keys() - given.keys()), ("hold an unknown", given.keys() - names.keys())):
        if wrong:
            raise InputError(f"the weights {problem} {', '.join(sorted(wrong)[:4])}{' ...' * (len(wrong) > 4)}")
    state = {}
    for theirs, ours in names.items():
        if given[theirs].ndim != (2 if theirs.endswith("weight") and "ln_" not in theirs else 1):
            raise InputError(f"{theirs} has shape {tuple(given[theirs].shape)}, which no GPT-2 has")
        parts = split_conv1d(given[theirs], len(ours)) if ".c_" in theirs else [given[theirs]]
        for name, part in zip(ours, parts, strict=True):
            if part.shape != expected[name]:
                raise InputError(f"{theirs} makes {name} {tuple(part.shape)}; config.json says {tuple(expected[name])}")
            state[name] = part.clone(memory_format=torch.contiguous_format)  # else the whole file stays mapped
    if head is not None and not torch.equal(head, given["wte.weight"]):
        raise InputError("lm_head.weight differs from wte.weight; only a tied output embedding is supported")
    return state


def to_hugging_face(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Our state dict under the names and in the layout that GPT2LMHeadModel saves."""
    tensors = {}
    for theirs, ours in tensor_names(layers).items():
        parts = [state[name] for name in ours]
        tensors[f"transformer.{theirs}"] = (join_conv1d(parts) if ".c_" in theirs else parts[0]).contiguous()
    return tensors


def read_weights(folder: Path, expected: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The folder's model.safetensors as a state dict of these shapes; raises InputError for what can't be used."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path} not found; a model folder holds config.json, model.safetensors and a tokenizer")
    try:
        return from_hugging_face(load_file(path), expected)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{path} can't be read as safetensors ({error}); copy or download it again") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def find_model(model: str | Path) -> Path:
    """The folder of a size name or a path; a GPT-2 of the hub is downloaded, or taken from its cache."""
    if str(model) == "tiny":
        return ROOT / "data" / "tiny-gpt2"
    if str(model) not in PRESETS:
        if not os.path.isfile(Path(model) / "config.json"):
            raise InputError(f"{model} is neither one of {', '.join(PRESETS)} nor a folder that holds a config.json")
        return Path(model)
    # imported here: a run on a local folder needs no hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    for local in (True, False):  # what is in the cache asks no network
        try:
            if not local:  # whether the hub answers: a download's own tries take minutes to give up
                get_hf_file_metadata(hf_hub_url(str(model), HUB_FILES[0]), timeout=10)
            paths = [hf_hub_download(str(model), name, local_files_only=local, etag_timeout=10) for name in HUB_FILES]
            return Path(paths[0]).parent
        except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
            reason = error
    raise InputError(f"{model} is not in the local cache and can't be downloaded ({type(reason).__name__}). Use "
                     "--model_size tiny, or the path of a folder that holds the model, or set HF_HOME to a cache that "
                     "has it") from reason  # fmt: skip


def read_config(folder: Path) -> GPT2Config:
    """Read a Hugging Face config.json; raises InputError for a setting that this GPT-2 does not implement."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shape = {ours: values[theirs] for ours, theirs in (
            ("layers", "n_layer"), ("width", "n_embd"), ("heads", "n_head"), ("vocab_size", "vocab_size"),
            ("positions", "n_positions"))}  # fmt: skip
        dropouts = {values.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
        config = GPT2Config(**shape, dropout=min(dropouts), layer_norm_eps=values.get("layer_norm_epsilon", 1e-5))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, InputError) as error:
        raise InputError(f"{path} is not the configuration of a GPT-2 ({error!r})") from error
    wanted = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, config.feed_forward_width),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, allowed in wanted.items():
        if values.get(name, allowed[0]) not in allowed:
            raise InputError(f"{path} sets {name} to {values[name]!r}; this GPT-2 has {allowed[-1]!r}")
    if len(dropouts) > 1:
        raise InputError(f"{path} sets different dropouts {sorted(dropouts)}; this GPT-2 has one for all three")
    return config


def config_to_json(config: GPT2Config, end_of_text: int) -> dict:
    """The configuration as Hugging Face writes it; the inverse of read_config."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "n_layer": config.layers, "n_embd": config.width, "n_head": config.heads, "n_positions": config.positions,
        "n_ctx": config.positions, "vocab_size": config.vocab_size, "layer_norm_epsilon": config.layer_norm_eps,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "resid_pdrop": config.dropout,
        "bos_token_id": end_of_text, "eos_token_id": end_of_text,
    }  # fmt: skip


def load_tokenizer(folder: Path | None, vocab_size: int):
    """The tokenizer of a model folder; raises InputError where there is none, or one of more tokens than the model."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer  # imported here: a model without text needs none

    try:
        if (folder / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
            tokenizer.add_special_tokens([END_OF_TEXT])
    except Exception as error:  # the library raises bare Exception for a missing or malformed file
        known = "tokenizer.json, or vocab.json and merges.txt"
        raise InputError(f"{folder} holds no tokenizer ({known}) that can be read: {error}") from error
    tokenizer.no_padding()  # a file may hold settings of whoever saved it; ours are the collator's
    tokenizer.no_truncation()
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise InputError(f"{folder}: the tokenizer lacks the token {END_OF_TEXT}")
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise InputError(f"{folder}: the tokenizer's ids reach {largest}, the model has {vocab_size}: it is another's")
    return tokenizer
