"""Batches in which every sequence uses a LoRA adapter of its own (Chen et al. 2023, Punica)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from config import InputError
from lora import backbone, lora_layers
from models.adapters import base_sha256, read_adapter


class MixedLoRALinear(nn.Module):
    """A linear layer with the updates of several adapters; each sequence uses its own or none.

    All A are stacked and all scaled B concatenated, so any number of adapters takes two matrix
    multiplications. `active` (B, R) zeroes the columns of the other adapters between them.
    """

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, active: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b, self.active = base, a, b, active

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out)."""
        return self.base(x) + (x @ self.a.T * self.active[:, None]) @ self.b.T


@contextlib.contextmanager
def mixed_adapters(module: nn.Module, folders: list[str | Path | None]) -> Iterator[None]:
    """Within the block, sequence i of a batch uses the adapter in folders[i], or none if None.

    Adapters may differ in rank, alpha and targets. Raises InputError as load_adapter does, and if
    the model already has adapters.
    """
    gpt, distinct = backbone(module), {folder for folder in folders if folder is not None}
    if distinct and lora_layers(gpt):
        raise InputError("the model already has a LoRA adapter: load the base model again")
    base = base_sha256(gpt) if distinct else ""
    device = gpt.token_embedding.weight.device
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}  # A, scaled B, active by linear
    for adapter in sorted(distinct, key=folders.index):
        config, matrices = read_adapter(gpt, Path(adapter), base)
        used = torch.tensor([[float(folder == adapter)] for folder in folders], device=device)
        used = used.expand(-1, config.rank)
        for name, (a, b) in matrices.items():
            scaled = b.to(device) * (config.alpha / config.rank)
            parts.setdefault(name, []).append((a.to(device), scaled, used))
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
