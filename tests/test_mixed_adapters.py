"""A batch whose rows go through adapters of their own: each as if it were alone with its adapter."""

import pytest
import torch
from helpers import randomise, states
from torch.testing import assert_close

from config import InputError, LoRAConfig
from lora import apply_lora, fingerprint, hold_frozen, load_adapter, mixed_adapters, save_adapter
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT

KINDS = [
    LoRAConfig(2, 4.0),
    LoRAConfig(5, 1.0, targets=("q_proj", "out_dense")),
    LoRAConfig(2, 4.0, targets=("v_proj",)),
]
PROMPTS = ["From fairest creatures", "a", "When forty winters shall besiege", "That", "His tender heir\n"]
ROWS = [1, None, 0, 2, 1]  # each row's adapter, of KINDS
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def folders(folder, tmp_path):
    """Adapters of different rank, alpha and targets, each with its own values."""
    for index, config in enumerate(KINDS):
        torch.manual_seed(index)
        save_adapter(randomise(apply_lora(GPT2Model.from_pretrained(folder), config)), tmp_path / str(index))
    return [tmp_path / str(index) for index in range(len(KINDS))]


def of_rows(folders):
    return [None if row is None else folders[row] for row in ROWS]


def alone(folder, adapter):
    gpt = GPT2Model.from_pretrained(folder)
    return gpt if adapter is None else load_adapter(gpt, adapter)


@torch.no_grad()
def test_each_row_is_as_if_alone(folder, gpt, folders):
    """Every row against a model with its adapter and no other; and the base against the base."""
    ids = torch.randint(0, 300, (len(ROWS), 20), generator=torch.Generator().manual_seed(1))
    with mixed_adapters(gpt, of_rows(folders)):
        mixed = states(gpt, ids)
    for row, adapter in enumerate(of_rows(folders)):
        assert_close(mixed[row : row + 1], states(alone(folder, adapter), ids[row : row + 1]), **CLOSE)
    assert (mixed[0] - states(gpt, ids[:1])).abs().max() > 0.1  # adapters matter


def test_generated_texts_are_those_of_separate_runs(folder, gpt, folders):
    """Rows end at different lines, so the batch shrinks: what is left must keep its own adapter."""
    settings = {"temperature": 0, "max_new_tokens": 30, "max_lines": 2}
    texts = SonnetGPT(gpt).generate(PROMPTS, adapters=of_rows(folders), **settings)
    separate = [SonnetGPT(alone(folder, adapter)).generate([prompt], **settings)[0]
                for prompt, adapter in zip(PROMPTS, of_rows(folders), strict=True)]  # fmt: skip
    assert texts == separate
    assert len({len(text.removeprefix(prompt)) for text, prompt in zip(texts, PROMPTS, strict=True)}) > 1
    assert texts != SonnetGPT(gpt).generate(PROMPTS, **settings)


def test_the_model_is_as_before(gpt, folders, ids):
    """After the block, after an error within it, and after an adapter that can't be read."""
    before, names = states(gpt, ids), [name for name, _ in gpt.named_modules()]
    with pytest.raises(InputError, match="positions"), mixed_adapters(gpt, folders):
        gpt(torch.zeros(3, 65, dtype=torch.long))
    (folders[2] / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="not a LoRA adapter"), mixed_adapters(gpt, folders):
        pass
    assert [name for name, _ in gpt.named_modules()] == names
    assert torch.equal(states(gpt, ids), before)


def test_a_base_held_in_bfloat16_still_knows_its_adapters(gpt, folders, ids):
    """Its float32 weights are gone, and with them what the fingerprint is of: it is taken before."""
    hold_frozen(gpt.requires_grad_(False), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), mixed_adapters(gpt, folders):
        mixed = states(gpt, ids)
    with torch.autocast("cpu", torch.bfloat16):
        own, other = (states(load_adapter(gpt, adapter), ids)[1] for adapter in folders[1:])
    assert (mixed[1] - own).abs().max() < 0.1 * (mixed[1] - other).abs().max()


def test_one_adapter_a_prompt_and_none_on_the_model(gpt, folders):
    """A list that is too short would leave rows to chance; an adapter that is there already would be added to all."""
    with pytest.raises(InputError, match="3 adapters for 5 prompts"):
        SonnetGPT(gpt).generate(PROMPTS, adapters=folders)
    with pytest.raises(InputError, match="has a LoRA adapter already"):
        SonnetGPT(load_adapter(gpt, folders[0])).generate(PROMPTS[:3], adapters=folders)


@pytest.mark.parametrize("fused", [None, True])
def test_the_known_fingerprint_is_forgotten_with_the_weights(gpt, ids, fused):
    """It is kept, as hashing takes a second on a large base; a step, or a new tensor in a weight's place, ends that."""
    seen = {fingerprint(gpt)}
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-3, fused=fused)
    gpt(ids)["last_hidden_state"].sum().backward()
    for change in (
        optimizer.step,
        lambda: gpt.load_state_dict({name: 2 * part for name, part in gpt.state_dict().items()}),
        lambda: gpt.load_state_dict({name: 2 * part for name, part in gpt.state_dict().items()}, assign=True),
        lambda: setattr(gpt.final_norm, "bias", torch.nn.Parameter(gpt.final_norm.bias + 1)),
    ):
        change()
        seen.add(fingerprint(gpt))
        assert fingerprint(gpt) in seen
    assert len(seen) == 5
