"""Matrix multiplications by oneDNN on a CPU: frozen layers, and packed weights for decoding.

torch multiplies float32 matrices with MKL, which is slow on AMD processors if the second matrix is
transposed (half to two thirds of oneDNN's rate) and everywhere if the first has few rows. oneDNN
reads weights at the full rate of memory if it may choose their layout once ("packing").
"""

import contextlib

import torch
from torch import nn


def is_available(device_type, dtype):
    """Whether `linear` works for a device and precision, at the full speed of the hardware."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def linear(x, weight, bias=None):
    """F.linear without gradients; the weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """nn.Linear, in which oneDNN multiplies frozen float32 weights: a twentieth of a LoRA step."""

    def forward(self, x):
        """(..., in) -> (..., out)."""
        device_type = x.device.type
        is_trained = self.weight.requires_grad or self.bias.requires_grad
        is_cast = torch.is_autocast_enabled(device_type) or x.dtype != torch.float32
        other_kernel = is_trained or is_cast or torch.compiler.is_compiling()
        if other_kernel or not is_available(device_type, self.weight.dtype):
            return super().forward(x)
        return FrozenLinear.apply(x, self.weight, self.bias)


class FrozenLinear(torch.autograd.Function):
    """F.linear with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        [weight] = ctx.saved_tensors
        return grad @ weight, None, None


class PackedLinear(nn.Module):
    """x W^T + b without gradients, with a copy of W that is packed for about `rows` rows."""

    def __init__(self, weight, bias, dtype, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        return linear(x.to(self.weight.dtype), self.weight, self.bias)


@contextlib.contextmanager
def packed_linears(gpt, rows):
    """Within the block, the linear layers and the output embedding of a GPT2Model are packed.

    The copies take the memory of the weights again. Without oneDNN nothing happens.
    """
    embedding = gpt.token_embedding.weight
    device_type, dtype = embedding.device.type, embedding.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    if not is_available(device_type, dtype):
        yield
        return
    linears = {
        name: part
        for name, part in gpt.named_modules()
        if isinstance(part, nn.Linear) and ".lora_" not in name
    }
    try:
        for name, layer in linears.items():
            gpt.set_submodule(name, PackedLinear(layer.weight, layer.bias, dtype, rows))
        gpt.packed_head = PackedLinear(embedding, None, dtype, rows)
        yield
    finally:
        gpt.packed_head = None
        for name, layer in linears.items():
            gpt.set_submodule(name, layer)
