"""One block of GPT-2: pre-norm attention and feed-forward, each added to the residual stream (Radford et al. 2019)."""

import torch.nn.functional as F
from torch import Tensor, nn

from config import GPT2Config
from modules.attention import CausalSelfAttention, KVCache
from modules.dropout import Dropout


class GPT2Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.interm_dense = nn.Linear(config.width, config.feed_forward_width)
        self.out_dense = nn.Linear(config.feed_forward_width, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` and `cache` as in CausalSelfAttention."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache, layer))
        hidden = F.gelu(self.interm_dense(self.feed_forward_norm(x)), approximate="tanh")
        return x + self.dropout(self.out_dense(hidden))
