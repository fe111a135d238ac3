"""Poolings: the hidden states of a text (B, T, C) become one vector (B, width), without padding.

To add a pooling, write a class with `forward` and add it to POOLINGS; scripts and tests find it.
"""

import math
from itertools import combinations

import torch
from torch import Tensor, nn

from config import check_range


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

    def penalty(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | float:
        """A term that is added to the loss."""
        return 0.0


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


class GeneralizedPooling(Pooling):
    """The report's: u_t = tanh(w . h_t + b), a = softmax_t(u), v = sum_t a_t h_t.

    tanh is in (-1, 1), so no weight exceeds another by more than a factor of e^2 = 7.4.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.score = nn.Linear(width, 1)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = fill_padding(hidden, attention_mask, 0)  # 0 * inf would be NaN
        weights = self.token_weights(hidden, attention_mask)
        return (weights[:, :, None] * hidden).sum(1)

    def token_weights(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | None:
        scores = torch.tanh(self.score(hidden))  # (B, T, 1)
        return masked_softmax(scores, attention_mask).squeeze(-1)


class MultiHeadPooling(Pooling):
    """Generalized pooling of Chen, Ling and Zhu 2018 (COLING, C18-1154; arXiv 1806.09828).

    For head i: A^i = softmax_t(W2^i relu(W1^i h_t + b1^i) + b2^i) for every dimension and
    v^i = sum_t A^i_t * h_t; the v^i are concatenated. Penalties sum_{i<j} max(0, 1 - |X^i - X^j|^2)
    on W1, on the A^i and on the v^i keep heads different. With the usual initialization heads
    differ by more than 1, and the penalties are 0.
    """

    def __init__(
        self,
        width: int,
        heads: int = 5,
        parameter_penalty: float = 0.01,
        attention_penalty: float = 0.0,
        vector_penalty: float = 0.0,
    ) -> None:
        super().__init__(heads * width)
        self.penalties = parameter_penalty, attention_penalty, vector_penalty
        for penalty in self.penalties:
            check_range("a penalty", penalty, (0, math.inf))
        self.inner = nn.ModuleList(nn.Linear(width, width // 2) for _ in range(heads))
        self.outer = nn.ModuleList(nn.Linear(width // 2, width) for _ in range(heads))

    def attention(self, hidden: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """A^i of each head, (B, T, C)."""
        return [
            masked_softmax(outer(torch.relu(inner(hidden))), attention_mask)
            for inner, outer in zip(self.inner, self.outer, strict=True)
        ]

    def vectors(self, hidden: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """v^i of each head, (B, C)."""
        hidden = fill_padding(hidden, attention_mask, 0)
        return [(weights * hidden).sum(1) for weights in self.attention(hidden, attention_mask)]

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.cat(self.vectors(hidden, attention_mask), dim=1)

    def token_weights(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | None:
        return torch.stack(self.attention(hidden, attention_mask)).mean((0, 3))

    def penalty(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | float:
        parameter, attention, vector = self.penalties
        total = parameter * similarity_penalty([inner.weight[None] for inner in self.inner])
        # Computed again rather than kept from forward: these two are rarely used.
        if attention or vector:
            total += attention * similarity_penalty(self.attention(hidden, attention_mask))
            total += vector * similarity_penalty(self.vectors(hidden, attention_mask))
        return total


POOLINGS = {
    "last": LastPooling,
    "mean": MeanPooling,
    "weightedmean": WeightedMeanPooling,
    "max": MaxPooling,
    "generalized": GeneralizedPooling,
    "multihead": MultiHeadPooling,
}


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state (B, C) of each last real token, of (B, T, C)."""
    last = attention_mask.cumsum(1).argmax(1)  # the first of equal maxima
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def fill_padding(values: Tensor, attention_mask: Tensor, value: float) -> Tensor:
    """Replace (B, T, n) by `value` at padding."""
    return values.masked_fill(~attention_mask.bool()[:, :, None], value)


def masked_softmax(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Softmax of scores (B, T, n) over real tokens, in float32."""
    return fill_padding(scores.float(), attention_mask, -torch.inf).softmax(1)


def similarity_penalty(parts: list[Tensor]) -> Tensor:
    """sum_{i<j} max(0, 1 - |X^i - X^j|^2) for tensors (B, ...), averaged over B."""
    rows = [part.float().flatten(1) for part in parts]
    distances = [(one - other).square().sum(1) for one, other in combinations(rows, 2)]
    return sum(torch.relu(1 - distance).mean() for distance in distances)
