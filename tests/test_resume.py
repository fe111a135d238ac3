"""A run cut off anywhere and resumed is the uninterrupted run, bit for bit; dropout is on throughout."""

import csv
import os
import signal

import pytest
import torch

from config import Interrupted, LoRAConfig, TrainConfig
from datasets import IGNORED, Sonnet, SonnetsDataset, bucketed_batches
from evaluation import language_model_figures
from lora import apply_lora, save_adapter
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from runs import Run
from training import Task, train

EPOCHS, STEPS = 3, 4  # seven texts in batches of two
TEXTS = (
    "From fairest creatures", "we desire increase,\nThat", "thereby beauty's rose", "might never die", "But as",
    "the riper should by time", "decease,\nHis tender heir", "might bear his memory", "When forty winters",
)  # fmt: skip
TIMED = {"seconds", "tokens_per_second", "peak_memory_gb"}


class Crash(Exception):  # noqa: N818 (stands for a kill, which is no error of the program's)
    """What a kill looks like from inside the loop."""


def crash():
    raise Crash


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fit(folder, path, at=None, event=crash, resume=False, lora=False, seed=5, checkpoint_every=0):
    """Train as a fresh process would; `event` happens while the batch of the `at`th step is made.

    Returns the run, the trained parameters, and how many batches were made.
    """
    torch.manual_seed(seed)
    gpt = GPT2Model.from_pretrained(folder)
    model = SonnetGPT(gpt)
    if lora:
        apply_lora(model, LoRAConfig(rank=2))
    sonnets = [Sonnet(number, text) for number, text in enumerate(TEXTS)]
    data, dev = SonnetsDataset(sonnets[:7], gpt), SonnetsDataset(sonnets[7:], gpt).in_order(2)
    made = 0

    def collate(rows):
        nonlocal made
        if made == at:
            event()
        made += 1
        return data.collate(rows)

    def evaluate(model):
        figures = language_model_figures(model, dev)
        return {"dev_loss": figures["loss"], "dev_perplexity": figures["perplexity"]}

    task = Task(
        batches=lambda epoch: bucketed_batches(data.lengths, 2, seed, epoch),
        collate=collate,
        loss=lambda model, batch: model.loss(batch["input_ids"], batch["labels"]),
        items=lambda batch: int((batch["labels"] != IGNORED).sum()),
        evaluate=evaluate,
        save=lambda model, path: save_adapter(model, path) if lora else model.gpt.save_pretrained(path),
    )  # fmt: skip
    config = TrainConfig(epochs=EPOCHS, lr=0.005, seed=seed, schedule="cosine", checkpoint_every=checkpoint_every)
    run = Run("sonnets", "test", {"out_dir": str(path), "resume": resume, "seed": seed}, {})
    assert run.resumed == resume
    ended = None
    try:
        train(model, task, config, run, torch.device("cpu"), torch.float32)
    except (Crash, Interrupted) as stopped:
        ended = stopped
    assert type(ended) is (type(None) if at is None else Crash if event is crash else Interrupted)
    assert not isinstance(ended, Interrupted) or ended.args[1] == signal.SIGINT
    return run, {name: parameter.detach() for name, parameter in model.named_parameters()}, made


def left_behind(run):
    """What must not depend on interruptions: every file of best/, and metrics.csv but for what is timed."""
    with open(run.folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]
    return rows, {path.name: path.read_bytes() for path in sorted(run.best.iterdir())}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def uninterrupted(request, folder, tmp_path_factory):
    run, parameters, made = fit(folder, tmp_path_factory.mktemp("run") / "whole", lora=request.param)
    assert made == EPOCHS * STEPS
    return request.param, parameters, left_behind(run)


def test_the_same_seed_gives_the_same_run(folder, uninterrupted, tmp_path):
    """Parameters, files and figures; another seed gives others, so the comparison sees something."""
    lora, parameters, files = uninterrupted
    run, again, _ = fit(folder, tmp_path / "again", lora=lora)
    assert same(again, parameters)
    assert left_behind(run) == files
    assert len(files[0]) == EPOCHS
    _, other, _ = fit(folder, tmp_path / "other", lora=lora, seed=6)
    assert not same(other, parameters)


@pytest.mark.parametrize(("event", "at", "checkpoint_every", "left"), [
    (crash, 1, 1, 11), (crash, 5, 1, 7), (crash, 7, 3, 6), (crash, 1, 0, 12), (crash, 6, 0, 8), (crash, 8, 0, 4),
    (interrupt, 0, 0, 11), (interrupt, 6, 0, 5), (interrupt, 3, 0, 8), (interrupt, 11, 0, 0),
], ids=lambda value: getattr(value, "__name__", value))  # fmt: skip
def test_resumed_equals_uninterrupted(folder, uninterrupted, tmp_path, event, at, checkpoint_every, left):
    """After a crash the last checkpoint's steps are not repeated, after a signal none is, an epoch's last included."""
    lora, parameters, files = uninterrupted
    settings = {"lora": lora, "checkpoint_every": checkpoint_every}
    _, _, made = fit(folder, tmp_path / "run", at=at, event=event, **settings)
    assert made == at + (event is interrupt)
    run, resumed, made = fit(folder, tmp_path / "run", resume=True, **settings)
    assert made == left
    assert same(resumed, parameters)
    assert left_behind(run) == files


def test_after_a_signal_handlers_are_what_they_were(folder, tmp_path):
    """Ctrl-C during evaluation or writing, after training, must not be swallowed."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run, _, _ = fit(folder, tmp_path / "run", at=1, event=interrupt)
    progress = run.load_state()["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
