"""--compile: one graph without breaks, the results of eager mode, and runs as without it.

The backends "eager" and "aot_eager" trace the model like the default one, but compile no code.
"""

import functools
from unittest import mock

import pandas as pd
import pytest
import torch
from helpers import interrupt_after_an_epoch
from kill_everywhere import SCRIPTS, make_model
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import models.gpt2
from config import InputError, LoRAConfig
from lora import apply_lora
from models.paraphrase_gpt import ParaphraseGPT
from models.sonnet_gpt import SonnetGPT
from modules.loss import IGNORE_INDEX

VARIANTS = pytest.mark.parametrize(
    ("task", "lora", "checkpointing"),
    [
        ("sonnets", False, False),
        ("sonnets", True, True),
        ("paraphrases", False, True),
        ("paraphrases", True, False),
    ],
)


@pytest.fixture(autouse=True)
def fresh():
    """Graphs of other tests do not count."""
    torch._dynamo.reset()


def make_task(gpt, task, lora, dropout):
    """A task model of one layer in training mode, and its loss on a batch with right padding."""
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(20) < torch.tensor([[20], [13], [1]])
    gpt.layers = gpt.layers[:1]
    model = SonnetGPT(gpt) if task == "sonnets" else ParaphraseGPT(gpt, "generalized")
    if lora:
        apply_lora(model, LoRAConfig(dropout=dropout))
    for part in gpt.modules():
        if hasattr(part, "p"):
            part.p = dropout
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = dropout
    if task == "sonnets":
        batch = {"input_ids": ids, "labels": ids.roll(-1, 1).masked_fill(~mask, IGNORE_INDEX)}
    else:
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}
    return model.train(), lambda: model.loss(**batch)


def gradients(model, loss):
    """The loss and the gradient of every trained parameter."""
    model.zero_grad()
    loss = loss()
    loss.backward()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in named}}


@VARIANTS
def test_training_with_dropout_is_one_graph(gpt, monkeypatch, task, lora, checkpointing):
    """With fullgraph, a graph break is an error. Two losses differ because dropout is active."""
    model, loss = make_task(gpt, task, lora, dropout=0.1)
    gpt.gradient_checkpointing = checkpointing
    counter = CompileCounter()
    monkeypatch.delattr("modules.attention.causal_attention")  # only the fused one is in a graph
    gpt.compile(dynamic=True, fullgraph=True, backend=counter)
    first, second = gradients(model, loss), gradients(model, loss)
    assert counter.frame_count == 1
    assert first["loss"] != second["loss"]
    assert all(value.isfinite().all() for value in first.values())


