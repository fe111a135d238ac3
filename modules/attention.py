"""Causal self-attention (Vaswani et al. 2017) and the key-value cache that makes decoding cheap.

Dimensions in this project: B batch, T tokens, C width, H heads, D head width, V vocabulary, R rank.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.dropout import dropout
from modules.onednn import Linear


class KVCache:
    """Keys and values of all layers for the tokens seen so far, in memory that is allocated once.

    It has the precision of the first keys that it gets, so nothing is converted later.
    """

    def __init__(self, config, batch, max_tokens):
        self.shape = (config.n_layer, batch, config.n_head, max_tokens, config.head_width)
        self.keys = self.values = None
        self.length = 0  # cached tokens; GPT2Model advances it after the last layer

    def append(self, layer, key, value):
        """Store (B, H, T, D) and return all keys and values of the layer, (B, H, length + T, D)."""
        if self.keys is None:
            self.keys, self.values = key.new_empty(self.shape), key.new_empty(self.shape)
        stop = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : stop] = key
        self.values[layer, :, :, self.length : stop] = value
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def select_rows(self, indices):
        """Keep only these sequences of the batch."""
        self.keys, self.values = self.keys[:, indices], self.values[:, indices]


class CausalSelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V per head; a token attends to itself and to earlier tokens."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.attn_pdrop
        self.q_proj = Linear(config.n_embd, config.n_embd)
        self.k_proj = Linear(config.n_embd, config.n_embd)
        self.v_proj = Linear(config.n_embd, config.n_embd)
        self.out_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None, layer=0):
        """(B, T, C) -> (B, T, C).

        `mask` (B, 1, T, cached + T) is True where a query may attend; None means causal.
        """
        query, key, value = (
            projection(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, H, T, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            if query.device.type == "cpu" and query.dtype == torch.bfloat16:
                # For single queries, four times as fast as the fused kernel in bfloat16.
                query, key, value = query.float(), key.float(), value.float()
            key, value = cache.append(layer, key, value)
        p = self.dropout if self.training else 0.0
        # On a CPU, torch's fused kernel has no dropout and slow bfloat16 gradients (2 to 5 times).
        fused_is_slow = p > 0 or (self.training and query.dtype == torch.bfloat16)
        eager_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
        if fused_is_slow and mask is None and eager_cpu:
            heads = causal_attention(query, key, value, p)
        else:
            # With a cache, a single query attends to all.
            is_causal = mask is None and (cache is None or query.shape[2] > 1)
            heads = F.scaled_dot_product_attention(query, key, value, mask, p, is_causal)
        return self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, T, C)


def causal_attention(query, key, value, p, block=256):
    """dropout(softmax(Q K^T / sqrt(D)), p) V, written out, for queries that are the last tokens.

    (B, H, T, D) and twice (B, H, cached + T, D) -> (B, H, T, D). Queries are processed in blocks,
    so that most of the masked half of long texts is not computed.
    """
    tokens, head_width = query.shape[2:]
    cached = key.shape[2] - tokens
    queries, keys, values = (part.flatten(0, 1) for part in (query, key, value))  # (B * H, T, D)
    outputs = []
    for start in range(0, tokens, block):
        stop = min(start + block, tokens)
        visible = cached + stop
        future = query.new_full((stop - start, visible), -torch.inf).triu(cached + start + 1)
        visible_keys = keys[:, :visible].transpose(1, 2)
        scores = torch.baddbmm(future, queries[:, start:stop], visible_keys, alpha=head_width**-0.5)
        weights = dropout(scores.softmax(-1), p)  # (B * H, stop - start, visible)
        outputs.append(weights @ values[:, :visible])
    return torch.cat(outputs, dim=1).view_as(query)
