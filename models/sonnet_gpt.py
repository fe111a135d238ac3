"""GPT-2 as a language model: logits, loss and generation."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import InputError, SamplingConfig, seed_from
from models.generation import Continuation, continue_batch
from models.gpt2 import GPT2Model
from models.mixed_adapters import mixed_adapters
from modules.loss import VocabularyLoss

BATCH_SIZE = 32  # prompts that are continued together


class SonnetGPT(nn.Module):
    """A GPT2Model with its tied output embedding."""

    def __init__(self, gpt: GPT2Model) -> None:
        super().__init__()
        self.gpt = gpt
        self.vocabulary_loss = VocabularyLoss()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each position."""
        hidden = self.gpt(input_ids, attention_mask)["last_hidden_state"]
        return self.gpt.hidden_state_to_token(hidden)

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token over labels (B, T) that are not -100.

        Label t is the token after input t. Right padding needs no mask because of causality.
        """
        hidden = self.gpt(input_ids)["last_hidden_state"]
        return self.vocabulary_loss(hidden, self.gpt.token_embedding.weight, labels)

    def generate(self, prompts: list[str], **settings: Any) -> list[str]:
        """Each prompt with its continuation; `settings` are those of continue_texts."""
        return [text for text, _ in self.continue_texts(prompts, **settings)]

    def continue_texts(
        self,
        prompts: list[str],
        seed: int = 0,
        adapters: list[str | Path | None] | None = None,
        **sampling: float,
    ) -> list[Continuation]:
        """Each prompt with its continuation; `sampling` is as in SamplingConfig.

        A text ends at the end-of-text token, with its `max_lines`th line, after `max_new_tokens`,
        or where positions end. Each text has random numbers of its own, so it does not depend on
        the other prompts. `adapters` names a LoRA adapter's folder or None for each prompt. Raises
        InputError for settings, prompts or adapters that cannot be used.
        """
        config = SamplingConfig(**sampling)
        if isinstance(prompts, str):  # its characters would be prompts
            raise InputError(f"prompts must be a list of texts, not the text {prompts!r}")
        adapters = [None] * len(prompts) if adapters is None else adapters
        if len(adapters) != len(prompts):
            raise InputError(f"{len(adapters)} adapters for {len(prompts)} prompts")
        # The same prompt again gets other random numbers.
        seeds = [seed_from(seed, text, prompts[:i].count(text)) for i, text in enumerate(prompts)]
        was_training = self.gpt.training
        self.gpt.eval()
        texts = []
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            with mixed_adapters(self, adapters[batch]), torch.no_grad():
                texts += continue_batch(self.gpt, prompts[batch], config, seeds[batch])
        self.gpt.train(was_training)
        return texts
