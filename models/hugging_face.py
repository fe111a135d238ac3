"""Hugging Face folders: transformers reads them, one table maps the parameter names.

transformers is not strict: it loads other architectures, untied heads and NaN silently and
initializes missing layers randomly. The checks here turn each of these into an InputError.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import textwrap
from pathlib import Path

import torch
from safetensors.torch import save_file

from config import BUNDLED_MODEL, PRESETS, ROOT, GPT2Config, InputError
from files import read_json, write_json

HUB_ORGANIZATION = "openai-community/"  # the hub's `gpt2` redirects here
CONV1D_LAYERS = {  # Hugging Face's Conv1D layers in h.N and ours; c_attn fuses query, key and value
    "attn.c_attn": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.c_proj": ("attention.out_proj",),
    "mlp.c_fc": ("interm_dense",),
    "mlp.c_proj": ("out_dense",),
}
NORMS = {"ln_1": ("attention_norm",), "ln_2": ("feed_forward_norm",)}
MASK_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # in the published gpt2
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")  # config.json and an index may give any name
TOKENIZER_PATTERNS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
COPIED_PATTERNS = (  # saved with a model as they are
    *TOKENIZER_PATTERNS,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)
MODEL_PATTERNS = ("config.json", *COPIED_PATTERNS, *WEIGHT_PATTERNS)
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


@contextlib.contextmanager
def quiet_transformers(failure, give_reason=False):
    """Silence transformers within the block; its errors become an InputError, `failure`."""
    from transformers.utils import logging  # slow to import

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # many types; some messages advise to load a pickle without checks
        reason = textwrap.shorten(str(error), 200) if give_reason else type(error).__name__
        raise InputError(f"{failure} ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def matching_files(folder, patterns):
    """The names of the folder's files that match one of the patterns."""
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    return sorted({path.name for path in paths if path.is_file()})


def find_model(model):
    """The local folder of a size name or path. Models of the hub come from its cache or download.

    Raises InputError if there is no such model.
    """
    if str(model) == "tiny":
        return BUNDLED_MODEL
    name = str(model).removeprefix(HUB_ORGANIZATION)
    folder = Path(model)
    if os.path.isfile(folder / "adapter_config.json"):
        raise InputError(f"{model} is a LoRA adapter, not a model: name its base model here")
    if os.path.isfile(folder / "config.json"):
        return folder
    if name not in PRESETS:
        sizes = ", ".join(PRESETS)
        raise InputError(f"{model} is neither one of {sizes} nor a folder that holds a config.json")
    return find_on_hub(name)


def find_on_hub(name):
    """The cached snapshot of a GPT-2 of the hub, which is downloaded if necessary."""
    from huggingface_hub import model_info, snapshot_download  # slow to import

    needed = (["config.json"], WEIGHT_PATTERNS, TOKENIZER_PATTERNS)
    repository = HUB_ORGANIZATION + name
    for cached in (name, repository):
        with contextlib.suppress(Exception):  # not in the cache
            folder = Path(snapshot_download(cached, local_files_only=True))
            if all(matching_files(folder, patterns) for patterns in needed):
                return folder
    try:
        # A failing download retries for minutes. One request tells whether the hub can be reached.
        model_info(repository, timeout=10)
        files = ["config.json", "model.safetensors", *COPIED_PATTERNS]
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # the errors of the hub client, its HTTP library and the system
        raise InputError(
            f"{name} is not in the local cache and cannot be downloaded ({type(error).__name__}). "
            "Use --model_size tiny, or the folder of a model, or set HF_HOME to a cache that has it"
        ) from error


def read_config(folder):
    """The configuration and the raw contents of config.json.

    Raises InputError for settings that this GPT-2 does not implement. If `eos_token_id` is a list,
    its first token is used; null or out of the vocabulary counts as not set.
    """
    import transformers  # slow to import

    path = folder / "config.json"
    with quiet_transformers(f"{path} is not the configuration of a GPT-2", give_reason=True):
        raw = read_json(path)
        theirs = transformers.GPT2Config.from_dict(raw)
        eos = theirs.eos_token_id
        if isinstance(eos, list):
            eos = eos[0] if eos else None
        theirs.eos_token_id = eos if eos in range(theirs.vocab_size) else None
        names = [entry.name for entry in dataclasses.fields(GPT2Config)]
        config = GPT2Config(**{name: getattr(theirs, name) for name in names})
    supported = SUPPORTED | {"n_inner": (None, config.feed_forward_width)}
    for name, values in supported.items():
        value = raw.get(name, values[0])
        if value not in values:
            raise InputError(
                f"{path} sets {name} to {value!r}; this GPT-2 implements {values[-1]!r}"
            )
    return config, raw


