"""Cross-entropy over a large vocabulary in chunks, so that the logits of a batch are never stored.

torch.nn.functional.linear_cross_entropy computes the same in float32. We keep ours because that
function (torch 2.13) returns a bfloat16 loss for bfloat16 inputs (11.75 instead of 11.746) and, on
a CPU with bfloat16 hardware, takes 1.4 to 2 times as long under autocast.
"""

import torch
from torch.autograd.function import once_differentiable

from modules import onednn

IGNORE_INDEX = -100  # positions excluded from the loss
CHUNK = 256  # 256 x 50,257 float32 logits take 51 MB; those of eight sonnets would take 280 MB
TRAINED_CHUNK = 512  # every chunk adds to the whole gradient of the weight: the loss is 14 % faster
BLOCK = 2**20  # logits that stay in a CPU's cache from one operation to the next


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(h_i W^T)[label_i]; the forward pass also computes the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        device_type = hidden.device.type
        # Without gradients (dev losses, model selection) logits are computed in full precision.
        float_dtype = torch.promote_types(hidden.dtype, torch.float32)
        dtype = float_dtype
        if (need_hidden or need_weight) and torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        # In float16, most gradients of logits would underflow before they are scaled.
        grad_dtype = torch.float32 if dtype == torch.float16 else dtype
        head, grad_head = weight.to(dtype), weight.to(grad_dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        share = (labels != IGNORE_INDEX).to(float_dtype)[:, None]  # 1 / count, or 0 if excluded
        share /= share.sum().clamp(min=1)
        labels = labels.clamp(min=0)[:, None]
        use_onednn = dtype == torch.float32 and onednn.is_available(device_type, dtype)
        if not use_onednn:  # one buffer for all chunks: the system clears newly allocated memory
            buffer = head.new_empty(min(chunk, len(labels)), len(head))
        block = max(1, BLOCK // len(head)) if device_type == "cpu" else chunk
        losses = torch.empty_like(share)
        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(labels), chunk):
                rows = slice(start, start + chunk)
                inputs = hidden[rows].to(dtype)
                logits = None  # frees the chunk before the next one
                if use_onednn:
                    logits = onednn.linear(inputs, head)
                else:
                    logits = torch.mm(inputs, head.T, out=buffer[: len(inputs)]).to(grad_dtype)
                blocks = [tensor.split(block) for tensor in (logits, labels[rows], share[rows])]
                block_losses = map(losses_and_gradient_, *blocks)
                losses[rows] = torch.cat(list(block_losses))
                if need_hidden:
                    grad_hidden[rows] = logits @ grad_head
                if need_weight and grad_dtype == weight.dtype:
                    grad_weight.addmm_(logits.T, inputs.to(grad_dtype))
                elif need_weight:
                    grad_weight += logits.T @ inputs.to(grad_dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (losses * share).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = ctx.saved_tensors
        # The incoming gradient is usually 1; on a GPU, asking would wait for the device.
        if grad.device.type != "cpu" or grad != 1:
            grads = [saved if saved is None else saved * grad.to(saved.dtype) for saved in grads]
        return *grads, None, None


def losses_and_gradient_(logits, labels, share):
    """Losses (n, 1) of logits (n, V), which are overwritten with the gradient of the mean loss.

    The gradient is (softmax(logits) - one_hot(label)) * share.
    """
    exp_logits = logits.to(share.dtype)  # float32, or float64; then in place, to hold it once
    largest = exp_logits.amax(-1, keepdim=True)
    losses = largest - exp_logits.gather(1, labels)
    exp_logits.sub_(largest).exp_()
    sum_exp = exp_logits.sum(-1, keepdim=True)
    logits.copy_(exp_logits.mul_(share / sum_exp).scatter_add_(1, labels, -share))
    return losses.add_(sum_exp.log())


def cross_entropy(hidden, weight, labels, chunk=None):
    """Mean cross-entropy in nats per token of F.linear(hidden, weight) against labels.

    hidden (..., C), output embedding (V, C), labels (...); labels of -100 are excluded. If all are,
    the loss is 0. Equal to F.cross_entropy of the whole logits; without gradients, the logits are
    float32 even under autocast.
    """
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad
        hidden, weight = hidden.detach(), weight.detach()
    if chunk is None:
        chunk = TRAINED_CHUNK if weight.requires_grad else CHUNK
    # To remove excluded positions would make the host wait for a GPU.
    return ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), chunk)
