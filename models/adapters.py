"""LoRA adapters on disk, in PEFT's format.

PEFT sees GPT-2's fused c_attn as one layer. If n of q, k and v are adapted with rank r, the fused
A stacks their A matrices and the fused B is block-diagonal. Every layer of the file is padded with
zeros to this rank n r, with alpha n alpha, so that one rank and one scaling hold for all.
"""

import hashlib
import json
import re
import shutil
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

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT that are read here or do not change the result. The tensors say which layers are
# adapted and with what rank, so patterns and exclusions of names need not be interpreted.
KNOWN_SETTINGS = """
    peft_type r lora_alpha lora_dropout rank_pattern alpha_pattern target_modules exclude_modules
    task_type peft_version auto_mapping base_model_name_or_path revision inference_mode
    fan_in_fan_out megatron_core qalora_group_size runtime_config ensure_weight_tying
""".split()
# Values of other settings that do not change the result, as nothing that is empty or false does
HARMLESS = [("bias", "none"), ("init_lora_weights", True), ("init_lora_weights", "gaussian")]


def save_adapter(module: nn.Module, folder: str | Path) -> None:
    """Write the model's LoRA matrices as a PEFT adapter; raises InputError if it has none."""
    gpt, folder = backbone(module), Path(folder)
    layers = lora_layers(gpt)
    if not layers:
        raise InputError("the model has no LoRA adapters to save")
    config = next(iter(layers.values())).config
    groups = {theirs: targeted(ours, config.targets) for theirs, ours in CONV1D_LAYERS.items()}
    rank = config.rank * max(map(len, groups.values()))
    tensors = {}
    for layer in range(gpt.config.n_layer):
        for theirs in filter(groups.get, groups):
            parts = [layers.get(f"layers.{layer}.{name}") for name in CONV1D_LAYERS[theirs]]
            present = [part for part in parts if part is not None]
            empty = present[0].lora_b.weight[:, :0]  # (out, 0)
            a = torch.cat([part.lora_a.weight for part in present])
            b = torch.block_diag(*(empty if part is None else part.lora_b.weight for part in parts))
            name = f"base_model.model.transformer.h.{layer}.{theirs}.lora"
            tensors[f"{name}_A.weight"], tensors[f"{name}_B.weight"] = pad_rank(a, b, rank)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": gpt.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": config.alpha * rank / config.rank,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": True,
        "target_modules": list(filter(groups.get, groups)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    note = {"targets": config.targets, "rank": config.rank, "base_sha256": base_sha256(gpt)}
    # A second entry would make the file differ from run to run: their order is not fixed.
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"adapter": json.dumps(note)})
    shutil.copymode(path, folder / WEIGHTS_FILE)  # safetensors makes it for the owner alone


def targeted(names: tuple[str, ...], targets: tuple[str, ...]) -> list[str]:
    """Those of our names of linear layers that are targets of LoRA."""
    return [name for name in names if name.rpartition(".")[2] in targets]


def pad_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (R, in) and B (out, R) with zeros up to a larger rank."""
    missing = rank - len(a)
    return F.pad(a, (0, 0, 0, missing)).contiguous(), F.pad(b, (0, missing)).contiguous()


def load_adapter(module: nn.Module, folder: str | Path) -> nn.Module:
    """Load an adapter of this project or of PEFT, replacing present ones; returns `module`.

    Raises InputError for unreadable files, unsupported settings, or an adapter of another base.
    """
    gpt = backbone(module)
    config, matrices = read_adapter(gpt, Path(folder), base_sha256(gpt))
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
    inside = ROOT / base  # paths inside of the project are relative to it
    with input_errors(f"{folder} is an adapter of the base model {base!r}"):
        gpt = GPT2Model.from_pretrained(inside if (inside / "config.json").is_file() else base)
    return load_adapter(gpt, folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder; raises InputError for settings that we lack."""
    path = folder / CONFIG_FILE
    with input_errors(f"{path} is not the settings of a LoRA adapter"):
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
        float(settings["lora_alpha"] / settings["r"])
    rejected = [
        name
        for name, value in settings.items()
        if value and name not in KNOWN_SETTINGS and (name, value) not in HARMLESS
    ]
    if rejected or settings.get("peft_type") != "LORA":
        names = ", ".join(rejected) or "a peft_type other than LORA"
        raise InputError(f"{path} sets {names}, which this LoRA does not implement")
    return settings


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by Hugging Face's names, in float32, and the note of save_adapter, if any."""
    tensors = {}
    with input_errors(f"{path} cannot be read"), safe_open(path, "pt") as file:
        note = dict(json.loads((file.metadata() or {}).get("adapter", "{}")))
        for name in file.keys():  # noqa: SIM118 (not a dict)
            tensor = file.get_tensor(name).float()
            if not tensor.isfinite().all():
                raise InputError(f"{name} is not finite; train the adapter again")
            tensors[re.sub(r"^base_model\.model\.(transformer\.)?", "", name)] = tensor
    return tensors, note


