"""The chunked cross-entropy equals F.cross_entropy in value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modules import loss as loss_module
from modules.loss import IGNORE_INDEX, VocabularyLoss

cross_entropy = VocabularyLoss()


def problem(dtype=torch.float32):
    """Hidden states (2, 5, C), an embedding (V, C) and labels, two of which are excluded."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    labels = torch.randint(0, 11, (2, 5))
    labels[0, 0] = labels[1, 3] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 3, 10, 512])
def test_equals_the_cross_entropy_of_whole_logits(chunk, monkeypatch):
    """Also with a short last chunk, and with gradients that are scaled afterwards."""
    monkeypatch.setattr(loss_module, "TRAINED_CHUNK", chunk)
    hidden, weight, labels = problem()
    loss = cross_entropy(hidden, weight, labels)
    whole = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    assert_close(loss, whole, atol=1e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(3 * value, (hidden, weight)) for value in (loss, whole))
    assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_gradients_by_finite_differences(monkeypatch):
    """The gradients are written by hand; in float64 they equal differences of the value."""
    monkeypatch.setattr(loss_module, "TRAINED_CHUNK", 3)
    hidden, weight, labels = problem(torch.float64)
    function = lambda h, w: cross_entropy(h, w, labels)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight), fast_mode=True)


def test_excluded_positions_do_not_matter():
    """The report's loss included padding; without any label the loss is 0 and not NaN."""
    hidden, weight, labels = problem()
    real = labels != IGNORE_INDEX
    changed = hidden.detach().masked_fill(~real[..., None], 1e6).requires_grad_()
    loss = cross_entropy(changed, weight, labels)
    loss.backward()
    assert_close(loss, cross_entropy(hidden[real], weight, labels[real]))
    assert not changed.grad[~real].any()
    loss = cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_a_frozen_tensor_gets_no_gradient(frozen):
    """With LoRA the (V, C) gradient of the frozen embedding is neither computed nor stored."""
    hidden, weight, labels = problem()
    (hidden, weight)[frozen].requires_grad_(False)
    loss = cross_entropy(hidden, weight, labels)
    assert loss.grad_fn.saved_tensors[frozen] is None
    loss.backward()
    assert (hidden.grad is None, weight.grad is None) == (frozen == 0, frozen == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """bfloat16 has 8 bits, so matrix multiplications differ by 2^-8; dev losses do not."""
    hidden, weight, labels = problem()
    exact = cross_entropy(hidden, weight, labels)
    with torch.autocast("cpu", dtype):
        rough = cross_entropy(hidden, weight, labels)
        with torch.no_grad():
            assert torch.equal(cross_entropy(hidden, weight, labels), exact)
    assert rough.item() != exact.item()
    assert_close(rough, exact, atol=0.03, rtol=0)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (rough, exact))
    assert_close(ours, theirs, atol=0.01, rtol=0)  # also compares dtypes
