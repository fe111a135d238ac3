"""A run that is interrupted anywhere and resumed equals the uninterrupted run, bit for bit."""

import os
import signal

import pandas as pd
import pytest
import torch

from adapters import save_adapter
from config import InputError, Interrupted, LoRAConfig, TrainConfig
from datasets import SonnetsDataset, bucketed_batches
from evaluation import language_model_metrics
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from runs import Run
from training import Task, Trainer

EPOCHS, STEPS = 3, 4  # seven texts in batches of two
TEXTS = (
    "From fairest creatures",
    "we desire increase,\nThat",
    "thereby beauty's rose",
    "might never die",
    "But as",
    "the riper should by time",
    "decease,\nHis tender heir",
    "might bear his memory",
    "When forty winters",
)
TIMED = ["seconds", "tokens_per_second", "peak_memory_gb"]


class Crash(Exception):  # noqa: N818 (stands for a kill, which is not an error of the program)
    """What a kill looks like from inside the loop."""


def crash():
    raise Crash


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def fit(folder, path, at=None, event=crash, resume=False, lora=False, seed=5, checkpoint_every=0):
    """Train as a new process would; `event` happens while the batch of the `at`th step is made.

    Returns the run, the trained parameters, and how many batches were made.
    """
    torch.manual_seed(seed)
    gpt = GPT2Model.from_pretrained(folder)
    model = SonnetGPT(gpt)
    if lora:
        apply_lora(model, LoRAConfig(rank=2))
    sonnets = pd.DataFrame({"id": range(len(TEXTS)), "text": TEXTS})
    train, dev = SonnetsDataset(sonnets[:7], gpt), SonnetsDataset(sonnets[7:], gpt)
    made = 0

    def collate(indices):
        nonlocal made
        if made == at:
            event()
        made += 1
        return train.collate(indices)

    def evaluate(model):
        metrics, _ = language_model_metrics(model, dev)
        return {"dev_loss": metrics["loss"], "dev_perplexity": metrics["perplexity"]}

    task = Task(
        batches=lambda epoch: bucketed_batches(train.lengths, 2, seed, epoch),
        collate=collate,
        loss=lambda model, batch: model.loss(batch["input_ids"], batch["labels"]),
        num_targets=train.num_targets,
        num_tokens=train.num_targets,
        evaluate=evaluate,
        save=save_adapter if lora else SonnetGPT.save_pretrained,
    )
    settings = {"lr": 0.005, "schedule": "cosine", "checkpoint_every": checkpoint_every}
    config = TrainConfig(epochs=EPOCHS, seed=seed, **settings)
    run = Run("sonnets", "test", {"out_dir": str(path), "resume": resume, "seed": seed}, {})
    stopped = None
    try:
        Trainer(model, task, config, run, torch.device("cpu"), torch.float32).train()
    except (Crash, Interrupted) as error:
        stopped = error
    expected = Crash if event is crash else Interrupted
    assert type(stopped) is (type(None) if at is None else expected)
    assert not isinstance(stopped, Interrupted) or stopped.args[1] == signal.SIGINT
    return run, {name: p.detach() for name, p in model.named_parameters()}, made


def outcome(run):
    """What interruptions must not change: best/, steps.csv, and metrics.csv without its times."""
    metrics = pd.read_csv(run.folder / "metrics.csv", dtype=str).drop(columns=TIMED)
    files = {path.name: path.read_bytes() for path in sorted(run.best.iterdir())}
    files["steps.csv"] = (run.folder / "steps.csv").read_bytes()
    return metrics.to_dict("records"), files