def load_weights(folder, config):
    """The weights of a folder, read by transformers, as our state dict in float32.

    Raises InputError for files that cannot be read, missing, unexpected or misshapen tensors, an
    output head that differs from the embedding, and weights that are not finite.
    """
    from transformers import GPT2LMHeadModel  # slow to import

    class StrictGPT2(GPT2LMHeadModel):
        def post_init(self):
            super().post_init()
            self._keys_to_ignore_on_load_unexpected = set()  # they hide more than mask buffers

    files = (
        ", ".join(matching_files(folder, WEIGHT_PATTERNS)[:3])
        or "no weights, such as model.safetensors"
    )
    with quiet_transformers(f"{folder} ({files}): the weights cannot be read; copy them again"):
        model, info = StrictGPT2.from_pretrained(
            folder,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise InputError(
            f"{folder}: {name} has shape {tuple(found)}; config.json requires {tuple(expected)}"
        )
    unexpected = [name for name in info["unexpected_keys"] if not MASK_BUFFER.fullmatch(name)]
    for problem, names in (("lack", info["missing_keys"]), ("have an unknown", unexpected)):
        if names:
            raise InputError(f"{folder}: the weights {problem} {', '.join(sorted(names)[:4])}")
    if not torch.equal(model.lm_head.weight, model.transformer.wte.weight):
        raise InputError(f"{folder}: lm_head.weight differs from wte.weight; the head must be tied")
    tensors = model.transformer.state_dict()
    del model  # so that each tensor is freed once it is converted
    return from_hugging_face(tensors, config, folder)


def from_hugging_face(tensors, config, folder):
    """Convert a GPT2Model's tensors to our state dict; raises InputError if one is not finite."""
    state = {}
    for theirs, ours in tensor_names(config.n_layer).items():
        tensor = tensors.pop(theirs)
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: {theirs} is not finite; train or download the model again")
        parts = split_conv1d(tensor, len(ours)) if ".c_" in theirs else [tensor]
        for name, part in zip(ours, parts, strict=True):
            state[name] = part.clone(memory_format=torch.contiguous_format)
    return state


def tensor_names(n_layer):
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


def split_conv1d(tensor, parts):
    """A Conv1D weight (in, parts * out) or bias as weights (out, in) or biases of nn.Linear."""
    return [part.t() for part in tensor.chunk(parts, dim=-1)]  # t() leaves a bias as it is


def join_conv1d(tensors):
    """The inverse of split_conv1d."""
    return torch.cat([part.t() for part in tensors], dim=-1)


def load_tokenizer(folder):
    """The transformers tokenizer of a model folder.

    Raises InputError if it has none: AutoTokenizer would silently return an empty one.
    """
    from transformers import AutoTokenizer  # slow to import

    if folder is None or not matching_files(folder, TOKENIZER_PATTERNS):
        expected = "tokenizer.json, or vocab.json and merges.txt"
        raise InputError(f"{folder} has no tokenizer: expected {expected}")
    with quiet_transformers(f"{folder}: the tokenizer cannot be read; copy its files again"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def save_model(gpt, folder, dtype):
    """Write a GPT2Model as a folder that GPT2LMHeadModel and AutoTokenizer read.

    config.json and the files of the tokenizer and of generation stay as they were loaded.
    """
    settings = {"model_type": "gpt2", **(gpt.raw_config or dataclasses.asdict(gpt.config))}
    for name in ("torch_dtype", "transformers_weights"):  # older name of dtype; other file name
        settings.pop(name, None)
    settings["architectures"] = ["GPT2LMHeadModel"]
    settings["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", settings)
    state = gpt.state_dict()
    tensors = {}
    for theirs, ours in tensor_names(gpt.config.n_layer).items():
        parts = [state[name].to("cpu", dtype) for name in ours]
        tensor = join_conv1d(parts) if ".c_" in theirs else parts[0]
        tensors[f"transformer.{theirs}"] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in gpt.copied_files:
        with contextlib.suppress(shutil.SameFileError):
            shutil.copyfile(gpt.folder / name, folder / name)


def portable_name(model, folder):
    """How others load this model: the hub's name, or the path, relative if in the repository."""
    if str(model) != "tiny" and folder != Path(model):
        return str(model)
    folder = folder.resolve()
    return folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else str(folder)
