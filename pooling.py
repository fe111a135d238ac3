"""Pooling: a text's hidden states (B, T, C) to one vector (B, width), over its real tokens only.

`last`, `mean` and `max` have no parameters; `generalized` learns one weight a token, `multihead` one a token, head
and dimension. Padding gets no weight: its scores are -inf before the softmax.
"""

from itertools import combinations

import torch
from torch import Tensor, nn

from config import check


class Pooling(nn.Module):
    """What all poolings share; `width` is that of the vector they return."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, C) and (B, T), 1 at real tokens, to (B, width). A row without a real token has no meaning."""
        raise NotImplementedError

    def token_weights(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | None:
        """(B, T): how much each token counts, 1 in all, for a pooling that learns it; else None."""
        return None

    def penalty(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | float:
        """What the pooling adds to the loss."""
        return 0.0


class LastPooling(Pooling):
    """The last real token, which alone has read all the others; padding may be on either side."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        last = (attention_mask * places).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


class MeanPooling(Pooling):
    """The mean over real tokens."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return _fill(hidden, attention_mask, 0).sum(1) / attention_mask.sum(1, keepdim=True)


class MaxPooling(Pooling):
    """In every dimension the largest value of a real token."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return _fill(hidden, attention_mask, -torch.inf).amax(1)


class GeneralizedPooling(Pooling):
    """The report's: u_t = tanh(w . h_t + b), a = softmax_t(u), v = sum_t a_t h_t.

    As tanh lies in (-1, 1), no token weighs more than e^2 = 7.4 times as much as another.
    """

    def __init__(self, width: int):
        super().__init__(width)
        self.score = nn.Linear(width, 1)

    def _attend(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return _softmax(torch.tanh(self.score(hidden)), attention_mask)  # (B, T, 1)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = _fill(hidden, attention_mask, 0)  # 0 times what is not finite at padding would not be 0
        return (self._attend(hidden, attention_mask) * hidden).sum(1)

    def token_weights(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return self._attend(hidden, attention_mask).squeeze(-1)


class MultiHeadPooling(Pooling):
    """Generalized pooling of Chen, Ling and Zhu 2018 (arXiv 1806.11537), a weight for every dimension in each head.

    For head i: A^i = softmax_t(W2^i relu(W1^i h_t + b1^i) + b2^i), v^i = sum_t A^i_t * h_t; the v^i are concatenated.
    The penalty sum_{i<j} max(0, 1 - |X^i - X^j|^2) keeps heads apart: on X = W1 with the weight that the paper's code
    has, and, with a weight of their own, on the A^i and on the v^i, averaged over the batch. It is 0 unless
    two heads come within a distance of 1, which at the usual initialisation they never do.
    """

    def __init__(self, width: int, heads: int = 5, parameter_penalty: float = 0.01,
                 attention_penalty: float = 0.0, vector_penalty: float = 0.0):  # fmt: skip
        check("the pooling's heads", heads, 1, 100, int)  # a file could ask for any number
        super().__init__(heads * width)
        self.inner = nn.ModuleList(nn.Linear(width, width // 2) for _ in range(heads))
        self.outer = nn.ModuleList(nn.Linear(width // 2, width) for _ in range(heads))
        self.parameter_penalty = parameter_penalty
        self.attention_penalty = attention_penalty
        self.vector_penalty = vector_penalty

    def _attend(self, hidden: Tensor, attention_mask: Tensor) -> list[Tensor]:
        heads = zip(self.inner, self.outer, strict=True)
        return [_softmax(outer(torch.relu(inner(hidden))), attention_mask) for inner, outer in heads]  # (B, T, C) each

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = _fill(hidden, attention_mask, 0)
        return torch.cat([(weights * hidden).sum(1) for weights in self._attend(hidden, attention_mask)], dim=1)

    def token_weights(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.stack(self._attend(hidden, attention_mask)).mean((0, 3))  # over heads and dimensions

    def penalty(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | float:
        total = self.parameter_penalty * _closeness([inner.weight[None] for inner in self.inner])
        if self.attention_penalty or self.vector_penalty:  # attends once more: rarely used, and the code stays plain
            hidden = _fill(hidden, attention_mask, 0)
            attention = self._attend(hidden, attention_mask)
            vectors = [(weights * hidden).sum(1) for weights in attention]
            total = total + self.attention_penalty * _closeness(attention) + self.vector_penalty * _closeness(vectors)
        return total


POOLINGS = {
    "last": LastPooling,
    "mean": MeanPooling,
    "max": MaxPooling,
    "generalized": GeneralizedPooling,
    "multihead": MultiHeadPooling,
}


def _fill(values: Tensor, attention_mask: Tensor, filling: float) -> Tensor:
    """Values (B, T, n) with `filling` at padding."""
    return values.masked_fill(~attention_mask.bool()[:, :, None], filling)


def _softmax(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Softmax over the real tokens of scores (B, T, n), in float32."""
    return _fill(scores.float(), attention_mask, -torch.inf).softmax(1)


def _closeness(parts: list[Tensor]) -> Tensor:
    """sum_{i<j} max(0, 1 - |X^i - X^j|^2) of tensors (B, ...), the mean over B."""
    pairs = combinations((part.float().flatten(1) for part in parts), 2)
    return sum(torch.relu(1 - (one - other).square().sum(1)).mean() for one, other in pairs)
