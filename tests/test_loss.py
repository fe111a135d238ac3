"""The chunked cross-entropy equals F.cross_entropy in value and gradients for every chunk size."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modules import loss as loss_module
from modules.loss import IGNORE_INDEX, cross_entropy

WIDTH, VOCAB = 6, 11


def problem(dtype=torch.float32):
    """Hidden states (2, 5, C), an embedding (V, C) and labels, two of which are excluded."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, 5), generator=generator)
    labels[0, 0] = labels[1, 3] = IGNORE_INDEX
    return hidden, weight, labels


@pytest.mark.parametrize("block", [1, 2 * VOCAB, 2**20])
@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 256])
def test_equals_the_cross_entropy_of_whole_logits(chunk, block, monkeypatch):
    """Covers short last chunks and blocks, those of one position and larger than the batch."""
    monkeypatch.setattr(loss_module, "BLOCK", block)
    hidden, weight, labels = problem()
    loss = cross_entropy(hidden, weight, labels, chunk)
    whole = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    assert_close(loss, whole, atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(3 * value, (hidden, weight)) for value in (loss, whole))
    assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_gradients_by_finite_differences():
    """The gradients are written by hand; in float64 they equal differences of the value."""
    hidden, weight, labels = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: cross_entropy(h, w, labels, chunk=3), (hidden, weight)
    )


def test_excluded_positions_do_not_matter():
    """The report's loss included padding; its content changes neither value nor gradient."""
    hidden, weight, labels = problem()
    real = labels != IGNORE_INDEX
    changed = hidden.detach().clone()
    changed[~real] = 1e6
    changed.requires_grad_()
    loss = cross_entropy(changed, weight, labels)
    loss.backward()
    assert_close(loss, cross_entropy(hidden[real], weight, labels[real]))
    assert not changed.grad[~real].any()
    assert changed.grad[real].abs().sum(-1).gt(0).all()


def test_without_any_label_the_loss_is_zero():
    """A mean over nothing would be NaN and end the run."""
    hidden, weight, labels = problem()
    loss = cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_extreme_logits_stay_finite():
    """exp overflows unless the largest logit is subtracted first; the loss is the difference."""
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    loss = cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    loss.backward()
    assert_close(loss, torch.tensor(2000.0))
    assert_close(hidden.grad, torch.tensor([[2.0]]))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_tensors_get_no_gradient(frozen):
    """With LoRA the (V, C) gradient of the frozen embedding is neither computed nor stored."""
    hidden, weight, labels = problem()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    loss = cross_entropy(hidden, weight, labels)
    saved = loss.grad_fn.saved_tensors
    assert [tensor is None for tensor in saved] == [frozen == "hidden", frozen == "weight"]
    loss.backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_is_close_to_float32(dtype):
    """bfloat16 has 8 bits, so matrix multiplications differ by 2^-8; sums are in float32."""
    hidden, weight, labels = problem()
    exact = cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", dtype):
        rough = cross_entropy(hidden, weight, labels)
    assert rough.dtype == torch.float32
    assert rough.item() != exact.item()
    assert_close(rough, exact, atol=0.03, rtol=0)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (rough, exact))
    assert {grad.dtype for grad in ours} == {torch.float32}
    assert_close(ours, theirs, atol=0.01, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_and_blocks_under_autocast(dtype, monkeypatch):
    """Chunks share a buffer, whose blocks are replaced by their gradients."""
    monkeypatch.setattr(loss_module, "BLOCK", 2 * VOCAB)
    hidden, weight, labels = problem(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [cross_entropy(hidden, weight, labels, chunk) for chunk in (3, 256)]
    assert_close(*losses, atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in losses)
    assert_close(ours, theirs, atol=0.01, rtol=0)


def test_without_gradients_autocast_changes_nothing():
    """bfloat16 logits around -110 are multiples of 0.5; dev losses use float32 logits."""
    hidden, weight, labels = problem()
    hidden = torch.cat([hidden, torch.full((2, 5, 1), -110.0)], dim=-1)
    weight = torch.cat([weight, torch.ones(VOCAB, 1)], dim=-1)
    logits = (hidden @ weight.T).detach().flatten(0, 1)
    exact = F.cross_entropy(logits, labels.flatten())
    assert -130 < logits.min() < logits.max() < -90
    assert abs(F.cross_entropy(logits.bfloat16().float(), labels.flatten()) - exact) > 1e-3
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert_close(cross_entropy(hidden, weight, labels), exact, atol=1e-5, rtol=0)
        assert_close(cross_entropy(hidden, weight, labels, 3), exact, atol=1e-5, rtol=0)
