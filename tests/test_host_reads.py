"""The host does not wait for a GPU. Models are on the meta device: without values, a read raises.

Only `Tensor.tolist` is replaced, which training and decoding use to read. So its calls are all
reads: item, bool, a copy to the host, nonzero, boolean indexing and equal raise on that device.
"""

import contextlib
import sys

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import training
from config import LoRAConfig, TrainConfig
from datasets import PairsDataset, SonnetsDataset
from lora import apply_lora
from models.gpt2 import GPT2Model, to_device
from models.paraphrase_gpt import ParaphraseGPT
from models.sonnet_gpt import SonnetGPT
from modules.attention import KVCache
from pooling import POOLINGS
from runs import Run
from training import Task, Trainer

META = torch.device("meta")
TEXTS = ["From fairest", "creatures we desire increase", "When forty winters", "a", "thy brow"]
EPOCH = [[step % 5, (step + 2) % 5, (step + 3) % 5] for step in range(25)]


@pytest.fixture
def reads(monkeypatch):
    """The shapes of the tensors that were read, as zeros."""
    shapes, tolist = [], torch.Tensor.tolist

    def read(tensor):
        if tensor.device != META:
            return tolist(tensor)
        shapes.append(tuple(tensor.shape))
        return tolist(torch.zeros(tensor.shape, dtype=tensor.dtype))

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    # The meta device knows neither autocast nor, only by its name, the fused optimizer.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    names = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(names, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setitem(training.LOG_INTERVALS, "meta", 10)
    return shapes


class Copies(TorchDispatchMode):
    """The operations that take a tensor of the host and one of the device, and how they copy."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        on_host = any(tensor.device.type == "cpu" for tensor in tensors)
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        on_device = any(tensor.device == META for tensor in [*tensors, *outputs])
        if on_host and on_device and not kwargs.get("non_blocking"):
            self.waiting.append(str(function))
        return result


def make_trainer(folder, path, kind, pooling="generalized", dtype=torch.float32, **settings):
    """A Trainer on the meta device with 25 steps per epoch and everything that training uses."""
    task, method = kind.split("-")
    gpt = GPT2Model.from_pretrained(folder)
    if task == "sonnets":
        model = SonnetGPT(gpt)
        data = SonnetsDataset(pd.DataFrame({"id": range(5), "text": TEXTS}), gpt)
        num_targets = num_tokens = data.num_targets
        loss = lambda model, batch: model.loss(**batch)  # noqa: E731
    else:
        model = ParaphraseGPT(gpt, pooling, "separate")
        columns = {"sentence1": TEXTS, "sentence2": TEXTS[::-1], "label": [0.0, 1.0, 0.0, 1.0, 1.0]}
        pairs = pd.DataFrame({"id": list("abcde"), "line": range(5), **columns})
        data = PairsDataset(pairs, gpt, "separate")
        num_targets, num_tokens = len, data.num_tokens
        loss = lambda model, batch: model.loss(**batch, right_padded=True)  # noqa: E731
    if method == "lora":
        apply_lora(model, LoRAConfig())
    task = Task(
        batches=lambda epoch: EPOCH,
        collate=data.collate,
        loss=loss,
        num_targets=num_targets,
        num_tokens=num_tokens,
        evaluate=lambda model: {"dev_loss": 1.0},
        save=lambda model, folder: None,
    )
    run = Run("toy", "toy", {"out_dir": str(path), "resume": False}, {})
    config = TrainConfig(**{"lr": 0.1, "epochs": 1} | settings)
    return Trainer(model.to(META), task, config, run, META, dtype)


KINDS = pytest.mark.parametrize(
    "kind", ["sonnets-full", "sonnets-lora", "paraphrases-full", "paraphrases-lora"]
)


@KINDS
def test_training_reads_once_per_log_step(folder, tmp_path, reads, monkeypatch, kind):
    """After steps 10, 20 and 25, two numbers per step and signals; then after the evaluation."""
    monkeypatch.setattr(Trainer, "save", lambda self: None)
    trainer = make_trainer(folder, tmp_path, kind, grad_accumulation=2, max_grad_norm=1.0)
    progress = trainer.train()
    assert reads == [(11, 2), (11, 2), (6, 2), (1, 2)]
    assert [record[1] for record in progress.steps] == list(range(1, 26))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_pooling_reads(folder, tmp_path, reads, pooling):
    trainer = make_trainer(folder, tmp_path, "paraphrases-full", pooling)
    trainer.model.train()
    trainer.step(EPOCH[0], 0.1)
    assert (len(trainer.unread), reads) == (1, [])


def test_float16_scaling_reads_nothing(folder, tmp_path, reads):
    """Neither whether gradients overflowed nor the scale."""
    trainer = make_trainer(folder, tmp_path, "sonnets-lora", dtype=torch.float16)
    trainer.model.train()
    trainer.step(EPOCH[0], 0.1)
    assert trainer.scaler.is_enabled()
    assert (len(trainer.unread), reads) == (1, [])


@KINDS
def test_no_copy_to_the_device_waits(folder, tmp_path, reads, kind):
    """A copy without non_blocking, or an index on the host, waits for all work before it."""
    trainer = make_trainer(folder, tmp_path, kind, grad_accumulation=2, max_grad_norm=1.0)
    trainer.model.train()
    with Copies() as copies:
        trainer.step(EPOCH[0], 0.1)
    assert copies.waiting == []


def test_copies_are_made_from_pinned_memory(monkeypatch):
    """From pageable memory, the host would wait although non_blocking is set."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: calls.append((a, k)) or self)
    for name in ("cpu", "cuda"):
        to_device(torch.ones(1), torch.device(name))
    copied = [((torch.device(name),), {"non_blocking": True}) for name in ("cpu", "cuda")]
    assert calls == [copied[0], "pin", copied[1]]


def test_a_checkpoint_is_a_log_step(folder, tmp_path, reads, monkeypatch):
    """What is saved has been read and checked, and no step is missing in steps.csv."""
    saved = []
    monkeypatch.setattr(Trainer, "save", lambda self: saved.append(len(self.progress.steps)))
    make_trainer(folder, tmp_path, "sonnets-full", checkpoint_every=7).train()
    assert saved == [7, 14, 21, 25]
    assert [shape[0] - 1 for shape in reads] == [7, 3, 4, 6, 1, 4, 0]


@pytest.mark.parametrize("temperature", [0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("top_k", [0, 5])
def test_decoding_reads_once_per_token(gpt, reads, monkeypatch, temperature, top_k):
    """Also after a text has left the batch: here the first does after its second token."""
    model, complete = SonnetGPT(gpt.to(META)), iter([False] * 3 + [True] + [False] * 99)
    monkeypatch.setattr(model, "is_complete", lambda *_: next(complete))
    select = KVCache.select_rows

    def select_rows(cache, rows):  # a list would be copied to the device unseen
        assert rows.device == META
        select(cache, rows)

    monkeypatch.setattr(KVCache, "select_rows", select_rows)
    settings = {"temperature": temperature, "top_k": top_k, "max_new_tokens": 6}
    with Copies() as copies:
        model.generate(TEXTS[:3], **settings)
    assert copies.waiting == []
    assert reads == [(3,), (3,), (2,), (2,), (2,), (2,)]


@pytest.mark.parametrize("text", ["left", "right"])
def test_a_mask_is_not_read(gpt, reads, text):
    """To find padding before a real token in its values would be a read in each forward pass."""
    ids = torch.zeros(2, 4, dtype=torch.long, device=META)
    gpt.to(META)(ids, torch.ones_like(ids), right_padded=text == "right")
    assert reads == []
