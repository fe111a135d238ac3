"""Cross-entropy over a large vocabulary in chunks, so that a batch's logits are never stored."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # positions excluded from the loss
CHUNK = 256  # 256 x 50,257 float32 logits take 51 MB; those of eight sonnets would take 280 MB
TRAINED_CHUNK = 512  # each chunk adds to the whole gradient of a trained weight: fewer are faster


class VocabularyLoss(nn.Module):
    """Mean of -log softmax(h W^T)[label] in nats, for hidden states h and an output embedding W.

    F.linear_cross_entropy is similar, but its loss is bfloat16 under autocast.
    """

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(..., C) and (V, C) -> (..., V); a method, so that speed/ can override it."""
        return F.linear(hidden, weight)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """hidden (..., C), weight (V, C), labels (...) with -100 for no label; returns a scalar.

        If no position has a label, the loss is 0. Without gradients, logits are float32 even under
        autocast.
        """
        if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad
            hidden, weight = hidden.detach(), weight.detach()
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        return ChunkedCrossEntropy.apply(hidden, weight, labels, self.logits)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The forward pass also computes the gradients, because it has the logits at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, multiply: Any) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        device_type = hidden.device.type
        full_dtype = torch.promote_types(hidden.dtype, torch.float32)
        dtype = full_dtype
        if (need_hidden or need_weight) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        head = weight.to(dtype)
        # In float16, most gradients of logits would underflow before they are scaled.
        grad_head = weight if dtype == torch.float16 else head
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        share = (labels != IGNORE_INDEX).to(full_dtype)[:, None]  # 1 / count, or 0 if excluded
        share /= share.sum().clamp(min=1)
        labels = labels.clamp(min=0)[:, None]
        losses = torch.empty_like(share)
        chunk = TRAINED_CHUNK if need_weight else CHUNK
        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(labels), chunk):
                rows = slice(start, start + chunk)
                inputs = hidden[rows].to(dtype)
                logits = multiply(inputs, head).to(grad_head.dtype)
                losses[rows] = losses_and_gradient_(logits, labels[rows], share[rows])
                if need_hidden:  # `logits` now holds their gradient
                    grad_hidden[rows] = logits @ grad_head
                if need_weight:
                    grad_weight += logits.T @ inputs.to(grad_head.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (losses * share).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        # The incoming gradient is usually 1; on a GPU, asking would wait for the device.
        if grad.device.type != "cpu" or grad != 1:
            grads = [saved if saved is None else saved * grad.to(saved.dtype) for saved in grads]
        return *grads, None, None


def losses_and_gradient_(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """Losses (n, 1) of logits (n, V), which are overwritten with the gradient of the mean loss.

    The gradient is (softmax(logits) - one_hot(label)) * share. `labels` and `share` are (n, 1).
    """
    exp_logits = logits.to(share.dtype)  # then in place, so that it is stored once
    largest = exp_logits.amax(-1, keepdim=True)
    losses = largest - exp_logits.gather(1, labels)
    exp_logits.sub_(largest).exp_()
    sum_exp = exp_logits.sum(-1, keepdim=True)
    logits.copy_(exp_logits.mul_(share / sum_exp).scatter_add_(1, labels, -share))
    return losses.add_(sum_exp.log())
