"""A batch whose sequences use different adapters: each is as if it were alone with its adapter."""

import pytest
import torch
from helpers import randomise, states
from torch.testing import assert_close

from config import InputError, LoRAConfig
from lora import apply_lora
from models import sonnet_gpt
from models.adapters import load_adapter, save_adapter
from models.gpt2 import GPT2Model
from models.mixed_adapters import mixed_adapters
from models.sonnet_gpt import SonnetGPT

PROMPTS = ["From fairest creatures", "a", "When forty winters shall", "That"]


@pytest.fixture
def adapters(folder, tmp_path):
    """The adapter of each of four sequences; they differ in rank, alpha, targets and values."""
    one, two = tmp_path / "1", tmp_path / "2"
    for path, config in (
        (one, LoRAConfig(2, 4.0)),
        (two, LoRAConfig(5, 1.0, targets=("q_proj", "out_dense"))),
    ):
        save_adapter(randomise(apply_lora(GPT2Model.from_pretrained(folder), config)), path)
    return [two, None, one, two]


def alone(folder, adapter):
    gpt = GPT2Model.from_pretrained(folder)
    return gpt if adapter is None else load_adapter(gpt, adapter)


def test_each_sequence_is_as_if_alone(folder, gpt, adapters, ids):
    """Each equals a model with only its adapter; afterwards the model is as before."""
    ids = torch.cat([ids, ids[:1]])
    before = states(gpt, ids)
    with mixed_adapters(SonnetGPT(gpt), adapters):
        mixed = states(gpt, ids)
    for row, adapter in enumerate(adapters):
        expected = states(alone(folder, adapter), ids[row : row + 1])
        assert_close(mixed[row : row + 1], expected, atol=1e-5, rtol=0)
        assert ((mixed[row] - before[row]).abs().max() > 0.1) == (adapter is not None)
    with pytest.raises(InputError, match="positions"), mixed_adapters(gpt, adapters):
        gpt(torch.zeros(4, 65, dtype=torch.long))
    assert torch.equal(states(gpt, ids), before)


def test_generated_texts_equal_separate_runs(folder, gpt, adapters, monkeypatch):
    """Also in several batches."""
    monkeypatch.setattr(sonnet_gpt, "BATCH_SIZE", 3)
    settings = {"temperature": 0, "max_new_tokens": 12, "max_lines": 0}
    texts = SonnetGPT(gpt).generate(PROMPTS, adapters=adapters, **settings)
    assert texts == [
        SonnetGPT(alone(folder, adapter)).generate([prompt], **settings)[0]
        for prompt, adapter in zip(PROMPTS, adapters, strict=True)
    ]
    assert texts != SonnetGPT(gpt).generate(PROMPTS, **settings)


def test_each_prompt_names_its_adapter_and_the_model_has_none(gpt, adapters):
    """A short list would leave sequences to chance; a present adapter would be added to all."""
    with pytest.raises(InputError, match="3 adapters for 4 prompts"):
        SonnetGPT(gpt).generate(PROMPTS, adapters=adapters[:3])
    with pytest.raises(InputError, match="already"):
        SonnetGPT(load_adapter(gpt, adapters[0])).generate(PROMPTS, adapters=adapters)
