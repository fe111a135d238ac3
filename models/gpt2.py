"""GPT-2 (Radford et al. 2019), written by hand."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import GPT2Config, InputError
from modules.attention import KVCache, last_token
from modules.gpt2_layer import GPT2Layer


class GPT2Model(nn.Module):
    """Token ids to hidden states: embeddings, layers, final norm."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.end_of_text = config.eos_token_id  # the token that ends training texts and generation
        self.gradient_checkpointing = False
        self.name: str | None = None  # a size name or folder, with which others load this model
        self.tokenizer: Any = None  # of transformers, from the same folder
        self.settings: Any = None  # transformers' configurations, which are saved with the weights
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(GPT2Layer(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.apply(init_weights)
        for layer in self.layers:  # smaller, because 2 n_layer of them add up in the residual
            for residual in (layer.attention.out_proj, layer.out_dense):
                nn.init.normal_(residual.weight, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> dict[str, Tensor]:
        """`last_hidden_state` (B, T, C) and, of the last real token, `last_token` (B, C).

        `attention_mask` (B, cached + T) is 1 at real tokens, and padding may be on either side. The
        hidden states of texts that are padded on the right need no mask, because causality hides
        padding. With a cache, `input_ids` (B, T) follow the cached tokens. Raises InputError if
        positions run out, but not with both mask and cache: then the caller has to count.
        """
        tokens, cached = input_ids.shape[1], 0 if cache is None else cache.length
        total, limit = cached + tokens, self.config.n_positions
        # In a batch of prompts with padding, which takes no position, total may exceed the limit.
        if total > limit and (attention_mask is None or cache is None):
            raise InputError(f"{total} tokens, but the model has {limit} positions: shorten it")
        key = torch.arange(total, device=input_ids.device)
        if attention_mask is None and cache is None:
            real, mask, positions = torch.ones_like(input_ids), None, key
        else:
            if attention_mask is None:
                attention_mask = torch.ones(len(input_ids), total, device=input_ids.device)
            real, query = attention_mask.bool(), key[cached:, None]
            # A padding token attends to itself: a row without any key would be NaN.
            mask = ((key <= query) & real[:, None, None]) | (key == query)  # (B, 1, T, cached + T)
            positions = (real.cumsum(1) - 1).clamp(min=0)[:, cached:]
            real = real[:, cached:]
        x = self.dropout(self.token_embedding(input_ids) + self.position_embedding(positions))
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, mask, use_reentrant=False)
            else:
                x = layer(x, mask, cache, index)
        if cache is not None:
            cache.length = total
        hidden = self.final_norm(x)
        return {"last_hidden_state": hidden, "last_token": last_token(hidden, real)}

    def hidden_state_to_token(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, (..., C) -> (..., V), with the tied embedding."""
        return F.linear(hidden, self.token_embedding.weight)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; a special token's name in a text is ordinary text.

        Raises InputError for a token that the model does not have.
        """
        if not texts:
            return []
        settings = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        rows = self.tokenizer(texts, **settings)["input_ids"]
        largest = max(map(max, filter(None, rows)), default=0)
        if largest >= self.config.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise InputError(f"a text needs the token {token!r}, which the model does not have")
        return rows

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        settings = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(ids, **settings)

    @classmethod
    def from_pretrained(
        cls, model: str | Path = "tiny", d: int = 0, l: int = 0, num_heads: int = 0
    ) -> "GPT2Model":
        """Load a size name (`tiny`, `gpt2` to `gpt2-xl`) or a Hugging Face folder in float32.

        The course's `d`, `l` and `num_heads` (width, layers, heads) are checked if given. Raises
        InputError for a model that cannot be used. The model is in evaluation mode.
        """
        from models import hugging_face  # here: this file runs without it, and it imports slowly

        gpt = hugging_face.load(model)
        sizes = {"d": gpt.config.n_embd, "l": gpt.config.n_layer, "num_heads": gpt.config.n_head}
        for (name, actual), expected in zip(sizes.items(), (d, l, num_heads), strict=True):
            if expected and expected != actual:
                raise InputError(f"{model} has {name}={actual}, not {expected}; leave it out")
        return gpt

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that GPT2LMHeadModel and AutoTokenizer read, with the loaded settings.

        Raises InputError if LoRA adapters are not merged.
        """
        from models import hugging_face  # here: see from_pretrained

        hugging_face.save(self, Path(folder))


def init_weights(module: nn.Module) -> None:
    """GPT-2's initialization: normal with standard deviation 0.02, biases 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
