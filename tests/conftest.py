"""Shared fixtures: a tiny random GPT-2 with its own tokenizer, as transformers saves it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel

from models.gpt2 import GPT2Model

VERSE = (
    "From fairest creatures we desire increase,\nThat thereby beauty's rose might never die,\n"
    "But as the riper should by time decease,\nHis tender heir might bear his memory:\n"
    "When forty winters shall besiege thy brow,\nAnd dig deep trenches in thy beauty's field,\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder: 2 layers, width 32, 4 heads, 300 tokens, 64 positions."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": 299, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([VERSE], trainers.BpeTrainer(**settings))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))

    end = tokenizer.token_to_id("<|endoftext|>")
    shape = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**shape, bos_token_id=end, eos_token_id=end)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # at 0 and 1, biases and norms hide errors
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


@pytest.fixture
def gpt(folder):
    """Our model of the folder, in evaluation mode."""
    return GPT2Model.from_pretrained(folder)


@pytest.fixture
def reference(folder):
    """transformers' model of the same folder, in evaluation mode."""
    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def ids():
    """Random token ids (3, 20)."""
    return torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))
