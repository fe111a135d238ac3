"""LoRA (Hu et al. 2021, arXiv 2106.09685): train a low-rank update beside frozen weights; adapters in PEFT's format.

apply_lora(model, LoRAConfig(rank=4))     # freeze the model, wrap its targets
save_adapter(model, folder)               # a PEFT adapter; load_adapter(model, folder) takes it back
with mixed_adapters(model, folders): ...  # a batch of which each row goes through an adapter of its own
merge_lora(model)                         # W + (alpha / r) B A, plain linears again
"""

import contextlib
import hashlib
import json
import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import HUGGING_FACE_LINEARS, LINEARS, InputError, LoRAConfig
from modules.dropout import Dropout

PREFIX = "base_model.model.transformer."
# settings of an adapter that are read, or change nothing; any other that is set is refused
KNOWN = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "target_modules", "rank_pattern",
    "alpha_pattern", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


class LoRALinear(nn.Module):
    """A frozen linear with a trainable update: y = W x + b + (alpha / r) B A dropout(x).

    A is Kaiming-uniform and B zero, so the update starts at nothing. Raises InputError for a rank out of range.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        if not 1 <= rank <= min(base.in_features, base.out_features):
            shape = f"{base.out_features} x {base.in_features}"
            raise InputError(f"LoRA's rank {rank} does not fit a {shape} weight: choose at least 1, at most its width")
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.lora_a = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False, **place)
        self.dropout = Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)
        self.train(base.training)  # a model that is evaluated drops nothing, nor does an adapter that it gets

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        update = self.lora_a(self.dropout(rows))
        out = self.base(rows)
        # added in place and scaled on the way: a sum written out would pass over the whole output three times more
        b = self.lora_b.weight.T.contiguous()  # so laid out, its gradient takes half as long
        out.addmm_(update.to(out.dtype), b.to(out.dtype), alpha=self.scaling)
        return out.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base, its weight W + (alpha / r) B A."""
        self.base.weight += self.scaling * (self.lora_b.weight @ self.lora_a.weight).to(self.base.weight.dtype)
        return self.base