def same(one, other):
    names = one.keys() | other.keys()
    return all(torch.equal(one[name], other[name]) for name in names)


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def uninterrupted(request, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "whole"
    run, parameters, made = fit(folder, path, lora=request.param)
    assert made == EPOCHS * STEPS
    return request.param, parameters, outcome(run)


def test_the_same_seed_gives_the_same_run(folder, uninterrupted, tmp_path):
    """Equal parameters, files and metrics; another seed gives others."""
    lora, parameters, files = uninterrupted
    run, again, _ = fit(folder, tmp_path / "again", lora=lora)
    assert same(again, parameters)
    assert outcome(run) == files
    assert len(files[0]) == EPOCHS
    other_run, other, _ = fit(folder, tmp_path / "other", lora=lora, seed=6)
    assert not same(other, parameters)
    assert outcome(other_run)[1]["steps.csv"] != files[1]["steps.csv"]


def test_steps_csv_has_a_record_per_step(folder, uninterrupted, tmp_path):
    """Epoch, step, loss, learning rate and gradient norm; the losses are those of the epochs."""
    run, _, _ = fit(folder, tmp_path / "run", lora=uninterrupted[0])
    steps = pd.read_csv(run.folder / "steps.csv")
    names = ["epoch", "step", "loss", "learning_rate", "gradient_norm"]
    assert list(steps.columns) == names
    places = [(epoch, step) for epoch in range(1, EPOCHS + 1) for step in range(1, STEPS + 1)]
    assert list(zip(steps["epoch"], steps["step"], strict=True)) == places
    assert steps["learning_rate"].iloc[0] == 0.005
    assert steps["learning_rate"].is_monotonic_decreasing
    assert (steps["gradient_norm"] > 0).all()
    losses = pd.read_csv(run.folder / "metrics.csv")["train_loss"]
    # Weighted by targets, an epoch's mean lies between its smallest and its largest batch loss.
    by_epoch = steps.groupby("epoch")["loss"]
    assert (by_epoch.min().to_numpy() < losses).all()
    assert (losses < by_epoch.max().to_numpy()).all()


@pytest.mark.parametrize(
    ("event", "at", "checkpoint_every", "left"),
    [
        (crash, 1, 1, 11),
        (crash, 5, 1, 7),
        (crash, 7, 3, 6),
        (crash, 1, 0, 12),
        (crash, 6, 0, 8),
        (crash, 8, 0, 4),
        (interrupt, 0, 0, 11),
        (interrupt, 6, 0, 5),
        (interrupt, 3, 0, 8),
        (interrupt, 11, 0, 0),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_resumed_equals_uninterrupted(
    folder, uninterrupted, tmp_path, event, at, checkpoint_every, left
):
    """A crash repeats the steps after the last checkpoint, a signal none."""
    lora, parameters, files = uninterrupted
    settings = {"lora": lora, "checkpoint_every": checkpoint_every}
    _, _, made = fit(folder, tmp_path / "run", at=at, event=event, **settings)
    assert made == at + (event is interrupt)
    run, resumed, made = fit(folder, tmp_path / "run", resume=True, **settings)
    assert made == left
    assert same(resumed, parameters)
    assert outcome(run) == files


def test_several_interruptions_equal_none(folder, uninterrupted, tmp_path):
    """A crash after a crash, in the first epoch and without a saved step between them."""
    lora, parameters, files = uninterrupted
    fit(folder, tmp_path / "run", at=2, lora=lora, checkpoint_every=1)
    for at, event in ((0, crash), (3, interrupt), (1, crash)):
        fit(folder, tmp_path / "run", at=at, event=event, lora=lora, resume=True)
    run, resumed, _ = fit(folder, tmp_path / "run", lora=lora, resume=True)
    assert same(resumed, parameters)
    assert outcome(run) == files


def test_a_state_of_another_model_is_rejected(folder, tmp_path):
    """Its tensors do not fit: an error that names the file, not a traceback."""
    fit(folder, tmp_path / "run", at=5, lora=True)
    with pytest.raises(InputError, match=r"state\.pt does not fit"):
        fit(folder, tmp_path / "run", resume=True)


def test_signal_handlers_are_restored(folder, tmp_path):
    """Ctrl-C after training must not be swallowed."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run, _, _ = fit(folder, tmp_path / "run", at=1, event=interrupt)
    progress = run.load_state()["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
