"""One block of GPT-2: pre-norm attention and feed-forward with residuals (Radford et al. 2019)."""

import torch.nn.functional as F
from torch import nn

from modules.attention import CausalSelfAttention
from modules.dropout import Dropout
from modules.onednn import Linear


class GPT2Layer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.interm_dense = Linear(config.n_embd, config.feed_forward_width)
        self.out_dense = Linear(config.feed_forward_width, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x, mask=None, cache=None, layer=0):
        """(B, T, C) -> (B, T, C); `mask` and `cache` as in CausalSelfAttention."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache, layer))
        hidden = F.gelu(self.interm_dense(self.feed_forward_norm(x)), approximate="tanh")
        return x + self.dropout(self.out_dense(hidden))
