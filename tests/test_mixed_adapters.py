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

CONFIGS = [
    LoRAConfig(2, 4.0),
    LoRAConfig(5, 1.0, targets=("q_proj", "out_dense")),
    LoRAConfig(2, 4.0, targets=("v_proj",)),
]
PROMPTS = ["From fairest creatures", "a", "When forty winters shall", "That", "His tender heir"]


@pytest.fixture
def adapters(folder, tmp_path):
    """The adapter of each of five sequences; they differ in rank, alpha, targets and values."""
    paths = []
    for index, config in enumerate(CONFIGS):
        torch.manual_seed(index)
        paths.append(tmp_path / str(index))
        save_adapter(randomise(apply_lora(GPT2Model.from_pretrained(folder), config)), paths[-1])
    return [paths[1], None, paths[0], paths[2], paths[1]]


def alone(folder, adapter):
    gpt = GPT2Model.from_pretrained(folder)
    return gpt if adapter is None else load_adapter(gpt, adapter)


def test_each_sequence_is_as_if_alone(folder, gpt, adapters):
    """Each equals a model with only its adapter; afterwards the model is as before."""
    ids = torch.randint(0, 300, (5, 20), generator=torch.Generator().manual_seed(1))
    before, names = states(gpt, ids), [name for name, _ in gpt.named_modules()]
    with torch.no_grad(), mixed_adapters(SonnetGPT(gpt), adapters):
        mixed = states(gpt, ids)
    for row, adapter in enumerate(adapters):
        expected = states(alone(folder, adapter), ids[row : row + 1])
        assert_close(mixed[row : row + 1], expected, atol=1e-5, rtol=0)
        assert ((mixed[row] - before[row]).abs().max() > 0.1) == (adapter is not None)
    assert [name for name, _ in gpt.named_modules()] == names
    assert torch.equal(states(gpt, ids), before)


def test_generated_texts_equal_separate_runs(folder, gpt, adapters, monkeypatch):
    """Also in several batches, and when some texts have ended."""
    monkeypatch.setattr(sonnet_gpt, "BATCH_SIZE", 3)
    settings = {"temperature": 0, "max_new_tokens": 30, "max_lines": 1}
    texts = SonnetGPT(gpt).generate(PROMPTS, adapters=adapters, **settings)
    separate = [
        SonnetGPT(alone(folder, adapter)).generate([prompt], **settings)[0]
        for prompt, adapter in zip(PROMPTS, adapters, strict=True)
    ]
    assert texts == separate
    assert texts != SonnetGPT(gpt).generate(PROMPTS, **settings)


def test_after_an_error_the_model_is_as_before(gpt, adapters, ids):
    """An error within the block, and an adapter that cannot be read."""
    before = states(gpt, ids)
    with pytest.raises(InputError, match="positions"), mixed_adapters(gpt, adapters):
        gpt(torch.zeros(5, 65, dtype=torch.long))
    (adapters[3] / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter_config"), mixed_adapters(gpt, adapters):
        pass
    assert torch.equal(states(gpt, ids), before)


def test_each_prompt_names_its_adapter_and_the_model_has_none(gpt, adapters):
    """A short list would leave sequences to chance; a present adapter would be added to all."""
    with pytest.raises(InputError, match="3 adapters for 5 prompts"):
        SonnetGPT(gpt).generate(PROMPTS, adapters=adapters[:3])
    with pytest.raises(InputError, match="already"):
        SonnetGPT(load_adapter(gpt, adapters[0])).generate(PROMPTS, adapters=adapters)