def read_adapter(
    gpt: GPT2Model, folder: Path, base: str
) -> tuple[LoRAConfig, dict[str, tuple[Tensor, Tensor]]]:
    """An adapter's LoRAConfig, and A (R, in) and B (out, R) by the name of the linear layer.

    `base` is the GPT-2's base_sha256. All layers get one rank and scaling.
    """
    settings, (tensors, note) = read_settings(folder), read_tensors(folder / WEIGHTS_FILE)
    expected = str(note.get("base_sha256", base))
    if base != expected:
        name = settings.get("base_model_name_or_path")
        hashes = f"SHA-256 {expected[:12]}..., not {base[:12]}..."
        raise InputError(f"{folder} was trained on another base ({hashes}): load {name}")
    matrices, common = {}, settings["lora_alpha"] / settings["r"] or 1.0
    for layer in range(gpt.config.n_layer):
        for theirs, ours in CONV1D_LAYERS.items():
            pair = [f"h.{layer}.{theirs}.lora_{part}.weight" for part in "AB"]
            a, b = (tensors.get(name, torch.empty(0)) for name in pair)
            if a.ndim == b.ndim == 2 and 0 < len(a) == b.shape[1]:
                del tensors[pair[0]], tensors[pair[1]]  # the check below names the others
                scaling = alpha_of(f"h.{layer}.{theirs}", settings) / len(a)
                b = b * (scaling / common)  # 1 but in PEFT's adapters with patterns
                for name, part_a, part_b in split_fused(a, b, ours, note):
                    matrices[f"layers.{layer}.{name}"] = part_a, part_b
    names = {name.rpartition(".")[2] for name in matrices}
    if tensors or not matrices or len(matrices) != len(names) * gpt.config.n_layer:
        shown = ", ".join([*sorted(tensors), *sorted(names)][:3]) or "nothing"
        raise InputError(f"{folder} is incomplete or for another model: it adapts {shown}")
    rank, weights = max(len(a) for a, _ in matrices.values()), base_weights(gpt)
    for name, (a, b) in matrices.items():
        if (b.shape[0], a.shape[1]) != weights[f"{name}.weight"].shape:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise InputError(f"{folder} is for another model: {name} has A and B of {shapes}")
        matrices[name] = pad_rank(a, b, rank)
    config = LoRAConfig(rank, common * rank, settings.get("lora_dropout", 0.0), tuple(names))
    return config, matrices


def alpha_of(layer: str, settings: dict[str, Any]) -> float:
    """The alpha of one of PEFT's layers; alpha_pattern has regular expressions of name ends."""
    patterns = settings.get("alpha_pattern") or {}
    matching = (patterns[p] for p in patterns if re.fullmatch(rf"(.*\.)?({p})", layer))
    return float(next(matching, settings["lora_alpha"]))


def split_fused(
    a: Tensor, b: Tensor, names: tuple[str, ...], note: dict[str, Any]
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, A and B of each of our linears in a fused layer.

    In PEFT's own files, q, k and v share A. With a note, there is a block per adapted linear.
    """
    blocks = dict(zip(names, b.tensor_split(len(names)), strict=True))
    if not note:
        return [(name, a, block) for name, block in blocks.items()]
    present = targeted(names, note["targets"])
    rank = note.get("rank", len(a) // len(present))  # older files are not padded
    pieces = zip(present, a.split(rank), strict=False)  # the rest is padding
    return [(n, piece, blocks[n].split(rank, 1)[i]) for i, (n, piece) in enumerate(pieces)]


def base_weights(module: nn.Module) -> dict[str, Tensor]:
    """A GPT-2's own weights by their names without adapters."""
    named = backbone(module).named_parameters()
    return {n.replace(".base.", "."): weight.detach() for n, weight in named if ".lora_" not in n}


def base_sha256(module: nn.Module) -> str:
    """SHA-256 of a GPT-2's own weights in float32, without adapters; identifies the base."""
    digest = hashlib.sha256()
    for name, weight in sorted(base_weights(module).items()):
        values = weight.to("cpu", torch.float32).contiguous()
        digest.update(name.encode() + b"\0")
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()
