"""The chunked cross-entropy is F.cross_entropy: value and gradients, whatever the chunk."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modules.loss import cross_entropy

ROWS, WIDTH, VOCAB = 10, 6, 11


def problem(dtype=torch.float32):
    """Hidden states (2, 5, C), an embedding (V, C) and labels, two of which are left out."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, 5), generator=generator)
    labels[0, 0] = labels[1, 3] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 256])
def test_equals_the_cross_entropy_of_whole_logits(chunk):
    """A last chunk that is short, a chunk of one row and a chunk larger than all of them."""
    hidden, weight, labels = problem()
    loss = cross_entropy(hidden, weight, labels, chunk)
    whole = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    assert_close(loss, whole, atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(3 * value, (hidden, weight)) for value in (loss, whole))
    assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_gradients_by_finite_differences():
    """The gradients are written by hand; in float64 they must match differences of the value."""
    hidden, weight, labels = problem(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, labels, chunk=3), (hidden, weight))


def test_left_out_rows_count_for_nothing():
    """The report's loss counted padding; whatever stands there must move neither value nor gradient."""
    hidden, weight, labels = problem()
    real = labels != -100
    changed = hidden.detach().clone()
    changed[~real] = 1e6
    changed.requires_grad_()
    loss = cross_entropy(changed, weight, labels)
    loss.backward()
    assert_close(loss, cross_entropy(hidden[real], weight, labels[real]))
    assert not changed.grad[~real].any()
    assert changed.grad[real].abs().sum(-1).gt(0).all()


def test_no_label_at_all_is_zero():
    """A mean over nothing would be NaN, and end the run."""
    hidden, weight, labels = problem()
    loss = cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_extreme_logits_stay_finite():
    """exp of a large logit overflows unless the largest is subtracted first; the loss is then their difference."""
    hidden, weight = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert_close(loss, torch.tensor(2000.0))
    assert_close(hidden.grad, torch.tensor([[2.0]]))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_no_gradient_is_computed_for_what_is_frozen(frozen):
    """LoRA's saving: under a frozen embedding its (V, C) gradient is never made, nor kept for the backward pass."""
    hidden, weight, labels = problem()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    loss = cross_entropy(hidden, weight, labels)
    saved = loss.grad_fn.saved_tensors
    assert [tensor is None for tensor in saved] == [frozen == "hidden", frozen == "weight"]
    loss.backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == "hidden", frozen == "weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(dtype):
    """bfloat16 keeps 8 bits: products differ by about 2^-8 of their size, and sums are still made in float32."""
    hidden, weight, labels = problem()
    exact = cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", dtype):
        rough = cross_entropy(hidden, weight, labels)
    assert rough.dtype == torch.float32
    assert rough.item() != exact.item()
    assert_close(rough, exact, atol=0.03, rtol=0)
    (ours, *_), (theirs, *_) = (torch.autograd.grad(loss, (hidden, weight)) for loss in (rough, exact))
    assert ours.dtype == torch.float32
    assert_close(ours, theirs, atol=0.01, rtol=0)
