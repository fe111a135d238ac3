"""A batch whose sequences use different adapters: each is as if it were alone with its adapter."""

import pytest
import torch
from helpers import randomise, states
from torch.testing import assert_close

from adapters import load_adapter, mixed_adapters, save_adapter, select_rows
from config import InputError, LoRAConfig
from lora import apply_lora, cast_frozen_weights
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT

CONFIGS = [
    LoRAConfig(2, 4.0),
    LoRAConfig(5, 1.0, targets=("q_proj", "out_dense")),
    LoRAConfig(2, 4.0, targets=("v_proj",)),
]
PROMPTS = ["From fairest creatures", "a", "When forty winters shall", "That", "His tender heir"]
ADAPTERS = [1, None, 0, 2, 1]  # of each sequence, by index in CONFIGS
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def folders(folder, tmp_path):
    """Adapters that differ in rank, alpha, targets and values."""
    paths = []
    for index, config in enumerate(CONFIGS):
        torch.manual_seed(index)
        paths.append(tmp_path / str(index))
        save_adapter(randomise(apply_lora(GPT2Model.from_pretrained(folder), config)), paths[-1])
    return paths


def of_sequences(folders):
    return [None if index is None else folders[index] for index in ADAPTERS]


def alone(folder, adapter):
    gpt = GPT2Model.from_pretrained(folder)
    return gpt if adapter is None else load_adapter(gpt, adapter)


@torch.no_grad()
def test_each_sequence_is_as_if_alone(folder, gpt, folders):
    """Each equals a model with only its adapter, also after some have left the batch."""
    ids = torch.randint(0, 300, (5, 20), generator=torch.Generator().manual_seed(1))
    remaining = torch.tensor([3, 0])
    with mixed_adapters(gpt, of_sequences(folders)):
        mixed = states(gpt, ids)
        select_rows(gpt, remaining)
        fewer = states(gpt, ids[remaining])
    for index, adapter in enumerate(of_sequences(folders)):
        expected = states(alone(folder, adapter), ids[index : index + 1])
        assert_close(mixed[index : index + 1], expected, **CLOSE)
    assert_close(fewer, mixed[remaining], **CLOSE)
    assert (mixed[0] - states(gpt, ids[:1])).abs().max() > 0.1  # the adapters have an effect


def test_generated_texts_equal_separate_runs(folder, gpt, folders):
    """When a text has ended, it leaves the batch; the others keep their own adapter."""
    settings = {"temperature": 0, "max_new_tokens": 30, "max_lines": 1}
    texts = SonnetGPT(gpt).generate(PROMPTS, adapters=of_sequences(folders), **settings)
    separate = [
        SonnetGPT(alone(folder, adapter)).generate([prompt], **settings)[0]
        for prompt, adapter in zip(PROMPTS, of_sequences(folders), strict=True)
    ]
    assert texts == separate
    settings["max_new_tokens"] = 29
    shorter = SonnetGPT(gpt).generate(PROMPTS, adapters=of_sequences(folders), **settings)
    continued = [text != before for text, before in zip(texts, shorter, strict=True)]
    assert any(continued)
    assert not all(continued)  # some ended before the last step
    assert texts != SonnetGPT(gpt).generate(PROMPTS, **settings | {"max_new_tokens": 30})


def test_afterwards_the_model_is_as_before(gpt, folders, ids):
    """After the block, after an error within it, and after an adapter that cannot be read."""
    before, names = states(gpt, ids), [name for name, _ in gpt.named_modules()]
    with pytest.raises(InputError, match="positions"), mixed_adapters(gpt, folders):
        gpt(torch.zeros(3, 65, dtype=torch.long))
    (folders[2] / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not a readable"), mixed_adapters(gpt, folders):
        pass
    assert [name for name, _ in gpt.named_modules()] == names
    assert torch.equal(states(gpt, ids), before)


def test_a_base_cast_to_bfloat16_still_accepts_its_adapters(gpt, folders, ids):
    """The SHA-256 is computed before the float32 weights are cast."""
    cast_frozen_weights(gpt.requires_grad_(False), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), mixed_adapters(gpt, folders):
        mixed = states(gpt, ids)
    with torch.autocast("cpu", torch.bfloat16):
        own, other = (states(load_adapter(gpt, adapter), ids)[1] for adapter in folders[1:])
    assert (mixed[1] - own).abs().max() < 0.1 * (mixed[1] - other).abs().max()


def test_each_prompt_names_its_adapter_and_the_model_has_none(gpt, folders):
    """A short list would leave sequences to chance; a present adapter would be added to all."""
    with pytest.raises(InputError, match="3 adapters for 5 prompts"):
        SonnetGPT(gpt).generate(PROMPTS, adapters=folders)
    with pytest.raises(InputError, match="already"):
        SonnetGPT(load_adapter(gpt, folders[0])).generate(PROMPTS[:3], adapters=folders)
