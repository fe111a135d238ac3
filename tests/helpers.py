"""Functions that several test files share."""

import os
import signal

import pytest
import torch

from config import Interrupted
from lora import lora_layers
from training import Trainer


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


def interrupt_after_an_epoch(monkeypatch, train):
    """Call train(), which receives Ctrl-C when its first epoch has ended."""
    end_epoch = Trainer.end_epoch

    def end_and_stop(self):
        end_epoch(self)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", end_and_stop)
        with pytest.raises(Interrupted):
            train()
