"""GPT-2 as a judge of pairs: do two texts mean the same? A pooling over its hidden states and a head of two classes."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import InputError
from lora import adapters, load_adapter, save_adapter
from models.gpt2 import GPT2Model
from pooling import POOLINGS

ANSWERS = ("no", "yes")  # the classes, in the order of the logits; single tokens of GPT-2's vocabulary
HEAD_FILE = "head.safetensors"


class ParaphraseGPT(nn.Module):
    """A GPT2Model whose hidden states are pooled and classified.

    With `joint` encoding a prompt holds both texts. With `separate` each is read alone, into v1 and v2, and the head
    sees [v1; v2; |v1 - v2|; v1 * v2] (Chen et al. 2018). Further keywords go to the pooling.
    """

    def __init__(self, gpt: GPT2Model, pooling: str = "last", pair_encoding: str = "joint", **settings):
        super().__init__()
        if pair_encoding not in ("joint", "separate"):
            raise ValueError(f"pair_encoding is {pair_encoding!r}; expected joint or separate")
        self.settings = {"pooling": pooling, "pair_encoding": pair_encoding, **settings}
        self.gpt = gpt
        self.pooling = POOLINGS[pooling](gpt.config.width, **settings)
        self.head = nn.Linear(self.pooling.width * (4 if pair_encoding == "separate" else 1), len(ANSWERS))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, 2) of no and yes, for ids and mask (B, T), or (B, 2, T) in separate encoding."""
        return self._classify(*self._encode(input_ids, attention_mask))

    def loss(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a pair, against labels (B,) of 0 and 1; the pooling's penalty is added to it."""
        hidden, mask = self._encode(input_ids, attention_mask)
        return F.cross_entropy(self._classify(hidden, mask).float(), labels) + self.pooling.penalty(hidden, mask)

    def _encode(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of every text, a text a row, and its mask."""
        if input_ids.ndim != (3 if self.settings["pair_encoding"] == "separate" else 2):
            raise ValueError(f"input_ids is {tuple(input_ids.shape)}; expected (B, T) joint, (B, 2, T) separate")
        rows, mask = input_ids.flatten(0, -2), attention_mask.flatten(0, -2)
        return self.gpt(rows, mask)["last_hidden_state"], mask

    def _classify(self, hidden: Tensor, mask: Tensor) -> Tensor:
        pooled = self.pooling(hidden, mask)
        if self.settings["pair_encoding"] == "separate":
            first, second = pooled[0::2], pooled[1::2]
            pooled = torch.cat([first, second, (first - second).abs(), first * second], dim=1)
        with torch.autocast(pooled.device.type, enabled=False):  # a product of two features may overflow float16
            return self.head(pooled)

    def token_weights(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """How much each token counts in a learned pooling, in the shape of the ids; else None."""
        weights = self.pooling.token_weights(*self._encode(input_ids, attention_mask))
        return None if weights is None else weights.view(input_ids.shape)

    def vocab_logits(self, logits: Tensor) -> Tensor:
        """The cloze form: logits (B, 2) at the vocabulary's tokens "no" and "yes", (B, V), and -1e9 elsewhere.

        Raises InputError where the tokenizer has no such tokens.
        """
        tokens = [self.gpt.tokenizer.token_to_id(answer) for answer in ANSWERS]
        if None in tokens:
            raise InputError(f"the tokenizer of {self.gpt.folder} lacks one of the tokens {', '.join(ANSWERS)}")
        logits = logits.float()  # float16 has no -1e9
        wide = logits.new_full((len(logits), self.gpt.config.vocab_size), -1e9)
        wide[:, tokens] = logits
        return wide

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the GPT-2's folder, or its adapter's where it has one, and head.safetensors beside it."""
        (save_adapter if adapters(self.gpt) else GPT2Model.save_pretrained)(self.gpt, folder)
        own = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in self._own.state_dict().items()}
        save_file(own, Path(folder) / HEAD_FILE, metadata={"settings": json.dumps(self.settings)})

    @property
    def _own(self) -> nn.ModuleDict:
        """What the GPT-2 does not have."""
        return nn.ModuleDict({"pooling": self.pooling, "head": self.head})

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: str | Path = "tiny") -> "ParaphraseGPT":
        """Load what save_pretrained wrote; `base` is the model an adapter was trained on.

        Raises InputError for a folder that is not one.
        """
        folder = Path(folder)
        path = folder / HEAD_FILE
        if not path.is_file():
            raise InputError(f"{path} not found; name a folder that paraphrase_detection.py saved, as runs/.../best")
        is_adapter = (folder / "adapter_config.json").is_file()
        gpt = GPT2Model.from_pretrained(base if is_adapter else folder)
        if is_adapter:
            load_adapter(gpt, folder)
        try:
            with safe_open(path, "pt") as file:
                model = cls(gpt, **json.loads((file.metadata() or {})["settings"]))
                model._own.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, InputError) as error:
            raise InputError(f"{path} is not the head of this model ({error!r}); train it anew") from error
        return model.eval()
