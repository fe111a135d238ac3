"""LoRA (Hu et al. 2021, arXiv 2106.09685): train a low-rank update next to frozen weights.

       x ------------------> W x + b (frozen) ------------> + --> y
       |                                                    ^
       +--> dropout --> A (R, in) --> B (out, R) --> * alpha / R

apply_lora(model, LoRAConfig(rank=4))  # freeze the model and wrap the target layers
merge_lora(model)                      # W + (alpha / r) B A, plain linear layers again
"""

import math

import torch
from torch import Tensor, nn

from config import InputError, LoRAConfig


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable update: y = W x + b + (alpha / r) B A dropout(x).

    A is Kaiming-uniform and B is zero, so the update starts at zero.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.config = config
        self.scaling = config.alpha / config.rank
        device = base.weight.device
        self.lora_a = nn.Linear(base.in_features, config.rank, bias=False, device=device)
        self.lora_b = nn.Linear(config.rank, base.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.kaiming_uniform_(self.lora_a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b.weight)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.base(x) + self.scaling * self.lora_b(self.lora_a(self.dropout(x)))

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The base layer, which gets a new weight W + (alpha / r) B A."""
        update = self.scaling * (self.lora_b.weight @ self.lora_a.weight)
        self.base.weight = nn.Parameter(self.base.weight + update, requires_grad=False)
        return self.base


def backbone(module: nn.Module) -> nn.Module:
    """The GPT-2 of a task model, or the module itself."""
    return getattr(module, "gpt", module)


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """All LoRALinear layers by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LoRALinear)}


def apply_lora(module: nn.Module, config: LoRAConfig) -> nn.Module:
    """Freeze the GPT-2 and wrap the layers named in `config.targets`; returns `module`.

    Heads and poolings around the GPT-2 stay trainable. Raises InputError if it has adapters.
    """
    gpt = backbone(module)
    if lora_layers(gpt):
        raise InputError("the model already has LoRA adapters: call merge_lora first")
    gpt.requires_grad_(False)
    for name, part in list(gpt.named_modules()):
        if name.rpartition(".")[2] in config.targets:
            gpt.set_submodule(name, LoRALinear(part, config))
    return module


def merge_lora(module: nn.Module) -> nn.Module:
    """Add all updates to their weights and restore plain linear layers; returns `module`."""
    for name, layer in lora_layers(module).items():
        module.set_submodule(name, layer.merge())
    return module
