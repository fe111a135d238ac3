"""Hugging Face folders: transformers reads and writes them, one table maps the parameter names.

transformers is not strict: it loads other architectures, untied heads and NaN silently and
initializes missing layers randomly. The checks here turn each of these into an InputError.
"""

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub import model_info, snapshot_download
from transformers.utils import logging

from config import ROOT, GPT2Config, InputError
from models.gpt2 import GPT2Model

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
OTHER_PARTS = {
    "wte": ("token_embedding",),
    "wpe": ("position_embedding",),
    "ln_1": ("attention_norm",),
    "ln_2": ("feed_forward_norm",),
    "ln_f": ("final_norm",),
}
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
    """Reports every unexpected tensor but the causal masks of the published gpt2."""

    def post_init(self) -> None:
        super().post_init()
        self._keys_to_ignore_on_load_unexpected = {r"h\.\d+\.attn\.(masked_)?bias$"}


def load(model: str | Path) -> GPT2Model:
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
    with torch.device("meta"):  # no random initialization
        gpt = GPT2Model(config)
    gpt.tokenizer, gpt.settings = tokenizer, (theirs.config, theirs.generation_config)
    inside = folder.resolve().as_posix().removeprefix(f"{ROOT.as_posix()}/")
    gpt.name = inside if folder in (BUNDLED_MODEL, Path(model)) else str(model)
    tensors, state = theirs.transformer.state_dict(), {}
    del theirs  # so that each tensor is freed once it is converted
    for name in list(tensors):
        ours = our_names(name)
        for our_name, part in zip(ours, tensors.pop(name).chunk(len(ours), -1), strict=True):
            part = part.t() if ".c_" in name else part  # Conv1D holds (in, out)
            state[our_name] = part.clone(memory_format=torch.contiguous_format)
    gpt.load_state_dict(state, assign=True)
    return gpt.eval()


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
    advice = (
        "use --model_size tiny, or the folder of a model, or set HF_HOME to a cache that has it"
    )
    with input_errors(f"{name} is not in the local cache and cannot be downloaded; {advice}"):
        # A failing download retries for minutes. One request tells whether the hub can be reached.
        model_info(HUB_ORGANIZATION + name, timeout=10)
        return Path(snapshot_download(HUB_ORGANIZATION + name, allow_patterns=files))


@contextlib.contextmanager
def input_errors(failure: str) -> Iterator[None]:
    """Turn the errors of other libraries, which have many types, into an InputError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
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
        value, ours = raw.get(name, values[0]), values[-1]
        if value not in values:
            raise InputError(f"{path} sets {name} to {value!r}; this GPT-2 implements {ours!r}")
    return config


def read_weights(folder: Path) -> StrictGPT2:
    """transformers' model of a folder, in float32; raises InputError, naming wrong tensors."""
    with input_errors(f"{folder}: the weights cannot be read; copy them again"):
        model, info = StrictGPT2.from_pretrained(
            folder, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    problems = [
        f"{name} has the shape {tuple(found)}, config.json requires {tuple(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} is unknown" for name in sorted(info["unexpected_keys"])]
    state = model.state_dict()
    problems += [f"{name} is not finite" for name in state if not state[name].isfinite().all()]
    if not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"]):
        problems.append("lm_head.weight differs from wte.weight, but the head must be tied")
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems[:3])}; copy the weights again")
    return model


def our_names(theirs: str) -> list[str]:
    """The names of our parameters that a tensor of Hugging Face's GPT2Model holds."""
    layer, part, kind = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(weight|bias)", theirs).groups()
    prefix = "" if layer is None else f"layers.{layer}."
    return [f"{prefix}{ours}.{kind}" for ours in (OTHER_PARTS | CONV1D_LAYERS)[part]]


def save(gpt: GPT2Model, folder: Path) -> None:
    """Write a GPT2Model as a folder that GPT2LMHeadModel and AutoTokenizer read."""
    state, end, tensors = gpt.state_dict(), gpt.config.eos_token_id, {}
    if any(".lora_a." in name for name in state):
        raise InputError("the model has LoRA adapters: call merge_lora, or use save_adapter")
    new = transformers.GPT2Config(**dataclasses.asdict(gpt.config), bos_token_id=end)
    # Without settings, the model was not loaded.
    settings = gpt.settings or (new, transformers.GenerationConfig(eos_token_id=end))
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(settings[0])
    for name in model.transformer.state_dict():
        parts = [state[ours].cpu() for ours in our_names(name)]
        tensors[name] = torch.cat([part.t() if ".c_" in name else part for part in parts], -1)
    model.transformer.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.generation_config = settings[1]
    model.save_pretrained(folder)
    if gpt.tokenizer is not None:
        gpt.tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # safetensors makes files that only the owner reads
        shutil.copymode(folder / "config.json", path)
