"""LoRA adapters on disk, in PEFT's format, and batches that mix several adapters.

PEFT sees GPT-2's fused c_attn as one layer. If n of q, k and v are adapted with rank r, the fused
A stacks their A matrices and the fused B is block-diagonal, with rank n * r and alpha n * alpha.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from config import LINEARS, InputError, LoRAConfig
from files import read_json, write_json
from lora import apply_lora, backbone, base_sha256, lora_layers
from models.hugging_face import CONV1D_LAYERS

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of PEFT that are read here or do not change the result. The tensors say which layers are
# adapted, so patterns and exclusions of names need not be interpreted.
KNOWN_SETTINGS = """
    peft_type r lora_alpha lora_dropout target_modules exclude_modules task_type peft_version
    auto_mapping base_model_name_or_path revision inference_mode fan_in_fan_out megatron_core
    qalora_group_size runtime_config ensure_weight_tying
""".split()
# Values of other settings that do not change the result, as nothing that is empty or false does
HARMLESS = [("bias", "none"), ("init_lora_weights", True), ("init_lora_weights", "gaussian")]


def save_adapter(module, folder):
    """Write the model's LoRA matrices as a PEFT adapter; raises InputError if it has none."""
    gpt = backbone(module)
    layers = lora_layers(gpt)
    if not layers:
        raise InputError("the model has no LoRA adapters to save")
    config = gpt.lora_config
    tensors, counts = {}, {}  # counts: how many linears of each fused layer are adapted
    for layer in range(gpt.config.n_layer):
        for theirs, ours in CONV1D_LAYERS.items():
            parts = [layers.get(f"layers.{layer}.{name}") for name in ours]
            present = [part for part in parts if part is not None]
            if not present:
                continue
            counts[theirs] = len(present)
            absent = present[0].lora_b.weight[:, :0]  # rows of B without a column
            b = [absent if part is None else part.lora_b.weight for part in parts]
            name = f"{PREFIX}transformer.h.{layer}.{theirs}.lora"
            tensors[f"{name}_A.weight"] = torch.cat([part.lora_a.weight for part in present])
            tensors[f"{name}_B.weight"] = torch.block_diag(*b)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": gpt.name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": True,
        "target_modules": list(counts),
        "rank_pattern": {name: count * config.rank for name, count in counts.items()},
        "alpha_pattern": {name: count * config.alpha for name, count in counts.items()},
    }
    folder = Path(folder)
    write_json(folder / CONFIG_FILE, settings)
    note = json.dumps({"targets": config.targets, "base_sha256": base_sha256(gpt)})
    # A second entry would make the file differ from run to run: their order is not fixed.
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"adapter": note})


def load_adapter(module, folder):
    """Load an adapter of this project or of PEFT, replacing present ones; returns `module`.

    Raises InputError for unreadable files, unsupported settings, or an adapter of another base.
    """
    gpt = backbone(module)
    config, matrices = read_adapter(gpt, folder, base_sha256(gpt))
    for name, layer in lora_layers(gpt).items():
        gpt.set_submodule(name, layer.base)
    apply_lora(gpt, config)
    with torch.no_grad():
        for name, layer in lora_layers(gpt).items():
            a, b = matrices[name]
            layer.lora_a.weight.copy_(a)
            layer.lora_b.weight.copy_(b)
    return module


class MixedLoRALinear(nn.Module):
    """A linear layer with the updates of several adapters; each sequence uses its own or none.

    All A are stacked and all scaled B concatenated, so any number of adapters takes two matrix
    multiplications. `active` (B, R) zeroes the columns of the other adapters between them.
    """

    def __init__(self, base, a, b, active):
        super().__init__()
        self.base, self.a, self.b, self.active = base, a, b, active

    def forward(self, x):
        """(B, T, in) -> (B, T, out)."""
        return self.base(x) + (x @ self.a.T * self.active[:, None]) @ self.b.T