@VARIANTS
def test_losses_and_gradients_are_those_of_eager_mode(gpt, task, lora, checkpointing):
    """Without dropout, and the parameters keep their names. LoRA has an operation in place."""
    model, loss = make_task(gpt, task, lora, dropout=0.0)
    eager = gradients(model, loss)
    names = list(model.state_dict())
    gpt.gradient_checkpointing = checkpointing
    gpt.compile(dynamic=True, fullgraph=True, backend="aot_eager" if lora else "eager")
    assert_close(gradients(model, loss), eager, atol=1e-6, rtol=1e-6)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_left_padding_and_evaluation_mode(gpt, ids):
    """A compiled graph has the mask even if the batch has no padding."""
    masks = torch.ones(3, 3, 20)
    masks[1, 1, :5] = masks[2, 1, 15:] = 0
    expected = [gpt(ids, mask) for mask in masks]
    gpt.compile(dynamic=True, fullgraph=True, backend="eager")
    for mask, outputs in zip(masks, expected, strict=True):
        hidden = gpt(ids, mask)
        assert_close(hidden["last_token"], outputs["last_token"])
        real = mask.bool()
        assert_close(hidden["last_hidden_state"][real], outputs["last_hidden_state"][real])


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run a script on a tiny model; --compile traces with a counter and allows no graph break."""
    monkeypatch.chdir(tmp_path)
    sonnets = [f"{n}\n\nFrom\nfairest\nwe\n{'thy brow ' * n}\n" for n in range(1, 14)]
    (tmp_path / "sonnets.txt").write_text("\n".join(sonnets), encoding="utf-8")
    pairs = [f"p{n}\t{'thy brow ' * n}\tthy\t{n % 2}\n" for n in range(1, 14)]
    table = "id\tsentence1\tsentence2\tis_duplicate\n" + "".join(pairs)
    (tmp_path / "pairs.csv").write_text(table, encoding="utf-8")
    config = make_model(tmp_path / "model") / "config.json"
    text = config.read_text(encoding="utf-8")
    counter = CompileCounter()
    backend = functools.partialmethod(torch.nn.Module.compile, fullgraph=True, backend=counter)
    monkeypatch.setattr(torch.nn.Module, "compile", backend)

    def run(task, out, *options, dropout=0.0):
        """The run's metrics by epoch, its saved weights, and the graphs that were traced."""
        counter.clear()
        config.write_text(text.replace('pdrop": 0.1', f'pdrop": {dropout}'), encoding="utf-8")
        script, folder = SCRIPTS[task], tmp_path / out
        given = [*FILES[task], "--model_size=model", "--epochs=2", "--batch_size=2", "--lr=0.001"]
        given += ["--device=cpu", "--dtype=float32", f"--out_dir={folder}", *options]
        script.main(script.parse_options(given))
        weights = {path.name: load_file(path) for path in (folder / "best").glob("*.safetensors")}
        return pd.read_csv(folder / "metrics.csv"), weights, counter.frame_count

    return run


FILES = {
    "sonnets": [
        f"--{name}=sonnets.txt"
        for name in ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
    ]
    + ["--max_new_tokens=2"],
    "paraphrases": [f"--para_{split}=pairs.csv" for split in ("train", "dev", "test")]
    + ["--pair_encoding=joint"],
}


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("sonnets", ["--gradient_checkpointing"]),
        ("paraphrases", ["--use_lora", "--lora_dropout=0"]),
    ],
    ids=["sonnets", "paraphrases"],
)
def test_a_compiled_run_leaves_what_an_eager_one_does(command, monkeypatch, task, options):
    """Batches of seven lengths need two graphs, for training and for evaluation.

    The last batch has one example and needs its own.
    """
    with monkeypatch.context() as patch:
        checkpoint = mock.Mock(wraps=models.gpt2.checkpoint)
        patch.setattr(models.gpt2, "checkpoint", checkpoint)
        eager, weights, count = command(task, "eager", *options)
    assert count == 0
    assert checkpoint.called == ("--gradient_checkpointing" in options)
    compiled, compiled_weights, count = command(task, "compiled", "--compile", *options)
    assert 2 <= count <= 4
    for name in ("train_loss", "dev_loss"):
        assert compiled[name].tolist() == pytest.approx(eager[name].tolist(), rel=1e-5)
    assert {name: list(part) for name, part in compiled_weights.items()} == {
        name: list(part) for name, part in weights.items()
    }


def test_a_compiled_run_is_resumed_compiled(command, monkeypatch):
    """With dropout, to the same bits; without --compile the run is another one."""
    options = ["--compile", "--use_lora"]
    whole, weights, _ = command("sonnets", "whole", *options, dropout=0.1)
    interrupt_after_an_epoch(
        monkeypatch, functools.partial(command, "sonnets", "cut", *options, dropout=0.1)
    )
    with pytest.raises(InputError, match="already holds a run"):
        command("sonnets", "cut", "--use_lora", "--resume", dropout=0.1)
    resumed, resumed_weights, _ = command("sonnets", "cut", *options, "--resume", dropout=0.1)
    for name in ("train_loss", "dev_loss"):
        assert resumed[name].tolist() == whole[name].tolist()
    assert_close(resumed_weights, weights, atol=0, rtol=0)
