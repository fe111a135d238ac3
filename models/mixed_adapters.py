"""Batches in which every sequence uses a LoRA adapter of its own (Chen et al. 2023, Punica)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from config import InputError
from lora import backbone, lora_layers
from models.adapters import read_adapter


class MixedLoRALinear(nn.Module):
    """A layer with the update of an adapter for the sequences where `active` (B, 1, 1) is 1.

    The layer may be another MixedLoRALinear, so that each adapter adds its update to its sequences.
    """

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, active: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b, self.active = base, a, b, active

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return self.base(x) + (x @ self.a.T * self.active) @ self.b.T


@contextlib.contextmanager
def mixed_adapters(module: nn.Module, folders: list[str | Path | None]) -> Iterator[None]:
    """Within the block, sequence i of a batch uses the adapter in folders[i], or none if None.

    Adapters may differ in rank, alpha and targets. Raises InputError as load_adapter does, and if
    the model already has adapters.
    """
    gpt, distinct = backbone(module), dict.fromkeys(filter(None, folders))
    if distinct and lora_layers(gpt):
        raise InputError("the model already has a LoRA adapter: load the base model again")
    device, linears = gpt.token_embedding.weight.device, {}
    adapters = {folder: read_adapter(gpt, Path(folder)) for folder in distinct}
    try:
        for folder, (config, matrices) in adapters.items():
            active = torch.tensor([[[float(folder == other)]] for other in folders], device=device)
            for name, (a, b) in matrices.items():
                linear, scaled = gpt.get_submodule(name), b * (config.alpha / config.rank)
                linears.setdefault(name, linear)
                mixed = MixedLoRALinear(linear, a.to(device), scaled.to(device), active)
                gpt.set_submodule(name, mixed)
        yield
    finally:
        for name, linear in linears.items():
            gpt.set_submodule(name, linear)
