"""Causal self-attention (Vaswani et al. 2017; Radford et al. 2019) and the cache that makes decoding cheap.

Dimensions everywhere in this project: B batch, T tokens, C width, H heads, D head width, V vocabulary, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import GPT2Config
from modules.dropout import dropout


class KVCache:
    """Keys and values of every layer for the tokens seen so far, in memory allocated once."""

    def __init__(self, config: GPT2Config, batch: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.layers, batch, config.heads, length, config.head_width)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0  # tokens held; GPT2Model moves it on once all layers have appended

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, T, D) keys and values after those held, and return all of the layer's, (B, H, length + T, D)."""
        stop = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : stop] = key
        self.values[layer, :, :, self.length : stop] = value
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


class CausalSelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V for every head, over the tokens up to each one's own."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, T, C) -> (B, T, C). `mask` (B, 1, T, tokens held + T) is True where a query may look; None is causal."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.append(layer, key, value)
        key, value = key.to(query.dtype), value.to(query.dtype)
        p = self.dropout if self.training else 0.0
        slow = p or (self.training and query.dtype == torch.bfloat16)
        if slow and mask is None and query.device.type == "cpu":
            # torch's fused kernel there knows no dropout, and takes two to five times as long for gradients in bfloat16
            heads = causal_attention(query, key, value, p)
        else:
            is_causal = mask is None and query.shape[2] > 1  # a lone query is the last token and sees all
            heads = F.scaled_dot_product_attention(query, key, value, mask, p, is_causal)
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, T, C)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, p: float, block: int = 256) -> Tensor:
    """dropout(softmax(Q K^T / sqrt(D)), p) V written out, each (B, H, T, D); a token sees those up to its own.

    Queries are taken `block` at a time, so that of long texts the half which no token sees is hardly computed.
    """
    flat_query, flat_key, flat_value = (part.flatten(0, 1) for part in (query, key, value))  # (B * H, T, D)
    tokens, width = query.shape[2:]
    parts = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        future = query.new_full((stop - start, stop), -torch.inf).triu(start + 1)
        keys = flat_key[:, :stop].transpose(1, 2)
        scores = torch.baddbmm(future, flat_query[:, start:stop], keys, alpha=width**-0.5)
        parts.append(dropout(scores.softmax(-1), p) @ flat_value[:, :stop])
    return torch.cat(parts, dim=1).view_as(query)