@contextlib.contextmanager
def mixed_adapters(module, folders):
    """Within the block, sequence i of a batch uses the adapter in folders[i], or none if None.

    If `folders` is None, the model stays as it is. Adapters may differ in rank, alpha and targets.
    Raises InputError as load_adapter does, and if the model already has adapters.
    """
    if folders is None:
        yield
        return
    gpt = backbone(module)
    if lora_layers(gpt):
        raise InputError("the model already has a LoRA adapter: load the base model again")
    device, base = gpt.token_embedding.weight.device, base_sha256(gpt)
    parts = {}  # name of a linear layer -> A, B and active columns of each adapter
    for distinct in dict.fromkeys(folder for folder in folders if folder is not None):
        config, matrices = read_adapter(gpt, distinct, base)
        used = torch.tensor([[float(folder == distinct)] for folder in folders], device=device)
        for name, (a, b) in matrices.items():
            b = b.to(device) * (config.alpha / config.rank)
            parts.setdefault(name, []).append((a.to(device), b, used.expand(-1, config.rank)))
    linears = {name: gpt.get_submodule(name) for name in parts}
    try:
        for name, linear in linears.items():
            a, b, active = zip(*parts[name], strict=True)
            mixed = MixedLoRALinear(linear, torch.cat(a), torch.cat(b, 1), torch.cat(active, 1))
            gpt.set_submodule(name, mixed)
        yield
    finally:
        for name, linear in linears.items():
            gpt.set_submodule(name, linear)


def select_rows(module, indices):
    """Within mixed_adapters, keep only these sequences of the batch."""
    for part in backbone(module).modules():
        if isinstance(part, MixedLoRALinear):
            part.active = part.active[indices]


def read_adapter(gpt, folder, base):
    """An adapter's LoRAConfig, and A and B per linear layer; `base` is the GPT-2's base_sha256."""
    config, tensors, note = read_files(Path(folder))
    targets = LINEARS
    if note:
        targets, expected = note["targets"], note["base_sha256"]
        if base != expected:
            raise InputError(
                f"{folder} was trained on another base (SHA-256 {expected[:12]}..., not "
                f"{base[:12]}...): name that base with --model_size"
            )
    rank = config.rank
    matrices = {}
    for layer in range(gpt.config.n_layer):
        for theirs, ours in CONV1D_LAYERS.items():
            pair = [f"h.{layer}.{theirs}.lora_{side}.weight" for side in "AB"]
            if not tensors.keys() >= set(pair):
                continue
            a, b = (tensors.pop(name) for name in pair)
            present = [name for name in ours if name.rpartition(".")[2] in targets]
            fused_rank = rank * len(present) if note else rank  # PEFT: q, k and v share A
            first = f"layers.{layer}.{ours[0]}"
            linear = gpt.get_submodule(first)
            width_out, width_in = getattr(linear, "base", linear).weight.shape
            expected = (fused_rank, width_in), (len(ours) * width_out, fused_rank)
            if (a.shape, b.shape) != expected:
                shapes = tuple(a.shape), tuple(b.shape)
                raise InputError(
                    f"{folder} is for another model: {first} needs {expected}, not {shapes}"
                )
            for index, name in enumerate(present):
                rows = slice(index * rank, (index + 1) * rank) if note else slice(None)
                block = b.tensor_split(len(ours))[ours.index(name)]
                matrices[f"layers.{layer}.{name}"] = a[rows], block[:, rows]
    if tensors or not matrices:
        names = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise InputError(f"{folder} is incomplete or for another model: it adapts {names}")
    adapted = {name.rpartition(".")[2] for name in matrices}
    if len(matrices) != len(adapted) * gpt.config.n_layer:
        names = ", ".join(sorted(adapted))
        raise InputError(f"{folder} adapts {names} in some layers only, not in all")
    return dataclasses.replace(config, targets=tuple(adapted)), matrices


def read_files(folder):
    """The LoRAConfig, the tensors by Hugging Face's names, and the note of this project if any.

    The targets of the configuration are not read.
    """
    path = folder / CONFIG_FILE
    try:
        settings = dict(read_json(path))
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            note = json.loads((file.metadata() or {}).get("adapter", "null"))
            if note:
                note = {"targets": list(note["targets"]), "base_sha256": str(note["base_sha256"])}
            tensors = {}
            for name in file.keys():  # noqa: SIM118 (not a dict)
                plain = name.removeprefix(PREFIX).removeprefix("transformer.")
                tensors[plain] = file.get_tensor(name).float()
    except Exception as error:  # of the system, JSON, safetensors or the note
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{folder} is not a readable LoRA adapter ({reason})") from error
    known = [*KNOWN_SETTINGS, "rank_pattern", "alpha_pattern"] if note else KNOWN_SETTINGS
    rejected = [
        name
        for name, value in settings.items()
        if value and name not in known and (name, value) not in HARMLESS
    ]
    if rejected:
        names = ", ".join(rejected)
        raise InputError(f"{path} sets {names}, which this LoRA does not implement")
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path} is not of a LoRA adapter: its peft_type is not LORA")
    config = LoRAConfig(
        settings.get("r"), settings.get("lora_alpha"), settings.get("lora_dropout", 0.0)
    )
    return config, tensors, note
