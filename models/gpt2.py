"""GPT-2 (Radford et al. 2019) written out, with weights in from and out to Hugging Face folders, exactly."""

import functools
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import GPT2Config, InputError
from models import hugging_face
from modules.attention import KVCache
from modules.dropout import Dropout
from modules.gpt2_layer import GPT2Layer


class GPT2Model(nn.Module):
    """Tokens to hidden states: embeddings, layers, final norm. Heads and adapters are built around it."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.folder: Path | None = None  # where the weights came from; the tokenizer is there too
        self.checkpointing = False  # whether to compute activations twice instead of keeping them
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(GPT2Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)

    def initialise(self) -> None:
        """GPT-2's random start: N(0, 0.02), the projections into the residual stream smaller, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                into_residual = name.endswith(("out_proj.weight", "out_dense.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.layers if into_residual else 1))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> dict[str, Tensor]:
        """Hidden states (B, T, C) for ids (B, T), and each row's at its last real token, (B, C).

        `attention_mask` (B, tokens in the cache + T) is 1 at real tokens; padding may be on either side. With a
        cache, `input_ids` are the tokens that follow those it holds. Raises InputError past the last position.
        """
        batch, new = input_ids.shape
        past = cache.length if cache is not None else 0
        if past + new > self.config.positions:
            raise InputError(f"{past + new} tokens, but this model has {self.config.positions} positions: shorten it")
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past + new)
        if attention_mask.shape != (batch, past + new):
            raise InputError(f"attention_mask is {tuple(attention_mask.shape)}; expected {(batch, past + new)}")
        real = attention_mask.bool()

        positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        mask = None
        if not _right_padded(real) or (past and (new > 1 or not real.all())):
            causal = torch.ones(new, past + new, dtype=torch.bool, device=real.device).tril(past)
            itself = torch.eye(past + new, dtype=torch.bool, device=real.device)[past:]
            mask = (causal & real[:, None, None, :]) | itself  # a row masked whole would be NaN

        x = self.dropout(self.token_embedding(input_ids) + self.position_embedding(positions))
        for index, layer in enumerate(self.layers):
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, mask, cache, index, use_reentrant=False)
            else:
                x = layer(x, mask, cache, index)
        if cache is not None:
            cache.length += new
        hidden = self.final_norm(x)
        last = (real[:, past:] * torch.arange(1, new + 1, device=real.device)).argmax(1)
        return {"last_hidden_state": hidden, "last_token": hidden[torch.arange(batch, device=hidden.device), last]}

    def hidden_state_to_token(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, (..., C) -> (..., V), through the tied embedding."""
        if hidden.ndim == 2:  # a token a row, as in decoding: with the tall matrix first, twice as fast on a CPU
            return (self.token_embedding.weight @ hidden.T).T.contiguous()
        return nn.functional.linear(hidden, self.token_embedding.weight)

    @functools.cached_property
    def tokenizer(self):
        """The `tokenizers.Tokenizer` of the folder that the weights came from."""
        return hugging_face.load_tokenizer(self.folder, self.config.vocab_size)

    @property
    def end_of_text(self) -> int:
        """The id of the token that ends a text: the last of GPT-2's vocabulary where no tokenizer says otherwise."""
        has_tokenizer = self.folder and any((self.folder / name).is_file() for name in hugging_face.TOKENIZER_FILES)
        return self.tokenizer.token_to_id(hugging_face.END_OF_TEXT) if has_tokenizer else self.config.vocab_size - 1

    @classmethod
    def from_pretrained(cls, model: str | Path = "tiny", **expected: int) -> "GPT2Model":
        """Load a size name (`tiny`, or a GPT-2 from the hub) or a Hugging Face folder, in float32.

        `d`, `l` and `num_heads`, if given, must agree with the weights. Raises InputError for what can't be used.
        """
        folder = hugging_face.find_model(model)
        config = hugging_face.read_config(folder)
        for keyword, actual in {"d": config.width, "l": config.layers, "num_heads": config.heads}.items():
            if expected.pop(keyword, actual) != actual:
                raise InputError(f"{model} has {keyword}={actual}; leave {keyword} out, or name another model")
        if expected:
            raise TypeError(f"from_pretrained() got unexpected arguments: {', '.join(expected)}")
        with torch.device("meta"):  # no time for random weights that are replaced at once
            gpt = cls(config)
        expected = {name: tensor.shape for name, tensor in gpt.state_dict().items()}
        gpt.load_state_dict(hugging_face.read_weights(folder, expected), assign=True)
        gpt.folder = folder
        return gpt.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json, model.safetensors and the tokenizer's files, as `GPT2LMHeadModel` reads them.

        Raises InputError while adapters are unmerged.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().to("cpu", dtype) for name, tensor in self.state_dict().items()}
        if any(".base." in name for name in state):
            raise InputError("the model has unmerged LoRA adapters: merge_lora first, or save_adapter instead")
        tensors = hugging_face.to_hugging_face(state, self.config.layers)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(hugging_face.config_to_json(self.config, self.end_of_text), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8", newline="\n")
        for name in hugging_face.TOKENIZER_FILES:
            if self.folder and (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)


def _right_padded(real: Tensor) -> bool:
    """Whether no row of (B, T) has padding before a real token: then causality alone hides the padding."""
    return bool((real[:, 1:] <= real[:, :-1]).all())
