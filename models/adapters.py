"""LoRA adapters on disk, in PEFT's format.

PEFT sees GPT-2's fused c_attn as one layer. If n of q, k and v are adapted with rank r, the fused
A stacks their A matrices and the fused B is block-diagonal. Every layer of the file is padded with
zeros to the largest rank n r, and lora_alpha is n alpha, so that all have one rank and scaling.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import ROOT, InputError, LoRAConfig
from lora import apply_lora, backbone, lora_layers
from models.gpt2 import GPT2Model
from models.hugging_face import CONV1D_LAYERS, input_errors

PREFIX = r"^base_model\.model\.(transformer\.)?"  # of PEFT's names; a model without head has none
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT that are read here or do not change the result. The tensors say which layers are
# adapted and with what rank, so patterns and exclusions of names need not be interpreted.
KNOWN_SETTINGS = """
    r lora_alpha lora_dropout rank_pattern alpha_pattern target_modules exclude_modules
    task_type peft_version auto_mapping base_model_name_or_path revision inference_mode
    fan_in_fan_out megatron_core qalora_group_size runtime_config ensure_weight_tying
""".split()
# Values of other settings that do not change the result; empty or false values do not, either
HARMLESS = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian"]}
Matrices = dict[str, tuple[Tensor, Tensor]]  # A (R, in) and B (out, R) by name of a linear layer


def save_adapter(module: nn.Module, folder: str | Path) -> None:
    """Write the model's LoRA matrices as a PEFT adapter; raises InputError if it has none."""
    gpt, folder = backbone(module), Path(folder)
    layers = lora_layers(gpt)
    if not layers:
        raise InputError("the model has no LoRA adapters to save")
    config = next(iter(layers.values())).config
    counts, tensors = {}, {}  # numbers of adapted linears by Hugging Face's name of the layer
    for theirs, ours in CONV1D_LAYERS.items():
        counts[theirs] = sum(f"layers.0.{name}" in layers for name in ours)
    adapted = [theirs for theirs, count in counts.items() if count]
    rank = config.rank * max(counts.values())
    for layer in range(gpt.config.n_layer):
        for theirs in adapted:
            parts = [layers.get(f"layers.{layer}.{name}") for name in CONV1D_LAYERS[theirs]]
            present = [part for part in parts if part is not None]
            empty = present[0].lora_b.weight[:, :0]  # (out, 0)
            a = torch.cat([part.lora_a.weight for part in present])
            b = torch.block_diag(*(empty if part is None else part.lora_b.weight for part in parts))
            name = f"base_model.model.transformer.h.{layer}.{theirs}.lora"
            tensors[f"{name}_A.weight"], tensors[f"{name}_B.weight"] = pad_rank(a, b, rank)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    settings |= {"base_model_name_or_path": gpt.name, "target_modules": adapted, "r": rank}
    settings |= {"lora_alpha": config.alpha * rank / config.rank, "lora_dropout": config.dropout}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    note = {"targets": config.targets, "rank": config.rank, "base_sha256": base_sha256(gpt)}
    # A second entry would make the file differ from run to run: their order is not fixed.
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"adapter": json.dumps(note)})


