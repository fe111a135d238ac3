"""Cross-entropy over a large vocabulary, a few rows at a time, so that all logits are never held at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 256  # rows: 256 x 50,257 float32 logits are 51 MB, where a batch of eight sonnets would take 280 MB


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(h_i W^T)[label_i], its gradients computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        kind = hidden.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        # in float16 most of a slope over the vocabulary would round to 0 before the gradient scaler can act
        wide = torch.float32 if compute == torch.float16 else compute
        head, wide_head = weight.to(compute), weight.to(wide)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        # one buffer for all chunks' logits: memory asked for anew is cleared by the system page by page
        buffer = head.new_empty(min(chunk, len(labels)), len(head))
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        count = max(1, len(labels))
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(labels), chunk):
                rows, targets = hidden[start : start + chunk].to(compute), labels[start : start + chunk, None]
                logits = torch.mm(rows, head.T, out=buffer[: len(rows)]).to(total.dtype)
                highest = logits.amax(-1, keepdim=True)
                total += (highest - logits.gather(1, targets)).sum()
                odds = logits.sub_(highest).exp_()  # in place, like all below: a chunk's logits are held once
                partition = odds.sum(-1, keepdim=True)
                total += partition.log().sum()
                if want_hidden or want_weight:
                    # d loss / d logits = (softmax(logits) - one_hot(label)) / count
                    slope = odds.div_(partition * count)
                    slope = slope.scatter_add_(1, targets, slope.new_full(targets.shape, -1 / count)).to(wide)
                if want_hidden:
                    grad_hidden[start : start + chunk] = slope @ wide_head
                if want_weight and wide == weight.dtype:
                    grad_weight.addmm_(slope.T, rows.to(wide))  # in place: the gradient is as large as the embedding
                elif want_weight:
                    grad_weight += slope.T @ rows.to(wide)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = ctx.saved_tensors
        if grad.device.type != "cpu" or grad != 1:  # 1 is the usual; to ask a GPU would be to wait for it
            grads = (None if saved is None else saved * grad.to(saved.dtype) for saved in grads)
        return *grads, None, None


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """Mean cross-entropy, in nats a token, of hidden (..., C) against labels (...) through the output embedding (V, C).

    Labels of -100 are left out before any product; all -100 gives 0. Equal to F.cross_entropy on the whole logits.
    """
    real = labels != -100
    if not torch.is_grad_enabled():  # needs_input_grad does not know of no_grad
        hidden, weight = hidden.detach(), weight.detach()
    return _MeanCrossEntropy.apply(hidden[real], weight, labels[real], chunk)
