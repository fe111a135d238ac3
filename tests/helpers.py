"""Functions that several test files share."""

import torch

from lora import lora_layers


def randomise(model):
    """Give every LoRA layer an update that is not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            shape = layer.lora_b.weight.shape
            layer.lora_b.weight.copy_(0.3 * torch.randn(shape, generator=generator))
    return model


@torch.no_grad()
def states(gpt, ids):
    """Hidden states (B, T, C) in evaluation mode."""
    return gpt.eval()(ids)["last_hidden_state"]


def logits(gpt, ids):
    """Logits (B, T, V) in evaluation mode, without a gradient."""
    return gpt.hidden_state_to_token(states(gpt, ids)).detach()
