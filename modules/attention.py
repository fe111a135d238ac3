"""Causal self-attention (Vaswani et al. 2017) and the key-value cache that makes decoding cheap.

Dimensions in this project: B batch, T tokens, C width, H heads, D head width, V vocabulary, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPT2Config


class KVCache:
    """Keys and values of all layers for the tokens seen so far.

    The memory is allocated once, with the dtype of the first keys.
    """

    def __init__(self, config: GPT2Config, batch: int, max_tokens: int) -> None:
        head_width = config.n_embd // config.n_head
        self.shape = (config.n_layer, 2, batch, config.n_head, max_tokens, head_width)
        self.entries: Tensor | None = None  # keys and values
        self.length = 0  # cached tokens; GPT2Model advances it after the last layer

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) and return all keys and values of the layer, (B, H, length + T, D)."""
        if self.entries is None:
            self.entries = key.new_empty(self.shape)
        stop = self.length + key.shape[2]
        self.entries[layer, ..., self.length : stop, :] = torch.stack([key, value])
        return self.entries[layer, ..., :stop, :].unbind()


class DotProductAttention(nn.Module):
    """dropout(softmax(Q K^T / sqrt(D))) V; a token attends to itself and to earlier tokens."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, T, D) and twice (B, H, cached + T, D) -> (B, H, T, D).

        `mask` (B, 1, T, cached + T) is True where a query may attend; None is causal (no cache).
        """
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, mask, p, is_causal=mask is None)


class CausalSelfAttention(nn.Module):
    """Multi-head attention: H attentions of width D = C / H side by side."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.q_proj = nn.Linear(config.n_embd, config.n_embd)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd)
        self.attend = DotProductAttention(config.attn_pdrop)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` is as in DotProductAttention."""
        query, key, value = (
            projection(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.append(layer, key, value)
        heads = self.attend(query, key, value, mask)
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, T, C)


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The hidden state (B, C) of each last real token, of (B, T, C) and a mask (B, T)."""
    last = attention_mask.cumsum(1).argmax(1)  # the first of equal maxima
    return hidden[torch.arange(len(hidden), device=hidden.device), last]
