"""One block of GPT-2: pre-norm attention and feed-forward with residuals (Radford et al. 2019)."""

import torch.nn.functional as F
from torch import Tensor, nn

from config import GPT2Config
from modules.attention import CausalSelfAttention, KVCache


class GPT2Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.interm_dense = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.out_dense = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` and `cache` as in CausalSelfAttention."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache, layer))
        hidden = F.gelu(self.interm_dense(self.feed_forward_norm(x)), approximate="tanh")
        return x + self.dropout(self.out_dense(hidden))
