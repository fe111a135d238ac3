"""The loop on a model of one weight: what it keeps, when it stops, what it reports."""

import contextlib
import csv
import math

import pytest
import torch
from torch import nn

from config import TrainConfig
from models.sonnet_gpt import SonnetGPT
from runs import Run
from training import Task, learning_rate, train

CPU = torch.device("cpu")


def fit(path, dev=(1.0,), values=((1.0, 2.0), (4.0,)), larger_is_better=False, **settings):
    """Train y = w, whose loss is the mean of (w - value)^2; `dev` is each epoch's dev figure. Returns what there is."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    figures, weights = iter(dev), []

    def evaluate(model):
        weights.append(model.weight.item())
        return {"dev_loss": next(figures)}

    def loss(model, batch):
        return (model.weight.flatten() - batch["values"]).square().mean()

    task = Task(
        batches=lambda epoch: list(values),
        collate=lambda rows: {"values": torch.tensor(rows), "attention_mask": torch.ones(1, len(rows))},
        loss=loss,
        items=lambda batch: len(batch["values"]),
        evaluate=evaluate,
        save=lambda model, folder: (folder / "weight").write_text(str(model.weight.item())),
        larger_is_better=larger_is_better,
    )
    run = Run("toy", "toy", {"out_dir": str(path), "resume": False}, {})
    config = TrainConfig(**{"epochs": len(dev), "lr": 0.1} | settings)
    progress = train(model, task, config, run, CPU, torch.float32)
    return run, progress, weights


def kept(run):
    return float((run.best / "weight").read_text())


@pytest.mark.parametrize(("dev", "larger", "best"), [
    ((3.0, 1.0, 2.0), False, 2), ((3.0, 1.0, 1.0), False, 2), ((0.1, 0.7, 0.3), True, 2), ((3.0, 2.0, 1.0), False, 3),
])  # fmt: skip
def test_the_best_model_is_kept_not_the_last(tmp_path, dev, larger, best):
    """The report submitted its last epoch; of equals the earlier stays."""
    run, progress, weights = fit(tmp_path, dev, larger_is_better=larger)
    assert progress.best_epoch == best
    assert len(set(weights)) == 3
    assert kept(run) == weights[best - 1]


def test_a_dev_figure_that_is_no_number_is_never_the_best(tmp_path):
    """Nothing is smaller than NaN by comparison, so a first NaN would stay the best for ever."""
    with contextlib.suppress(FloatingPointError):
        fit(tmp_path, (math.nan, 2.0, 3.0))
    state = torch.load(tmp_path / "resume" / "state.pt", weights_only=True) if (tmp_path / "resume").exists() else None
    assert state is None or state["progress"]["best_epoch"] == 2


@pytest.mark.parametrize(("patience", "epochs"), [(0, 7), (1, 3), (2, 6), (3, 7)])
def test_patience_counts_epochs_without_a_better_result(tmp_path, patience, epochs):
    """The third epoch is the first worse one; after a better fourth, so are the fifth, sixth and seventh."""
    _, progress, _ = fit(tmp_path, (3.0, 2.0, 2.5, 1.0, 1.5, 1.5, 1.5), patience=patience)
    assert progress.epoch == epochs


def test_no_epoch_evaluates_nothing_and_keeps_nothing(tmp_path):
    """--epochs 0 leaves the model as it was."""
    run, progress, weights = fit(tmp_path, ())
    assert (progress.epoch, progress.rows, weights, run.best.exists()) == (0, [], [], False)


def test_train_loss_is_a_mean_over_items(tmp_path):
    """At w = 0 (the rate is next to 0) the batches' losses are 2.5 of two items and 16 of one: 21 / 3, not 18.5 / 2."""
    run, progress, _ = fit(tmp_path, lr=1e-9)
    assert progress.rows[0]["train_loss"] == pytest.approx(7.0)
    with open(run.folder / "metrics.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_loss"]) == pytest.approx(7.0)
    assert (row["epoch"], row["dev_loss"], row["learning_rate"]) == ("1", "1.0", "1e-09")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_and_rows(tmp_path, value):
    """Training on would write NaN over the weights; the rows say which text to look at."""
    with pytest.raises(FloatingPointError, match=rf"loss is {value} at epoch 1, step 2, rows \({value},\)"):
        fit(tmp_path, values=((1.0, 2.0), (value,), (3.0,)))


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path):
    """AdamW's first moment shows the gradient it was given: -2 * 3 unclipped, of norm 0.5 clipped."""
    for name, norm, gradient in (("no", 0.0, -6.0), ("yes", 0.5, -0.5)):
        run, _, _ = fit(tmp_path / name, values=((3.0,),), max_grad_norm=norm)
        moment = run.load_state()["optimizer"]["state"][0]["exp_avg"].item()
        assert moment == pytest.approx(0.1 * gradient, rel=1e-4)


def test_only_what_requires_a_gradient_is_trained(tmp_path):
    """requires_grad is the one truth: weight decay must not reach a frozen weight either."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False).requires_grad_(False))
    before = [layer.weight.clone() for layer in model]
    task = Task(
        batches=lambda epoch: [[0]],
        collate=lambda rows: {"attention_mask": torch.ones(1, 1)},
        loss=lambda model, batch: model(torch.ones(1)).square().sum(),
        items=lambda batch: 1,
        evaluate=lambda model: {"dev_loss": 1.0},
        save=lambda model, folder: None,
    )
    run = Run("toy", "toy", {"out_dir": str(tmp_path), "resume": False}, {})
    train(model, task, TrainConfig(epochs=2, lr=0.1, weight_decay=0.5), run, CPU, torch.float32)
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[1].weight, before[1])


@pytest.mark.parametrize(("schedule", "warmup", "step", "share"), [
    ("constant", 0.0, 0, 1.0), ("constant", 0.0, 9, 1.0), ("constant", 0.2, 0, 0.5), ("constant", 0.2, 1, 1.0),
    ("linear", 0.0, 0, 1.0), ("linear", 0.0, 9, 0.1), ("linear", 0.2, 0, 0.5), ("linear", 0.2, 2, 1.0),
    ("linear", 0.2, 9, 0.125),
    ("cosine", 0.0, 5, 0.5), ("cosine", 0.2, 2, 1.0), ("cosine", 0.2, 6, 0.5), ("cosine", 0.2, 8, 0.1464466),
])  # fmt: skip
def test_learning_rate_by_hand(schedule, warmup, step, share):
    """Ten steps; warm-up over two starts above 0 and reaches the whole rate, and the decay starts from it."""
    config = TrainConfig(lr=2.0, schedule=schedule, warmup=warmup)
    assert learning_rate(step, 10, config) == pytest.approx(2 * share)


def test_gradient_checkpointing_computes_the_same(gpt, ids):
    """Activations computed a second time draw the dropout of the first: equal losses and gradients, bit for bit."""
    found = []
    for checkpointing in (False, True):
        gpt.zero_grad()
        gpt.train().checkpointing = checkpointing
        torch.manual_seed(5)
        loss = SonnetGPT(gpt).loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in gpt.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
