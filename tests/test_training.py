"""The training loop on a model with one weight: what it keeps, when it stops, what it reports."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import training
from config import TrainConfig
from models.sonnet_gpt import SonnetGPT
from runs import Run
from training import Task, Trainer, learning_rate

CPU = torch.device("cpu")


class Gradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(context, value, factor):
        context.factor = factor
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * context.factor, None


def fit(
    path,
    dev=(1.0,),
    values=((1.0, 2.0), (4.0,)),
    larger_is_better=False,
    dtype=torch.float32,
    factors=(),
    resume=False,
    **settings,
):
    """Train y = w with the loss mean((w - value)^2); returns the run, progress and weights.

    `dev` is the dev loss of each epoch, and `factors` multiply the gradients of the first steps.
    """
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    dev_losses, factors, weights = iter(dev), iter(factors), []

    def evaluate(model):
        weights.append(model.weight.item())
        return {"dev_loss": next(dev_losses)}

    def loss(model, batch):
        weight = Gradient.apply(model.weight.flatten(), next(factors, 1.0))
        return (weight - batch["values"]).square().mean()

    def collate(indices):
        return {"values": torch.tensor(indices)}

    task = Task(
        batches=lambda epoch: list(values),
        collate=collate,
        loss=loss,
        num_targets=len,
        num_tokens=len,
        evaluate=evaluate,
        save=lambda model, folder: (folder / "weight").write_text(str(model.weight.item())),
        larger_is_better=larger_is_better,
    )
    run = Run("toy", "toy", {"out_dir": str(path), "resume": resume}, {})
    config = TrainConfig(**{"epochs": len(dev), "lr": 0.1} | settings)
    progress = Trainer(model, task, config, run, CPU, dtype).train()
    return run, progress, weights


def saved_weight(run):
    return float((run.best / "weight").read_text())


def moment(run):
    """AdamW's first moment of the weight, after one step 0.1 times its gradient."""
    return run.load_state()["optimizer"]["state"][0]["exp_avg"].item()


@pytest.mark.parametrize(
    ("dev", "larger", "best"),
    [
        ((3.0, 1.0, 2.0), False, 2),
        ((3.0, 1.0, 1.0), False, 2),
        ((0.1, 0.7, 0.3), True, 2),
        ((3.0, 2.0, 1.0), False, 3),
    ],
)
def test_the_best_model_is_saved_not_the_last(tmp_path, dev, larger, best):
    """The report submitted its last epoch; of equal ones the earlier stays."""
    run, progress, weights = fit(tmp_path, dev, larger_is_better=larger)
    assert progress.best_epoch == best
    assert len(set(weights)) == 3
    assert saved_weight(run) == weights[best - 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_dev_metric_that_is_not_finite_stops_the_run(tmp_path, value):
    """Nothing is smaller than NaN by comparison, so a first NaN would stay the best for ever."""
    with pytest.raises(FloatingPointError, match=f"dev_loss is {value} after epoch 1"):
        fit(tmp_path, (value, 2.0, 3.0))
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "resume").exists()


@pytest.mark.parametrize(("patience", "epochs"), [(0, 7), (1, 3), (2, 6), (3, 7)])
def test_patience_counts_epochs_without_a_better_result(tmp_path, patience, epochs):
    """The third epoch is the first worse one; after a better fourth, all others are worse."""
    _, progress, _ = fit(tmp_path, (3.0, 2.0, 2.5, 1.0, 1.5, 1.5, 1.5), patience=patience)
    assert progress.epoch == epochs


def test_no_epoch_evaluates_nothing_and_saves_nothing(tmp_path):
    """--epochs 0 leaves the model as it was."""
    run, progress, weights = fit(tmp_path, ())
    assert (progress.epoch, progress.epochs, weights, run.best.exists()) == (0, [], [], False)


