"""Dropout (Srivastava et al. 2014, JMLR 15) whose random numbers cost little on a CPU."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 2**16  # a value is dropped when its 16 random bits are below p * LEVELS


class _Dropout(torch.autograd.Function):
    """Keeps a byte a value for the backward pass; F.dropout on a CPU keeps the noise in the values' precision."""

    @staticmethod
    def forward(ctx, x: Tensor, threshold: int) -> Tensor:
        # 64 bits drawn at once serve four values, and numpy's SFC64 draws them in 0.4 of the time that torch's CPU
        # generator takes, from which its seed comes: torch's state still fixes, and resumes, everything
        seed = int(torch.randint(2**62, ()))
        words = np.random.SFC64(seed).random_raw((x.numel() + 3) // 4).view(np.int16)
        keep = torch.from_numpy(words)[: x.numel()].view(x.shape) >= threshold - LEVELS // 2
        ctx.save_for_backward(keep)
        ctx.scale = LEVELS / (LEVELS - threshold)
        return _apply(x, keep, ctx.scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _apply(grad, keep, ctx.scale), None


def _apply(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """x, scaled, where `keep` is set, else 0; bytes convert to numbers seven times as fast as truth values do."""
    return (x * keep.view(torch.uint8).to(x.dtype)).mul_(scale)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each value of x with probability p and scale the others by 1 / (1 - p), so that the mean stays.

    On a CPU p is rounded to a multiple of 1 / 65,536, and the scale is that of the rounded p.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return _Dropout.apply(x, min(round(p * LEVELS), LEVELS - 1))


class Dropout(nn.Module):
    """`dropout` as a module: on in training, off in evaluation."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)
