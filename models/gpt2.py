"""GPT-2 (Radford et al. 2019), written by hand, with the weights of Hugging Face folders."""

import functools
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from config import InputError
from lora import lora_layers
from models import hugging_face
from modules.dropout import Dropout
from modules.gpt2_layer import GPT2Layer
from pooling import last_token


def to_device(tensor, device):
    """Copy a tensor of the host; on CUDA the host does not wait, which needs pinned memory."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class GPT2Model(nn.Module):
    """Token ids to hidden states: embeddings, layers, final norm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.folder = None  # of the weights and the tokenizer
        self.name = None  # how the model is loaded elsewhere: hub name or path
        self.raw_config = {}  # config.json as it was loaded
        self.copied_files = []  # files of `folder` that are saved with the model
        self.known_sha256 = None, None  # of lora.weights_sha256
        self.gradient_checkpointing = False
        self.packed_head = None  # see modules.onednn
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        self.dropout = Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(GPT2Layer(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(self, input_ids, attention_mask=None, cache=None, right_padded=False):
        """Hidden states (B, T, C) and that of each last real token (B, C) for ids (B, T).

        `attention_mask` (B, cached + T) is 1 at real tokens; padding may be on either side. If
        `right_padded` promises that no padding precedes a real token, the blocks need no mask:
        causality hides the padding. With a cache, `input_ids` follow the cached tokens. Raises
        InputError if positions run out.
        """
        batch, tokens = input_ids.shape
        cached = cache.length if cache is not None else 0
        total, limit = cached + tokens, self.config.n_positions
        if total > limit:
            raise InputError(
                f"{total} tokens, but the model has {limit} positions; shorten the text"
            )
        device = input_ids.device
        real = torch.ones(batch, total, dtype=torch.bool, device=device)
        needs_mask = cached > 0 and tokens > 1
        if attention_mask is not None:
            if attention_mask.shape != real.shape:
                raise InputError(f"attention_mask must have the shape {tuple(real.shape)}")
            real = attention_mask.bool()
            # To look for padding before a real token would make the host wait for a GPU.
            needs_mask = needs_mask or not right_padded
        mask = None
        if needs_mask:
            key = torch.arange(total, device=device)
            query = key[cached:, None]
            # A padding token attends to itself: a row without any key would be NaN.
            mask = (key <= query) & real[:, None, None] | (key == query)  # (B, 1, T, cached + T)
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, cached:]
        x = self.dropout(self.token_embedding(input_ids) + self.position_embedding(positions))
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, mask, cache, index, use_reentrant=False)
            else:
                x = layer(x, mask, cache, index)
        if cache is not None:
            cache.length = total
        hidden = self.final_norm(x)
        last = last_token(hidden, real[:, cached:])
        return {"last_hidden_state": hidden, "last_token": last}

    def hidden_state_to_token(self, hidden):
        """Logits over the vocabulary, (..., C) -> (..., V), with the tied embedding."""
        if self.packed_head is not None:
            return self.packed_head(hidden)
        return F.linear(hidden, self.token_embedding.weight)

    @functools.cached_property
    def tokenizer(self):
        """The transformers tokenizer of the model's folder; raises InputError if it has none."""
        return hugging_face.load_tokenizer(self.folder)

    @functools.cached_property
    def end_of_text(self):
        """The token that ends training texts and stops generation.

        config.json decides, not generation_config.json. If it sets none, the tokenizer does; if
        that has none in the vocabulary either, None: generation only stops at its limits.
        """
        if self.config.eos_token_id is not None or self.folder is None:
            return self.config.eos_token_id
        eos = self.tokenizer.eos_token_id
        return eos if eos in range(self.config.vocab_size) else None

    def encode(self, texts):
        """Token ids of each text, without an end-of-text token that the tokenizer may append.

        Raises InputError for a token that the model does not have.
        """
        if not texts:
            return []
        # The mask is 1 at tokens that the tokenizer has added.
        encoded = self.tokenizer(texts, return_special_tokens_mask=True, verbose=False)
        rows = encoded["input_ids"]
        for row, added in zip(rows, encoded["special_tokens_mask"], strict=True):
            if added[-1:] == [1] and row[-1] == self.end_of_text:
                row.pop()
        largest = max(chain.from_iterable(rows), default=0)
        if largest >= self.config.vocab_size:
            name = self.tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"a text contains the token {name!r} ({largest}), but the model has "
                f"{self.config.vocab_size} tokens; remove it from the text"
            )
        return rows

    def decode(self, ids):
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    @classmethod
    def from_pretrained(cls, model="tiny", *, d=None, l=None, num_heads=None):  # noqa: E741
        """Load a size name (`tiny`, `gpt2` to `gpt2-xl`) or a Hugging Face folder in float32.

        `d`, `l` and `num_heads` (width, layers, heads) are checked if given. Raises InputError for
        a model that cannot be used. The model is in evaluation mode.
        """
        folder = hugging_face.find_model(model)
        config, raw_config = hugging_face.read_config(folder)
        for name, expected, actual in (
            ("d", d, config.n_embd),
            ("l", l, config.n_layer),
            ("num_heads", num_heads, config.n_head),
        ):
            if expected not in (None, actual):
                raise InputError(f"{model} has {name}={actual}, not {expected}; leave it out")
        with torch.device("meta"):  # no random initialization
            gpt = cls(config)
        gpt.load_state_dict(hugging_face.load_weights(folder, config), assign=True)
        gpt.folder = folder
        gpt.name = hugging_face.portable_name(model, folder)
        gpt.raw_config = raw_config
        gpt.copied_files = hugging_face.matching_files(folder, hugging_face.COPIED_PATTERNS)
        return gpt.eval()

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write a Hugging Face folder; raises InputError if LoRA adapters are not merged."""
        if lora_layers(self):
            raise InputError("the model has LoRA adapters: call merge_lora, or use save_adapter")
        hugging_face.save_model(self, Path(folder), dtype)
