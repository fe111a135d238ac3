"""Faster parts for training, which compute the same as the plain ones.

`speed_up` swaps them into a model. Each is a subclass of a plain part that overrides `forward`, so
parameters, their names and `state_dict` stay. benchmarks/speed.py measures what each part gains.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora import LoRALinear
from modules.attention import DotProductAttention
from modules.loss import VocabularyLoss

LEVELS = 2**16  # 16 random bits decide about each value of dropout


def speed_up(model: nn.Module) -> nn.Module:
    """Swap the parts of a model on its device for faster ones; returns the model.

    Call it after apply_lora, because the parts depend on what is frozen. With torch.compile, leave
    it out.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    cpu_parts = {
        nn.Dropout: FastDropout,
        DotProductAttention: WrittenOutAttention,
        VocabularyLoss: FastVocabularyLoss,
    }
    for part in model.modules():
        if type(part) is nn.Linear and not part.weight.requires_grad:
            part.__class__ = FrozenLinear
        elif type(part) is LoRALinear:
            part.__class__ = FastLoRALinear
        elif on_cpu and type(part) in cpu_parts:
            part.__class__ = cpu_parts[type(part)]
    return model


class FrozenLinear(nn.Linear):
    """Casts a frozen weight to the autocast dtype once; in float32 on a CPU, oneDNN multiplies.

    The cast copies are made again if the weight or bias has changed.
    """

    cast: tuple[Any, Tensor, Tensor | None] = None, None, None  # its key, weight and bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        device_type = x.device.type
        if self.weight.requires_grad and torch.is_grad_enabled():
            return super().forward(x)
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            key = self.weight.data_ptr(), self.weight._version, self.bias._version, dtype
            if self.cast[0] != key:
                self.cast = key, self.weight.detach().to(dtype), self.bias.detach().to(dtype)
            return F.linear(x, *self.cast[1:])
        if x.dtype == torch.float32 and onednn_is_available(device_type):
            return OneDNNLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


def onednn_is_available(device_type: str) -> bool:
    """Whether oneDNN multiplies on this device."""
    return device_type == "cpu" and torch.backends.mkldnn.is_available()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear without gradients; the weight may be packed.

    torch multiplies float32 matrices with MKL, which takes up to twice as long on AMD processors
    and, with few rows, everywhere.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """F.linear of a frozen layer: only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        [weight] = ctx.saved_tensors
        return grad @ weight, None, None


class FastLoRALinear(LoRALinear):
    """Adds the scaled update in place, which saves three passes over the output."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.flatten(0, -2)
        hidden = self.lora_a(self.dropout(rows))  # (rows, R)
        out = self.base(rows)
        b = self.lora_b.weight.T.contiguous()  # (R, out): halves the time of its gradient
        out.addmm_(hidden.to(out.dtype), b.to(out.dtype), alpha=self.scaling)
        return out.view(*x.shape[:-1], -1)


class FastDropout(nn.Dropout):
    """Dropout with cheap random numbers, because torch's CPU generator is serial.

    p is rounded to a multiple of 1 / 65,536, and the scale uses the rounded p.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero each value with probability p and scale the others by 1 / (1 - p)."""
        return cheap_dropout(x, self.p if self.training else 0.0)


def cheap_dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout for a CPU."""
    if p == 0:
        return x
    return CheapDropout.apply(x, min(round(p * LEVELS), LEVELS - 1))


class CheapDropout(torch.autograd.Function):
    """Stores one byte per value for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int) -> Tensor:
        # Seeded by torch's generator, so that torch's random state still determines everything.
        seed = int(torch.randint(2**62, ()))
        words = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4)  # 64 bits for 4 values
        bits = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)
        keep = bits >= threshold - LEVELS // 2
        ctx.save_for_backward(keep)
        ctx.scale = LEVELS / (LEVELS - threshold)
        return mask_and_scale(x, keep, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return mask_and_scale(grad, *ctx.saved_tensors, ctx.scale), None


def mask_and_scale(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x * keep * scale."""
    # bytes convert to floats seven times as fast as booleans
    return (x * keep.view(torch.uint8).to(x.dtype)).mul_(scale)


class WrittenOutAttention(DotProductAttention):
    """Attention written out: torch's CPU kernel has no dropout and slow bfloat16 gradients.

    Queries are processed in blocks, so that most of the masked half of long texts is not computed.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As in DotProductAttention."""
        p = self.dropout if self.training else 0.0
        fused_is_slow = p > 0 or (query.requires_grad and query.dtype == torch.bfloat16)
        if not fused_is_slow or mask is not None or query.shape != key.shape:
            return super().forward(query, key, value, mask)
        tokens, head_width = query.shape[2:]
        queries, keys, values = (part.flatten(0, 1) for part in (query, key, value))  # (B*H, T, D)
        outputs, block = [], 256
        for start in range(0, tokens, block):
            stop = min(start + block, tokens)
            future = query.new_full((stop - start, stop), -torch.inf).triu(start + 1)
            visible = keys[:, :stop].transpose(1, 2)
            scores = torch.baddbmm(future, queries[:, start:stop], visible, alpha=head_width**-0.5)
            weights = cheap_dropout(scores.softmax(-1), p)  # (B*H, stop - start, stop)
            outputs.append(weights @ values[:, :stop])
        return torch.cat(outputs, dim=1).view_as(query)


class FastVocabularyLoss(VocabularyLoss):
    """Multiplies with oneDNN in float32."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(..., C) and (V, C) -> (..., V), without gradients."""
        if hidden.dtype == torch.float32 and onednn_is_available(hidden.device.type):
            return onednn_linear(hidden, weight)
        return super().logits(hidden, weight)