def test_train_loss_is_a_mean_over_targets(tmp_path):
    """At w = 0 the batches' losses are 2.5 (two targets) and 16 (one): 21 / 3, not 18.5 / 2."""
    run, progress, _ = fit(tmp_path, lr=1e-9)
    assert progress.epochs[0]["train_loss"] == pytest.approx(7.0)
    metrics = pd.read_csv(run.folder / "metrics.csv")
    assert metrics["train_loss"].tolist() == pytest.approx([7.0])
    columns = metrics[["epoch", "dev_loss", "learning_rate", "skipped_steps"]]
    assert columns.to_numpy().tolist() == [[1, 1.0, 1e-9, 0]]
    steps = pd.read_csv(run.folder / "steps.csv")
    assert steps["loss"].tolist() == pytest.approx([2.5, 16.0])
    assert steps["gradient_norm"].tolist() == pytest.approx([3.0, 8.0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_its_examples(tmp_path, value):
    """To continue would write NaN over the weights; the examples say which text to look at."""
    place = rf"loss {value}.* at epoch 1, step 2 \(examples \({value},\)\)"
    with pytest.raises(FloatingPointError, match=place):
        fit(tmp_path, values=((1.0, 2.0), (value,), (3.0,)))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, factor):
    """In float32 and bfloat16 there is no scale that a smaller one could replace."""
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(FloatingPointError, match=r"gradient norm (nan|inf) at epoch 1, step 2"):
            fit(tmp_path / str(dtype), factors=(1, factor), dtype=dtype)


@pytest.mark.parametrize("checkpoint_every", [0, 3])
@pytest.mark.parametrize("spoiled", ["loss", "gradient norm"])
def test_between_log_steps_nothing_bad_is_saved(tmp_path, monkeypatch, spoiled, checkpoint_every):
    """On a GPU, losses are read every ten steps: before the evaluation and any save, too."""
    monkeypatch.setitem(training.LOG_INTERVALS, "cpu", 10)
    values = [(1.0,), (math.nan,), (3.0,), (4.0,)]
    factors = ()
    if spoiled == "gradient norm":
        values[1], factors = (2.0,), (1, math.inf)
    settings = {"factors": factors, "checkpoint_every": checkpoint_every}
    with pytest.raises(FloatingPointError, match=f"{spoiled} (nan|inf).* at epoch 1, step 2 "):
        fit(tmp_path, values=values, **settings)
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "resume").exists()
    assert not (tmp_path / "steps.csv").exists()


def test_the_log_interval_changes_no_result(tmp_path, monkeypatch):
    """Epochs of 12 steps: the same steps.csv and metrics, and the same state after a resume."""
    values, outcomes = [(float(step),) for step in range(12)], []
    for interval in (1, 10):
        monkeypatch.setitem(training.LOG_INTERVALS, "cpu", interval)
        run, progress, weights = fit(tmp_path / str(interval), (2.0, 1.0), values=values, lr=1e-3)
        records = [(record["train_loss"], record["skipped_steps"]) for record in progress.epochs]
        outcomes.append(((run.folder / "steps.csv").read_bytes(), records, weights))
    assert outcomes[0] == outcomes[1]
    assert len(progress.steps) == 24


def test_float16_skips_a_step_that_overflows(tmp_path, capsys):
    """The weight stays, the scale is halved; the count is in metrics.csv and on the screen."""
    values = ((1.0,), (1.0,), (1.0,))
    overflow = {"factors": (1, math.inf, 1), "dtype": torch.float16, "dev": (2.0, 1.0)}
    run, progress, weights = fit(tmp_path / "skip", values=values, **overflow)
    metrics = pd.read_csv(run.folder / "metrics.csv")
    assert metrics["skipped_steps"].tolist() == [1, 0]
    first, second = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    assert "1 steps skipped (float16 overflow)" in first
    assert "skipped" not in second
    steps = pd.read_csv(run.folder / "steps.csv", dtype=str)
    assert steps["gradient_norm"].tolist()[1] == "inf"
    assert run.load_state()["scaler"]["scale"] == 2**15  # GradScaler starts with 2^16
    assert run.load_state()["optimizer"]["state"][0]["step"].item() == 5
    # Without the overflow, the first epoch has one step more.
    _, _, whole = fit(tmp_path / "whole", values=values, dtype=torch.float16)
    _, _, short = fit(tmp_path / "short", values=values[:2], dtype=torch.float16)
    assert short[0] == pytest.approx(weights[0], rel=1e-3)
    assert whole[0] > 1.3 * weights[0]
    assert progress.epochs[0]["skipped_steps"] == 1


def test_float16_stops_if_every_gradient_overflows(tmp_path):
    """A NaN in the data does not vanish with a smaller scale: no run without a single step."""
    values = ((1.0,),) * (training.MAX_SKIPPED + 5)
    stop = rf"gradient norm (nan|inf) at epoch 1, step {training.MAX_SKIPPED + 1} "
    with pytest.raises(FloatingPointError, match=stop):
        fit(tmp_path, values=values, factors=(math.nan,) * len(values), dtype=torch.float16)


