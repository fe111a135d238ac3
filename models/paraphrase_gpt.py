"""GPT-2 as a classifier of pairs: do two texts mean the same?"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import lora_layers
from models.adapters import load_model, save_adapter
from models.gpt2 import GPT2Model, init_weights
from models.hugging_face import input_errors
from pooling import POOLINGS

ANSWERS = ("no", "yes")  # the classes; single tokens of GPT-2's vocabulary
HEAD_FILE = "head.safetensors"


class ParaphraseGPT(nn.Module):
    """Pools the hidden states of a GPT2Model and classifies the pooled vector.

    `joint` encoding reads both texts in one prompt. `separate` encodes each text alone and
    classifies [v1; v2; |v1 - v2|; v1 * v2] (Chen et al. 2018). Swapping the texts may change
    the answer.
    """

    def __init__(self, gpt: GPT2Model, pooling: str = "last", pair_encoding: str = "joint") -> None:
        super().__init__()
        self.settings = {"pooling": pooling, "pair_encoding": pair_encoding}
        self.separate = pair_encoding == "separate"
        self.gpt = gpt
        self.pooling = POOLINGS[pooling](gpt.config.n_embd)
        vectors = 4 if self.separate else 1
        self.head = nn.Linear(vectors * self.pooling.width, len(ANSWERS))
        init_weights(self.head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, 2) of no and yes; ids and mask are (B, T) joint or (B, 2, T) separate."""
        mask = attention_mask.flatten(0, -2)
        return self.classify(self.hidden_states(input_ids, mask), mask)

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats per pair; labels (B,).

        Padding must be on the right, so that GPT-2 needs no mask.
        """
        mask = attention_mask.flatten(0, -2)
        return F.cross_entropy(self.classify(self.hidden_states(input_ids), mask), labels)

    def is_frozen(self) -> bool:
        """Whether only pooling and head are trained."""
        return not any(parameter.requires_grad for parameter in self.gpt.parameters())

    def train(self, mode: bool = True) -> "ParaphraseGPT":
        """Set the training mode; a frozen GPT-2 stays in evaluation mode, without dropout."""
        super().train(mode)
        self.gpt.train(mode and not self.is_frozen())
        return self

    def hidden_states(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (texts, T, C) of all texts, for a mask (texts, T) or right padding."""
        return self.gpt(input_ids.flatten(0, -2), mask)["last_hidden_state"]

    def classify(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, 2) in float32 for the hidden states of all texts."""
        pooled = self.pooling(hidden, mask).float()
        if self.separate:
            first, second = pooled[0::2], pooled[1::2]
            pooled = torch.cat([first, second, (first - second).abs(), first * second], dim=1)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.head(pooled)

    def token_weights(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """The weights of a learned pooling in the shape of the ids; None for other poolings."""
        mask = attention_mask.flatten(0, -2)
        weights = self.pooling.token_weights(self.hidden_states(input_ids, mask), mask)
        return None if weights is None else weights.view(input_ids.shape)

    def vocab_logits(self, logits: Tensor) -> Tensor:
        """The two logits (B, 2) at the tokens "no" and "yes" of (B, V); the others are -1e9."""
        wide = logits.new_full((len(logits), self.gpt.config.vocab_size), -1e9)
        wide[:, self.gpt.tokenizer.convert_tokens_to_ids(ANSWERS)] = logits
        return wide

    def head_modules(self) -> nn.ModuleDict:
        """The modules outside of the GPT-2."""
        return nn.ModuleDict({"pooling": self.pooling, "head": self.head})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the GPT-2 or its LoRA adapter, and pooling and head as head.safetensors."""
        if lora_layers(self.gpt):
            save_adapter(self.gpt, folder)
        else:
            self.gpt.save_pretrained(folder)
        path, metadata = Path(folder) / HEAD_FILE, {"settings": json.dumps(self.settings)}
        save_file(self.head_modules().state_dict(), path, metadata)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ParaphraseGPT":
        """Load what save_pretrained wrote; an adapter names its base model.

        Raises InputError if the folder is not a saved ParaphraseGPT.
        """
        gpt, path = load_model(folder), Path(folder) / HEAD_FILE
        failure = f"{path} is not a classifier's head; name the best/ folder of a paraphrase run"
        with input_errors(failure), safe_open(path, "pt") as file:
            model = cls(gpt, **json.loads(file.metadata()["settings"]))
            model.head_modules().load_state_dict(load_file(path))
        return model.eval()
