"""What more than one test file does to a model."""

import torch

from lora import adapters


def randomise(model):
    """Give every adapter an update that is not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_b.weight.copy_(0.3 * torch.randn(adapter.lora_b.weight.shape, generator=generator))
    return model


@torch.no_grad()
def states(gpt, ids):
    """Hidden states in evaluation mode."""
    return gpt.eval()(ids)["last_hidden_state"]