def pad_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) with zeros up to a larger rank."""
    missing = rank - len(a)
    return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()


def load_adapter(module: nn.Module, folder: str | Path) -> nn.Module:
    """Load an adapter of this project or of PEFT, replacing present ones; returns `module`.

    Raises InputError for unreadable files, unsupported settings, or an adapter of another base.
    """
    gpt = backbone(module)
    config, matrices = read_adapter(gpt, Path(folder))
    for name, layer in lora_layers(gpt).items():
        gpt.set_submodule(name, layer.base)
    apply_lora(gpt, config)
    with torch.no_grad():
        for name, layer in lora_layers(gpt).items():
            a, b = matrices[name]
            layer.lora_a.weight.copy_(a)
            layer.lora_b.weight.copy_(b)
    return module


def load_model(folder: str | Path) -> GPT2Model:
    """The model of a size name, of a folder, or of an adapter on the base that it names."""
    if not (Path(folder) / CONFIG_FILE).is_file():
        return GPT2Model.from_pretrained(folder)
    base = read_settings(Path(folder)).get("base_model_name_or_path") or ""
    with input_errors(f"{folder} is an adapter of the base model {base!r}"):
        inside = ROOT / base  # paths inside of the project are relative to it
        gpt = GPT2Model.from_pretrained(inside if (inside / "config.json").is_file() else base)
    return load_adapter(gpt, folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder; raises InputError for settings that we lack."""
    path = folder / CONFIG_FILE
    with input_errors(f"{path} cannot be used"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if value and name not in KNOWN_SETTINGS and value not in HARMLESS.get(name, []):
                raise InputError(f"this LoRA does not implement {name}")
    return settings


def read_adapter(gpt: GPT2Model, folder: Path) -> tuple[LoRAConfig, Matrices]:
    """An adapter's LoRAConfig and matrices; all layers get one rank and scaling.

    Raises InputError as load_adapter does.
    """
    settings, base = read_settings(folder), base_sha256(gpt)
    with input_errors(f"{folder} is not an adapter of this model"):
        tensors, note = read_tensors(folder / WEIGHTS_FILE)
        if note.get("base_sha256", base) != base:
            raise InputError(f"its base {settings['base_model_name_or_path']} has another SHA-256")
        matrices, common = {}, (settings["lora_alpha"] / settings["r"]) or 1.0  # alpha may be 0
        for layer in range(gpt.config.n_layer):
            for theirs, ours in CONV1D_LAYERS.items():
                key = f"h.{layer}.{theirs}"
                if f"{key}.lora_A.weight" in tensors:
                    a, b = (tensors.pop(f"{key}.lora_{part}.weight") for part in "AB")
                    b = b * (alpha_of(key, settings) / len(a) / common)  # 1 without patterns
                    for name, pair in split_fused(a, b, ours, note).items():
                        matrices[f"layers.{layer}.{name}"] = pair
        names = {name.rpartition(".")[2] for name in matrices}
        if tensors or len(matrices) != len(names) * gpt.config.n_layer:
            raise InputError(f"adapted in some layers only, or unknown: {[*tensors, *names][:3]}")
        rank, weights = max(len(a) for a, _ in matrices.values()), base_weights(gpt)
        for name, (a, b) in matrices.items():
            out, width = weights[f"{name}.weight"].shape
            if a.shape != (len(a), width) or b.shape != (out, len(a)):
                raise InputError(f"{name} has A and B of {tuple(a.shape)} and {tuple(b.shape)}")
            matrices[name] = pad_rank(a, b, rank)
        dropout = settings.get("lora_dropout", 0.0)
        return LoRAConfig(rank, common * rank, dropout, tuple(names)), matrices


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by Hugging Face's names, in float32, and the note of save_adapter, if any."""
    with safe_open(path, "pt") as file:
        note = json.loads((file.metadata() or {}).get("adapter", "{}"))
        tensors = {re.sub(PREFIX, "", n): file.get_tensor(n).float() for n in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} is not finite; train the adapter again")
    return tensors, note


def alpha_of(layer: str, settings: dict[str, Any]) -> float:
    """The alpha of one of PEFT's layers; alpha_pattern has regular expressions of name ends."""
    patterns = settings.get("alpha_pattern") or {}
    matching = (patterns[p] for p in patterns if re.fullmatch(rf"(.*\.)?({p})", layer))
    return next(matching, settings["lora_alpha"])


def split_fused(a: Tensor, b: Tensor, names: tuple[str, ...], note: dict[str, Any]) -> Matrices:
    """A and B of each of our linears in a fused layer.

    In PEFT's own files, q, k and v share A. With a note, there is a block per adapted linear.
    """
    blocks = dict(zip(names, b.tensor_split(len(names)), strict=True))
    if not note:
        return {name: (a, block) for name, block in blocks.items()}
    present = [name for name in names if name.rpartition(".")[2] in note["targets"]]
    rank = note.get("rank", len(a) // len(present))  # older files are not padded
    pieces = zip(present, a.split(rank), strict=False)  # the rest is padding
    return {n: (piece, blocks[n].split(rank, 1)[i]) for i, (n, piece) in enumerate(pieces)}


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """A GPT-2's own weights by their names without adapters."""
    named = backbone(module).named_parameters()
    return {n.replace(".base.", "."): weight.detach() for n, weight in named if ".lora_" not in n}


def base_sha256(module: nn.Module) -> str:
    """SHA-256 of a GPT-2's own weights, without adapters; identifies the base."""
    return weights_sha256(base_weights(module))


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 of named weights in float32."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        values = weight.to("cpu", torch.float32).contiguous()
        digest.update(name.encode() + b"\0")
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()
