"""Linear layers whose weights are stored as a CPU reads them, for decoding.

torch multiplies a few rows with a plain weight at a third to a half of the rate of memory; oneDNN
does it at the full rate if it may choose the layout of the weight once.
"""

import contextlib

import torch
from torch import nn


class PackedLinear(nn.Module):
    """x W^T + b without gradients, with W in oneDNN's layout for batches of about `rows` rows."""

    def __init__(self, weight, bias, dtype, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        x = x.to(self.weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@contextlib.contextmanager
def packed_linears(gpt, rows):
    """Within the block, the linear layers and the output embedding of a GPT2Model are packed.

    The copies take the memory of the weights again. On a GPU and without oneDNN nothing happens.
    """
    device_type, dtype = gpt.token_embedding.weight.device.type, gpt.token_embedding.weight.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    supported = dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if device_type != "cpu" or not torch.backends.mkldnn.is_available() or not supported:
        yield
        return
    linears = {
        name: part
        for name, part in gpt.named_modules()
        if isinstance(part, nn.Linear) and ".lora_" not in name
    }
    try:
        for name, linear in linears.items():
            gpt.set_submodule(name, PackedLinear(linear.weight, linear.bias, dtype, rows))
        gpt.packed_head = PackedLinear(gpt.token_embedding.weight, None, dtype, rows)
        yield
    finally:
        gpt.packed_head = None
        for name, linear in linears.items():
            gpt.set_submodule(name, linear)
