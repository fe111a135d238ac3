"""Cross-entropy over a large vocabulary in chunks, so that a batch's logits are never stored."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100  # positions excluded from the loss
CHUNK = 512  # 512 x 50,257 float32 logits take 103 MB; those of eight sonnets would take 280 MB


class VocabularyLoss(nn.Module):
    """Mean of -log softmax(h W^T)[label] in nats, for hidden states h and an output embedding W.

    F.linear_cross_entropy is similar, but its loss is bfloat16 under autocast.
    """

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(..., C) and (V, C) -> (..., V)."""
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
    """The forward pass also computes the gradients, because it has the logits at hand.

    The gradient with respect to the logits is (softmax(logits) - one_hot(label)) / count.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, multiply: Any) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        device_type = hidden.device.type
        full_dtype = torch.promote_types(hidden.dtype, torch.float32)
        dtype = full_dtype
        if (need_hidden or need_weight) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        # In float16, most gradients of logits would underflow before they are scaled.
        grad_dtype = full_dtype if dtype == torch.float16 else dtype
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        head = weight.to(dtype)
        count = (labels != IGNORE_INDEX).sum().clamp(min=1)
        loss = torch.zeros((), dtype=full_dtype, device=hidden.device)
        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(labels), CHUNK):
                rows = slice(start, start + CHUNK)
                inputs, label = hidden[rows].to(dtype), labels[rows, None]
                valid, label = label != IGNORE_INDEX, label.clamp(min=0)
                log_probabilities = multiply(inputs, head).to(full_dtype).log_softmax(-1)
                loss -= (log_probabilities.gather(1, label) * valid).sum()
                if not (need_hidden or need_weight):
                    continue
                share = (valid / count).to(full_dtype)
                grad = log_probabilities.exp_().mul_(share).scatter_add_(1, label, -share)
                grad = grad.to(grad_dtype)  # of the logits
                if need_hidden:
                    grad_hidden[rows] = grad @ weight.to(grad_dtype)
                if need_weight:
                    grad_weight += grad.T @ inputs.to(grad_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = (
            None if saved is None else saved * grad.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None
