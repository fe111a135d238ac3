"""GPT-2 as a classifier of pairs: do two texts mean the same?"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import load_adapter, save_adapter
from config import InputError
from lora import lora_layers
from models.gpt2 import GPT2Model
from pooling import POOLINGS

ANSWERS = ("no", "yes")  # the classes; single tokens of GPT-2's vocabulary
HEAD_FILE = "head.safetensors"


class ParaphraseGPT(nn.Module):
    """Pools the hidden states of a GPT2Model and classifies the pooled vector.

    `joint` encoding reads both texts in one prompt. `separate` encodes each text alone and
    classifies [v1; v2; |v1 - v2|; v1 * v2] (Chen et al. 2018). Other keywords go to the pooling.
    """

    def __init__(self, gpt, pooling="last", pair_encoding="joint", **settings):
        super().__init__()
        if pair_encoding not in ("joint", "separate"):
            raise ValueError(f"pair_encoding is {pair_encoding!r}; expected joint or separate")
        self.settings = {"pooling": pooling, "pair_encoding": pair_encoding, **settings}
        self.separate = pair_encoding == "separate"
        self.gpt = gpt
        self.pooling = POOLINGS[pooling](gpt.config.n_embd, **settings)
        vectors = 4 if self.separate else 1
        self.head = nn.Linear(vectors * self.pooling.width, len(ANSWERS))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids, attention_mask, right_padded=False):
        """Logits (B, 2) of no and yes; ids and mask are (B, T) joint or (B, 2, T) separate.

        `right_padded` is as in GPT2Model.
        """
        return self.classify(*self.encode(input_ids, attention_mask, right_padded))

    def loss(self, input_ids, attention_mask, labels, right_padded=False):
        """Mean cross-entropy in nats per pair, plus the penalty of the pooling; labels (B,)."""
        hidden, mask = self.encode(input_ids, attention_mask, right_padded)
        logits = self.classify(hidden, mask)
        return F.cross_entropy(logits, labels) + self.pooling.penalty(hidden, mask)

    def encode(self, input_ids, attention_mask, right_padded=False):
        """Hidden states (texts, T, C) and mask (texts, T) of all texts."""
        if input_ids.ndim != 2 + self.separate:
            shape = tuple(input_ids.shape)
            raise ValueError(f"input_ids is {shape}; expected (B, T) joint or (B, 2, T) separate")
        mask = attention_mask.flatten(0, -2)
        output = self.gpt(input_ids.flatten(0, -2), mask, right_padded=right_padded)
        return output["last_hidden_state"], mask

    def classify(self, hidden, mask):
        """Logits (B, 2) in float32 for the output of `encode`."""
        pooled = self.pooling(hidden, mask).float()
        if self.separate:
            first, second = pooled[0::2], pooled[1::2]
            pooled = torch.cat([first, second, (first - second).abs(), first * second], dim=1)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled)

    def token_weights(self, input_ids, attention_mask):
        """The weights of a learned pooling in the shape of the ids; None for other poolings."""
        weights = self.pooling.token_weights(*self.encode(input_ids, attention_mask))
        return None if weights is None else weights.view(input_ids.shape)

    def vocab_logits(self, logits):
        """The two logits (B, 2) at the tokens "no" and "yes" of (B, V); the others are -1e9.

        Raises InputError if the tokenizer has no such tokens.
        """
        vocabulary = self.gpt.tokenizer.get_vocab()
        for answer in ANSWERS:
            if answer not in vocabulary:
                raise InputError(f"the tokenizer of {self.gpt.folder} has no token {answer}")
        logits = logits.float()  # float16 has no -1e9
        wide = logits.new_full((len(logits), self.gpt.config.vocab_size), -1e9)
        wide[:, [vocabulary[answer] for answer in ANSWERS]] = logits
        return wide

    def head_modules(self):
        """The modules outside of the GPT-2."""
        return nn.ModuleDict({"pooling": self.pooling, "head": self.head})

    def save_pretrained(self, folder):
        """Write the GPT-2 or its LoRA adapter, and pooling and head as head.safetensors."""
        if lora_layers(self.gpt):
            save_adapter(self.gpt, folder)
        else:
            self.gpt.save_pretrained(folder)
        metadata = {"settings": json.dumps(self.settings)}
        save_file(self.head_modules().state_dict(), Path(folder) / HEAD_FILE, metadata=metadata)

    @classmethod
    def from_pretrained(cls, folder, base="tiny"):
        """Load what save_pretrained wrote; `base` is the model that an adapter was trained on.

        Raises InputError if the folder is not a saved ParaphraseGPT.
        """
        folder = Path(folder)
        path = folder / HEAD_FILE
        if not path.is_file():
            raise InputError(f"{path} not found; name the best/ folder of a paraphrase run")
        if (folder / "adapter_config.json").is_file():
            gpt = load_adapter(GPT2Model.from_pretrained(base), folder)
        else:
            gpt = GPT2Model.from_pretrained(folder)
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads(file.metadata()["settings"])
            model = cls(gpt, **settings)
            model.head_modules().load_state_dict(load_file(path))
        except Exception as error:  # of the file, its JSON, the pooling or torch
            raise InputError(f"{path} is not the head of this model ({error!r})") from error
        return model.eval()
