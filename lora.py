"""LoRA (Hu et al. 2021, arXiv 2106.09685): train a low-rank update next to frozen weights.

       x ------------------> W x + b (frozen) ------------> + --> y
       |                                                    ^
       +--> dropout --> A (R, in) --> B (out, R) --> * alpha / R

apply_lora(model, LoRAConfig(rank=4))  # freeze the model and wrap the target layers
merge_lora(model)                      # W + (alpha / r) B A, plain linear layers again
"""

import hashlib
import math

import torch
from torch import nn

from config import InputError
from modules.dropout import Dropout


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable update: y = W x + b + (alpha / r) B A dropout(x).

    A is Kaiming-uniform and B is zero, so the update starts at zero. Raises InputError if the rank
    exceeds a dimension of W.
    """

    def __init__(self, base, rank, alpha, dropout):
        super().__init__()
        if not 1 <= rank <= min(base.in_features, base.out_features):
            shape = f"{base.out_features} x {base.in_features}"
            raise InputError(f"lora_rank {rank} does not fit a {shape} weight; use a smaller rank")
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        device = base.weight.device
        self.lora_a = nn.Linear(base.in_features, rank, False, device, torch.float32)
        self.lora_b = nn.Linear(rank, base.out_features, False, device, torch.float32)
        self.dropout = Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)
        self.train(base.training)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        hidden = self.lora_a(self.dropout(rows))  # (rows, R)
        out = self.base(rows)
        # In place and scaled on the way, which saves three passes over the output. The contiguous
        # copy of B halves the time of its gradient.
        b = self.lora_b.weight.T.contiguous()  # (R, out)
        out.addmm_(hidden.to(out.dtype), b.to(out.dtype), alpha=self.scaling)
        return out.view(*x.shape[:-1], -1)

    def update(self):
        """(alpha / r) B A, (out, in)."""
        return self.scaling * (self.lora_b.weight @ self.lora_a.weight)

    @torch.no_grad()
    def merged(self):
        """The base layer with the weight W + (alpha / r) B A."""
        self.base.weight += self.update()
        return self.base


def backbone(module):
    """The GPT-2 of a task model, or the module itself."""
    return getattr(module, "gpt", module)


def lora_layers(module):
    """All LoRALinear layers by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LoRALinear)}


def apply_lora(module, config):
    """Freeze the GPT-2 and wrap the layers named in `config.targets`; returns `module`.

    Heads and poolings around the GPT-2 stay trainable. Raises InputError if it has adapters.
    """
    gpt = backbone(module)
    if lora_layers(gpt):
        raise InputError("the model already has LoRA adapters: call merge_lora first")
    gpt.requires_grad_(False)
    gpt.lora_config = config
    for name, part in list(gpt.named_modules()):
        if name.rpartition(".")[2] in config.targets:
            gpt.set_submodule(name, LoRALinear(part, config.rank, config.alpha, config.dropout))
    return module


def merge_lora(module):
    """Add all updates to their weights and restore plain, frozen linear layers; returns `module`.

    Raises InputError if the base has been cast, because the merged weights would lose precision.
    """
    if hasattr(backbone(module), "cast_sha256"):
        raise InputError("the base was cast for training: load base and adapter again, then merge")
    for name, layer in lora_layers(module).items():
        module.set_submodule(name, layer.merged())
    return module


def cast_frozen_weights(module, dtype):
    """Cast frozen weight matrices to the autocast dtype once, instead of in every step.

    Norms and positions stay float32.
    """
    gpt = backbone(module)
    matrices = [part for part in gpt.modules() if isinstance(part, nn.Linear)]
    frozen = [part for part in (gpt.token_embedding, *matrices) if not part.weight.requires_grad]
    casts = any(part.weight.dtype != dtype for part in frozen)
    original = base_sha256(gpt) if casts else None
    for part in frozen:
        part.to(dtype)
    if casts:
        gpt.cast_sha256 = original, weights_sha256(gpt)
    return module


def base_sha256(module):
    """SHA-256 of a GPT-2's own weights in float32, without adapters; identifies the base.

    Raises InputError if the weights were changed after a cast, because the value is then unknown.
    """
    gpt = backbone(module)
    if not hasattr(gpt, "cast_sha256"):
        return weights_sha256(gpt, torch.float32)
    original, cast = gpt.cast_sha256
    if weights_sha256(gpt) != cast:
        raise InputError("the base was changed after its weights were cast: load it again")
    return original


def weights_sha256(gpt, dtype=None):
    """SHA-256 over names and values, in the given dtype or in that of each weight.

    The last value is remembered and computed again if `fingerprint` finds a difference.
    """
    weights = {
        name.replace(".base.", "."): weight.detach()
        for name, weight in gpt.named_parameters()
        if ".lora_" not in name
    }
    key = dtype, fingerprint(weights.values())
    if gpt.known_sha256[0] != key:
        digest = hashlib.sha256()
        for name in sorted(weights):
            values = weights[name].to("cpu", dtype).contiguous()
            digest.update(name.encode() + b"\0")
            digest.update(values.view(torch.uint8).numpy())
        gpt.known_sha256 = key, digest.hexdigest()
    return gpt.known_sha256[1]


def fingerprint(weights):
    """Numbers that change with the weights, faster than SHA-256 and without copies from a GPU.

    The version of a tensor is not enough: `.data`, NumPy and fused optimizers do not raise it.
    hash_tensor is the XOR of all values, so it sees any change of one value, but not one that
    moves values, or negates or fills an even number of them. Those change the second number, a sum
    with weights that depend on the place. Only changes that cancel in one and round off in the
    other are missed.
    """
    numbers = []
    for weight in weights:
        ramp = torch.linspace(1, 2, weight.shape[-1]).to(weight)
        with torch.autocast(weight.device.type, enabled=False):
            total = (weight @ ramp).cumsum(0).sum()  # earlier rows count more often
        numbers += torch.hash_tensor(weight).double(), total.double()
    return torch.stack(numbers).tolist()  # one read, for which the host waits on a GPU