def apply_lora(module: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freeze a GPT-2 (a task model's is its `.gpt`) and wrap each linear whose name is a target. Returns `module`.

    Heads and poolings around the GPT-2 stay trainable. Raises InputError where it has adapters already.
    """
    gpt = backbone(module)
    if adapters(gpt):
        raise InputError("this model has LoRA adapters already: merge_lora them first")
    gpt.requires_grad_(False)
    linears = [(name, part) for name, part in gpt.named_modules() if name.rsplit(".", 1)[-1] in config.targets]
    for name, linear in linears:
        gpt.set_submodule(name, LoRALinear(linear, config.rank, config.alpha, config.dropout))
    return module


def backbone(module: nn.Module) -> nn.Module:
    """The GPT-2 itself, of a task model or alone."""
    return getattr(module, "gpt", module)


def adapters(module: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear inside, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LoRALinear)}


def hold_frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep frozen matrices as products want them: cast once to the precision that autocast multiplies in.

    Linears are laid out (in, out) in memory: a product with a few rows, as in decoding, is then about twice as fast on
    a CPU. (What trains must not be: torch's fused AdamW takes equal layouts for granted.) Norms and positions stay in
    float32, and so do the sums. The cast loses digits: to merge, load the base again.
    """
    gpt = backbone(module)
    matrices = [gpt.token_embedding, *(part for part in gpt.modules() if isinstance(part, nn.Linear))]
    frozen = [part for part in matrices if not part.weight.requires_grad]
    if any(part.weight.dtype != dtype for part in frozen):
        gpt.base_sha256 = fingerprint(gpt)
    for part in frozen:
        part.to(dtype)
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(part.weight.detach().T.contiguous().T, requires_grad=False)
    return module


def merge_lora(module: nn.Module) -> nn.Module:
    """Fold every update into its base and put plain linears back; a second call finds nothing to do.

    Raises InputError where hold_frozen has cast the base.
    """
    if hasattr(backbone(module), "base_sha256"):
        raise InputError("the base's weights were cast for training: load the base and the adapter anew, then merge")
    for name, adapter in adapters(module).items():
        module.set_submodule(name, adapter.merged())
    return module


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a GPT-2's own weights in float32: one value however a folder lays them out, adapters left aside."""
    gpt = backbone(module)
    if hasattr(gpt, "base_sha256"):  # of the weights before hold_frozen cast them
        return gpt.base_sha256
    weights = {name.replace(".base.", "."): part for name, part in gpt.named_parameters() if ".lora_" not in name}
    # a large base takes a second, the next adapter on it should not. A version is raised where a tensor is written, but
    # not by torch's fused optimizers: the first rows, of which a step moves at least some, stand in for that
    state = [(id(part), part.is_inference() or part._version, part.detach()[0].sum().item())
             for _, part in sorted(weights.items())]  # fmt: skip
    if getattr(gpt, "_fingerprint", (None, None))[0] != state:
        digest = hashlib.sha256()
        for name, part in sorted(weights.items()):
            digest.update(name.encode() + b"\0")
            digest.update(part.detach().to("cpu", torch.float32).contiguous().numpy())
        gpt._fingerprint = state, digest.hexdigest()
    return gpt._fingerprint[1]


def save_adapter(module: nn.Module, folder: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT reads them.

    PEFT adapts the fused c_attn as one linear. Its A is the stacked A of those of q, k, v that are adapted and its B
    holds their B on the diagonal; its rank and alpha are theirs times their number, so the product is the same.
    Raises InputError for a model without adapters.
    """
    gpt = backbone(module)
    found = adapters(gpt)
    if not found:
        raise InputError("this model has no LoRA adapters to save")
    some = next(iter(found.values()))
    targets = [name for name in LINEARS if any(part.endswith(f".{name}") for part in found)]
    tensors = {}
    for layer in range(gpt.config.layers):
        for theirs, ours in HUGGING_FACE_LINEARS.items():
            parts = {index: found[f"layers.{layer}.{name}"] for index, name in enumerate(ours)
                     if f"layers.{layer}.{name}" in found}  # fmt: skip
            if parts:
                a, b = _join(parts, len(ours), some.rank)
                tensors |= {
                    f"{PREFIX}h.{layer}.{theirs}.lora_A.weight": a,
                    f"{PREFIX}h.{layer}.{theirs}.lora_B.weight": b,
                }
    fused = sum(name.rsplit(".", 1)[-1] in targets for name in HUGGING_FACE_LINEARS["attn.c_attn"])
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": some.rank, "lora_alpha": some.alpha, "lora_dropout": some.dropout.p, "bias": "none",
        "fan_in_fan_out": True,
        "target_modules": [name for name in HUGGING_FACE_LINEARS if f"{PREFIX}h.0.{name}.lora_A.weight" in tensors],
        "rank_pattern": {"c_attn": some.rank * fused} if fused > 1 else {},
        "alpha_pattern": {"c_attn": some.alpha * fused} if fused > 1 else {},
    }  # fmt: skip
    # one entry: the order of several is not fixed, and the same adapter should be the same file
    metadata = {"adapter": json.dumps({"targets": targets, "base_sha256": fingerprint(gpt)})}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8", newline="\n")


def _join(parts: dict[int, LoRALinear], of: int, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of one linear whose output is `of` blocks, from those of the blocks that have an update."""
    width = next(iter(parts.values())).base.out_features
    b = torch.zeros(of * width, rank * len(parts))
    for column, (block, part) in enumerate(parts.items()):
        b[block * width : (block + 1) * width, column * rank : (column + 1) * rank] = part.lora_b.weight.detach()
    return torch.cat([part.lora_a.weight for part in parts.values()]), b


def load_adapter(module: nn.Module, folder: str | Path) -> nn.Module:
    """Put a saved adapter on a GPT-2, in place of adapters that it has; trainable as before. Returns `module`.

    A PEFT adapter of the fused c_attn becomes three, each with a copy of its A and its own rows of B. Raises
    InputError for files that can't be read, settings not implemented here, another base, or another shape.
    """
    gpt = backbone(module)
    config, pairs = _pairs_for(gpt, Path(folder))
    for name, adapter in adapters(gpt).items():
        gpt.set_submodule(name, adapter.base)
    apply_lora(gpt, config)
    with torch.no_grad():
        for name, adapter in adapters(gpt).items():
            adapter.lora_a.weight.copy_(pairs[name][0])
            adapter.lora_b.weight.copy_(pairs[name][1])
    return module


class MixedLoRALinear(nn.Module):
    """A linear with the updates of several adapters, of which each row of a batch has its own or none; it won't train.

    All A are stacked and all B, scaled, stand side by side: two products, however many adapters there are, between
    which a row keeps the columns of its own.
    """

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, columns: Tensor):
        super().__init__()
        self.base, self.a, self.b, self.columns = base, a, b, columns  # (R, in), (out, R), 1 or 0 in (B, R)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return self.base(x) + (x @ self.a.T * self.columns[:, None]) @ self.b.T


@contextlib.contextmanager
def mixed_adapters(module: nn.Module, folders: list[str | Path | None]):
    """Within the block, row i of every batch goes through the adapter in folders[i], or through the base alone (None).

    Adapters may differ in rank, alpha and targets. Raises InputError as load_adapter does, and for a model that has
    an adapter already.
    """
    gpt = backbone(module)
    if adapters(gpt):
        raise InputError("this model has a LoRA adapter already: load the base anew, and name the adapter of each row")
    names = list(dict.fromkeys(folder for folder in folders if folder is not None))
    found = [_pairs_for(gpt, Path(name)) for name in names]
    device = gpt.token_embedding.weight.device
    own = torch.tensor([[folder == name for name in names] for folder in folders], dtype=torch.float32, device=device)
    linears = {name: gpt.get_submodule(name) for _, pairs in found for name in pairs}
    try:
        for name, linear in linears.items():
            parts = [(*pairs[name], config.alpha / config.rank, own[:, [i]].expand(-1, config.rank))
                     for i, (config, pairs) in enumerate(found) if name in pairs]  # fmt: skip
            a = torch.cat([a for a, *_ in parts]).to(device)
            b = torch.cat([scaling * b for _, b, scaling, _ in parts], dim=1).to(device)
            columns = torch.cat([columns for *_, columns in parts], dim=1)
            gpt.set_submodule(name, MixedLoRALinear(linear, a, b, columns))
        yield
    finally:
        for name, linear in linears.items():
            gpt.set_submodule(name, linear)


def keep_rows(module: nn.Module, rows: Tensor) -> None:
    """Of a batch within mixed_adapters, go on with these rows alone."""
    for part in backbone(module).modules():
        if isinstance(part, MixedLoRALinear):
            part.columns = part.columns[rows]


def _pairs_for(gpt: nn.Module, folder: Path) -> tuple[LoRAConfig, dict[str, tuple[Tensor, Tensor]]]:
    """What a folder's adapter is, and A and B for each linear of this GPT-2, by its name; raises as load_adapter."""
    settings, tensors, ours = _read_adapter(folder)
    if ours and ours["base_sha256"] != (actual := fingerprint(gpt)):
        raise InputError(f"{folder} was trained on another base, of SHA-256 {ours['base_sha256'][:12]}..., and not "
                         f"{actual[:12]}...: name the base it was trained on with --model_size")  # fmt: skip
    rank, pairs = settings["r"], {}
    for layer in range(gpt.config.layers):
        for theirs, names in HUGGING_FACE_LINEARS.items():
            a, b = (tensors.pop(f"h.{layer}.{theirs}.lora_{side}.weight", None) for side in "AB")
            if a is None and b is None:
                continue
            if a is None or b is None:
                side = "B" if a is None else "A"
                raise InputError(f"{folder}: h.{layer}.{theirs} has lora_{side} alone; copy it again")
            adapted = [name for name in names if not ours or name.rsplit(".", 1)[-1] in ours["targets"]]
            for column, name in enumerate(adapted):
                block = slice(column * rank, (column + 1) * rank) if ours else slice(None)
                pairs[f"layers.{layer}.{name}"] = (a[block], b.tensor_split(len(names))[names.index(name)][:, block])
    if tensors or not pairs:
        strange = ", ".join(sorted(tensors)[:3]) or "none found"
        raise InputError(f"{folder}: tensors that this GPT-2 has no place for: {strange}; it is for another model")
    plain = {name.replace(".base", ""): part for name, part in gpt.named_modules() if isinstance(part, nn.Linear)}
    for name, (a, b) in pairs.items():
        wanted = (rank, plain[name].in_features), (plain[name].out_features, rank)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise InputError(f"{folder}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, but this model takes "
                             f"{wanted[0]} and {wanted[1]}: it was made for another model")  # fmt: skip
    targets = tuple(name for name in LINEARS if any(pair.endswith(f".{name}") for pair in pairs))
    if len(pairs) != len(targets) * gpt.config.layers:
        raise InputError(f"{folder} adapts {', '.join(targets)} in some layers only; this model adapts all or none")
    return LoRAConfig(rank, settings["lora_alpha"], settings.get("lora_dropout", 0.0), targets), pairs


def _read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor], dict | None]:
    """An adapter's settings, its tensors by Hugging Face's names, and our own note where this project saved it."""
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (config_path, path):
        if not needed.is_file():
            raise InputError(f"{needed} not found; an adapter folder holds {config_path.name} and {path.name}")
    try:
        settings = json.loads(config_path.read_text(encoding="utf-8"))
        with safe_open(path, "pt") as file:
            note = json.loads((file.metadata() or {}).get("adapter", "null"))
            tensors = {re.sub(r"^base_model\.model\.(transformer\.)?", "", name): file.get_tensor(name).float()
                       for name in file.keys()}  # fmt: skip  # noqa: SIM118 (a safetensors file is no dict)
        if any(tensor.ndim != 2 for tensor in tensors.values()):
            raise ValueError("a tensor that is no matrix")
        rank, alpha = settings["r"], settings["lora_alpha"]
        if settings["peft_type"] != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float):
            raise ValueError(f"peft_type {settings['peft_type']!r}, r {rank!r}, lora_alpha {alpha!r}")
        if note is not None and not (isinstance(note["targets"], list) and isinstance(note["base_sha256"], str)):
            raise ValueError(f"metadata {note!r}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} is not a LoRA adapter that can be read ({error!r})") from error
    refused = [name for name, value in settings.items() if value and name not in KNOWN]
    refused += ["bias"] * (settings.get("bias", "none") != "none")
    refused += ["init_lora_weights"] * (settings.get("init_lora_weights", True) not in (True, False, None, "gaussian"))
    refused += ["target_modules (a regular expression)"] * isinstance(settings.get("target_modules"), str)
    refused += [name for name in ("rank_pattern", "alpha_pattern") if settings.get(name) and not note]
    if refused:
        raise InputError(f"{config_path} sets {', '.join(refused)}, which this LoRA does not implement")
    return settings, tensors, note
