"""A copy of a language model for decoding on a CPU, with packed weights.

oneDNN reads weights at the full rate of memory if it may choose their layout once ("packing").
"""

import copy

import torch
from torch import Tensor, nn

from lora import merge_lora
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from speed.training import onednn_is_available, onednn_linear, speed_up


def speed_up_decoding(model: SonnetGPT, dtype: torch.dtype, rows: int) -> SonnetGPT:
    """A copy of the model that shares its parameters and decodes about `rows` texts faster.

    LoRA is merged into the copy. The weights of linear layers are packed, in `dtype`, or cast once
    on a GPU; logits are float32. Use the copy for generation without `adapters` only.
    """
    memo = {id(model.gpt.tokenizer): model.gpt.tokenizer}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    fast = merge_lora(copy.deepcopy(model, memo)).eval()
    if not onednn_is_available(next(model.parameters()).device.type):
        return speed_up(fast)
    for name, part in list(fast.named_modules()):
        if isinstance(part, nn.Linear):
            fast.set_submodule(name, PackedLinear(part.weight, part.bias, dtype, rows))
    fast.gpt.__class__ = PackedGPT2
    head = fast.gpt.token_embedding.weight
    fast.gpt.packed_head = PackedLinear(head, None, torch.float32, rows)
    return fast


class PackedLinear(nn.Module):
    """x W^T + b without gradients, with a copy of W that is packed for about `rows` rows.

    The copy is float32 for float16, and on processors without AVX-512, which pack no bfloat16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int) -> None:
        super().__init__()
        if dtype == torch.float16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            dtype = torch.float32
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in float32."""
        return onednn_linear(x.to(self.weight.dtype), self.weight, self.bias).float()


class PackedGPT2(GPT2Model):
    """A GPT2Model with packed weights; only the packed matrices are not float32."""

    packed_head: PackedLinear

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """As in GPT2Model, without autocast: attention is slower in bfloat16."""
        with torch.autocast("cpu", enabled=False):
            return super().forward(*args, **kwargs)

    def hidden_state_to_token(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, (..., C) -> (..., V)."""
        return self.packed_head(hidden)