def test_float16_counts_overflows_in_succession_over_epochs(tmp_path):
    """Epochs of one step must not reset the count; one good step in between does."""
    many = training.MAX_SKIPPED
    factors = [math.inf] * many + [1] + [math.inf] * many + [1]
    settings = {"values": ((1.0,),), "dtype": torch.float16}
    _, progress, _ = fit(tmp_path / "a", (1.0,) * len(factors), factors=factors, **settings)
    assert sum(record["skipped_steps"] for record in progress.epochs) == 2 * many
    dev = (1.0,) * (many + 1)
    with pytest.raises(FloatingPointError, match=f"at epoch {many + 1}, step 1"):
        fit(tmp_path / "b", dev, factors=[math.nan] * len(dev), **settings)


def test_gradients_are_clipped_to_the_given_norm(tmp_path):
    """The gradient is -2 * 3 unclipped, and clipped it has the norm 0.5."""
    for name, norm, gradient in (("no", 0.0, -6.0), ("yes", 0.5, -0.5)):
        run, _, _ = fit(tmp_path / name, values=((3.0,),), max_grad_norm=norm)
        assert moment(run) == pytest.approx(0.1 * gradient, rel=1e-4)
        steps = pd.read_csv(run.folder / "steps.csv")
        assert steps["gradient_norm"].tolist() == pytest.approx([6.0])  # before clipping


def test_float16_gradients_are_unscaled(tmp_path):
    """The gradient that AdamW and the clipping see does not contain the scale 2^16."""
    for name, norm, gradient in (("no", 0.0, -6.0), ("yes", 0.5, -0.5)):
        settings = {"values": ((3.0,),), "max_grad_norm": norm, "dtype": torch.float16}
        run, _, _ = fit(tmp_path / name, **settings)
        assert moment(run) == pytest.approx(0.1 * gradient, rel=1e-3)


def test_only_what_requires_a_gradient_is_trained(tmp_path):
    """Weight decay must not reach a frozen weight either."""
    frozen = nn.Linear(1, 1, bias=False).requires_grad_(False)
    model = nn.Sequential(nn.Linear(1, 1, bias=False), frozen)
    before = [layer.weight.clone() for layer in model]
    task = Task(
        batches=lambda epoch: [[0]],
        collate=lambda indices: {},
        loss=lambda model, batch: model(torch.ones(1)).square().sum(),
        num_targets=len,
        num_tokens=len,
        evaluate=lambda model: {"dev_loss": 1.0},
        save=lambda model, folder: None,
    )
    run = Run("toy", "toy", {"out_dir": str(tmp_path), "resume": False}, {})
    config = TrainConfig(epochs=2, lr=0.1, weight_decay=0.5)
    Trainer(model, task, config, run, CPU, torch.float32).train()
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[1].weight, before[1])
    assert model[1].weight.grad is None


@pytest.mark.parametrize(
    ("schedule", "warmup", "step", "share"),
    [
        ("constant", 0.0, 0, 1.0),
        ("constant", 0.0, 9, 1.0),
        ("constant", 0.2, 0, 0.5),
        ("constant", 0.2, 1, 1.0),
        ("linear", 0.0, 0, 1.0),
        ("linear", 0.0, 9, 0.1),
        ("linear", 0.2, 0, 0.5),
        ("linear", 0.2, 2, 1.0),
        ("linear", 0.2, 9, 0.125),
        ("cosine", 0.0, 5, 0.5),
        ("cosine", 0.2, 2, 1.0),
        ("cosine", 0.2, 6, 0.5),
        ("cosine", 0.2, 8, 0.1464466),
    ],
)
def test_learning_rate_by_hand(schedule, warmup, step, share):
    """Ten steps: warm-up over two starts above 0 and reaches the peak, where the decay starts."""
    config = TrainConfig(lr=2.0, schedule=schedule, warmup=warmup)
    assert learning_rate(step, 10, config) == pytest.approx(2 * share)


def test_the_schedule_is_in_steps_csv(tmp_path):
    """Over all epochs, not anew in each."""
    run, _, _ = fit(tmp_path, (2.0, 1.0), schedule="linear", lr=0.1)
    steps = pd.read_csv(run.folder / "steps.csv")
    assert steps["learning_rate"].tolist() == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_gradient_checkpointing_computes_the_same(gpt, ids):
    """Recomputed activations have the same dropout: equal losses and gradients, bit for bit."""
    found = []
    for checkpointing in (False, True):
        gpt.zero_grad()
        gpt.train().gradient_checkpointing = checkpointing
        torch.manual_seed(5)
        loss = SonnetGPT(gpt).loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in gpt.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
