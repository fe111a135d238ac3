"""Poolings: the hidden states of a text (B, T, C) become one vector (B, width), without padding.

To add a pooling, write a class with `forward` and add it to POOLINGS; scripts and tests find it.
"""

import torch
from torch import Tensor, nn

from modules.attention import last_token


class Pooling(nn.Module):
    """Base class; `width` is the width of the pooled vector.

    `forward` takes (B, T, C) and (B, T), with 1 at real tokens (at least one per row), and returns
    (B, width).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def token_weights(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | None:
        """Learned weights of the tokens, (B, T), with sum 1; None if nothing is learned."""
        return None


class LastPooling(Pooling):
    """The last real token, which has attended to all others."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return last_token(hidden, attention_mask)


class MeanPooling(Pooling):
    """The mean over real tokens."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return fill_padding(hidden, attention_mask, 0).sum(1) / attention_mask.sum(1, keepdim=True)


class WeightedMeanPooling(Pooling):
    """The mean with weights 1, 2, 3, ... of real tokens (Muennighoff 2022, arXiv 2202.08904).

    Later tokens of a decoder have attended to more of the text.
    """

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask.cumsum(1) * attention_mask  # (B, T)
        weights = weights / weights.sum(1, keepdim=True)
        return (weights[:, :, None] * fill_padding(hidden, attention_mask, 0)).sum(1)


class MaxPooling(Pooling):
    """The maximum over real tokens, per dimension."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return fill_padding(hidden, attention_mask, -torch.inf).amax(1)


class AttentionPooling(Pooling):
    """Base class of poolings with learned weights: sum_t A_t * h_t for every head, concatenated."""

    def attention(self, hidden: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """A of each head, (B, T, C), or (B, T, 1) if all dimensions have the same weights."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = fill_padding(hidden, attention_mask, 0)  # 0 * inf would be NaN
        heads = self.attention(hidden, attention_mask)
        return torch.cat([(weights * hidden).sum(1) for weights in heads], dim=1)

    def token_weights(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | None:
        return torch.stack(self.attention(hidden, attention_mask)).mean((0, 3))


class GeneralizedPooling(AttentionPooling):
    """The report's, one weight per token: u_t = tanh(w . h_t + b), a = softmax_t(u), sum_t a_t h_t.

    tanh is in (-1, 1), so no weight exceeds another by more than a factor of e^2 = 7.4.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.score = nn.Linear(width, 1)

    def attention(self, hidden: Tensor, attention_mask: Tensor) -> list[Tensor]:
        return [masked_softmax(torch.tanh(self.score(hidden)), attention_mask)]


class MultiHeadPooling(AttentionPooling):
    """Generalized pooling of Chen, Ling and Zhu 2018 (COLING, C18-1154; arXiv 1806.09828).

    For head i: A^i = softmax_t(W2^i relu(W1^i h_t + b1^i) + b2^i) for every dimension. The paper's
    penalties max(0, 1 - |X^i - X^j|^2), which keep heads different, are left out: the W1 of heads
    start at a squared distance of about C / 3, where penalty and gradient are 0.
    """

    def __init__(self, width: int, heads: int = 5) -> None:
        super().__init__(heads * width)
        self.inner = nn.ModuleList(nn.Linear(width, width // 2) for _ in range(heads))
        self.outer = nn.ModuleList(nn.Linear(width // 2, width) for _ in range(heads))

    def attention(self, hidden: Tensor, attention_mask: Tensor) -> list[Tensor]:
        return [
            masked_softmax(outer(torch.relu(inner(hidden))), attention_mask)
            for inner, outer in zip(self.inner, self.outer, strict=True)
        ]


POOLINGS = {
    "last": LastPooling,
    "mean": MeanPooling,
    "weightedmean": WeightedMeanPooling,
    "max": MaxPooling,
    "generalized": GeneralizedPooling,
    "multihead": MultiHeadPooling,
}


def fill_padding(values: Tensor, attention_mask: Tensor, value: float) -> Tensor:
    """Replace (B, T, n) by `value` at padding."""
    return values.masked_fill(~attention_mask.bool()[:, :, None], value)


def masked_softmax(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Softmax of scores (B, T, n) over real tokens, in float32."""
    return fill_padding(scores.float(), attention_mask, -torch.inf).softmax(1)
