"""The training loop: on a model with one weight by hand, and on small runs of both tasks."""

import math

import pandas as pd
import pytest
import torch
from small_runs import KINDS, make_files, outcome, run
from torch import nn

from config import LoRAConfig, TrainConfig
from datasets import TextDataset, split
from lora import apply_lora
from models.sonnet_gpt import SonnetGPT
from training import loop
from training.loop import Task, Trainer, learning_rate, make_optimizer
from training.options import Hardware
from training.runs import open_run


class Toy(nn.Linear):
    """One weight w, at first 0, with the loss mean((w - value)^2)."""

    def __init__(self, factors):
        super().__init__(1, 1, bias=False)
        nn.init.zeros_(self.weight)
        factors = iter(factors)  # of the gradients of the first batches
        self.weight.register_hook(lambda gradient: gradient * next(factors, 1.0))

    def loss(self, values):
        return (self.weight - values).square().mean()


class Values(TextDataset):
    """Batches of values in their order."""

    def __init__(self, values):
        self.values, self.lengths = values, [1] * len(values)

    def batches(self, batch_size, seed, epoch):
        return split(list(range(len(self.values))), batch_size)

    def collate(self, indices):
        return {"values": torch.tensor([self.values[index] for index in indices])}


def fit(path, dev=(1.0,), values=(1.0, 2.0, 4.0), factors=(), dtype=torch.float32, **settings):
    """Train a Toy with these dev losses; returns the run and the weight after each epoch."""
    model, dev_losses, weights = Toy(factors), iter(dev), []

    def evaluate():
        weights.append(model.weight.item())
        return {"dev_loss": next(dev_losses), "dev_accuracy": weights[-1]}

    def save(folder):
        folder.mkdir()
        (folder / "weight").write_text(str(model.weight.item()))

    metric, resume = settings.pop("metric", "dev_loss"), settings.pop("resume", False)
    options = {"out_dir": str(path), "resume": resume}
    config = TrainConfig(**{"epochs": len(dev), "lr": 0.1, "batch_size": 2} | settings)
    result = open_run("toy", "toy", options)
    task = Task(Values(values), evaluate, save, metric)
    Trainer(model, task, config, result, Hardware(torch.device("cpu"), dtype)).train()
    return result, weights


def state_of(result):
    return torch.load(result / "state.pt")


BEST = [
    ((3.0, 1.0, 2.0), "dev_loss", 2),
    ((3.0, 1.0, 1.0), "dev_loss", 2),  # of equal ones the first
    ((3.0, 1.0, 2.0), "dev_accuracy", 3),  # the largest weight, which grows
]


@pytest.mark.parametrize(("dev", "metric", "best"), BEST)
def test_the_best_model_is_saved_not_the_last(tmp_path, dev, metric, best):
    result, weights = fit(tmp_path, dev, metric=metric)
    assert float((result / "best" / "weight").read_text()) == weights[best - 1]


@pytest.mark.parametrize(("patience", "epochs"), [(0, 7), (1, 3), (2, 6), (3, 7)])
def test_patience_counts_epochs_without_a_better_result(tmp_path, capsys, patience, epochs):
    _, weights = fit(tmp_path, (3.0, 2.0, 2.5, 1.0, 1.5, 1.5, 1.5), patience=patience)
    assert len(weights) == epochs
    assert ("stopped early" in capsys.readouterr().out) == (epochs < 7)


def test_the_train_loss_is_a_mean_over_targets(tmp_path):
    """At w = 0 the batches' losses are 2.5 (two targets) and 16 (one): 21 / 3, not 18.5 / 2."""
    result, _ = fit(tmp_path, lr=1e-9)
    [epoch] = pd.read_csv(result / "metrics.csv").to_dict("records")
    assert epoch["train_loss"] == pytest.approx(7.0)
    assert (epoch["epoch"], epoch["skipped_steps"]) == (1, 0)
    steps = pd.read_csv(result / "steps.csv")
    assert steps["learning_rate"].tolist() == [1e-9, 1e-9]
    assert steps[["epoch", "step", "targets"]].values.tolist() == [[1, 1, 2], [1, 2, 1]]
    assert steps["loss"].tolist() == pytest.approx([2.5, 16.0])
    assert steps["gradient_norm"].tolist() == pytest.approx([3.0, 8.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("limit", "gradient"), [(0.0, -6.0), (0.5, -0.5)])
def test_gradients_are_clipped_and_unscaled(tmp_path, dtype, limit, gradient):
    """AdamW's first moment is a tenth of the gradient -2 * 3; steps.csv has it before clipping."""
    result, _ = fit(tmp_path, values=(3.0,), max_grad_norm=limit, dtype=dtype)
    moment = state_of(result)["optimizer"]["state"][0]["exp_avg"].item()
    assert moment == pytest.approx(0.1 * gradient, rel=1e-3)
    assert pd.read_csv(result / "steps.csv")["gradient_norm"][0] == pytest.approx(6.0)


@pytest.fixture
def save_every_step(monkeypatch):
    monkeypatch.setattr(loop, "LOG_STEPS", 1)
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)


@pytest.mark.parametrize("spoiled", ["loss nan", "gradient norm inf", "gradient norm nan"])
def test_numbers_that_are_not_finite_stop_the_run(tmp_path, spoiled):
    """They are read later, but before anything is saved."""
    bad = float(spoiled[-3:])
    values, factors = (1.0, 2.0, bad, 4.0), ()
    if "norm" in spoiled:
        values, factors = (1.0, 2.0, 3.0), (1, 1, bad)
    with pytest.raises(FloatingPointError, match=f"{spoiled}.*; try a smaller --lr"):
        fit(tmp_path, (1.0,), values, factors, batch_size=1)
    assert not {"best", "state.pt", "steps.csv"} & {path.name for path in tmp_path.iterdir()}


def test_float16_skips_steps_that_overflow(tmp_path):
    """The weight stays and the scale is halved; metrics.csv and steps.csv record it."""
    settings = {"batch_size": 1, "dtype": torch.float16}
    result, weights = fit(tmp_path / "a", (2.0, 1.0), (1.0,) * 3, (1, math.inf), **settings)
    assert pd.read_csv(result / "metrics.csv")["skipped_steps"].tolist() == [1, 0]
    assert pd.read_csv(result / "steps.csv")["gradient_norm"][1] == math.inf
    state = state_of(result)
    assert state["scaler"]["scale"] == 2**15  # GradScaler starts with 2^16
    assert state["optimizer"]["state"][0]["step"] == 5
    _, short = fit(tmp_path / "b", values=(1.0,) * 2, **settings)
    assert short[0] == pytest.approx(weights[0], rel=1e-3)


def test_float16_stops(tmp_path):
    """If the loss is not finite, or if all steps overflow: the scale is below 1 after 17 steps."""
    settings = {"batch_size": 1, "dtype": torch.float16}
    with pytest.raises(FloatingPointError, match="loss inf"):
        fit(tmp_path / "a", values=(1.0, math.inf), **settings)
    with pytest.raises(FloatingPointError, match="gradient norm inf"):
        fit(tmp_path / "b", values=(1.0,) * 20, factors=(math.inf,) * 20, **settings)


SCHEDULES = {
    "constant": [0.5, 1, 1, 1, 1, 1],
    "linear": [0.5, 1, 1, 0.75, 0.5, 0.25],
    "cosine": [0.5, 1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5],
}


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES.items())
def test_schedules_by_hand(schedule, expected):
    """Six steps, the first two of them with a rising learning rate."""
    config = TrainConfig(lr=1.0, schedule=schedule, warmup=0.3)
    assert [learning_rate(step, 6, config) for step in range(6)] == pytest.approx(expected)


@pytest.mark.parametrize("lora", [False, True])
def test_only_the_matrices_of_linear_layers_decay(gpt, lora):
    """By lr times decay if gradients are zero: no embeddings, biases and norms, nothing frozen."""
    model = SonnetGPT(gpt)
    if lora:
        apply_lora(model, LoRAConfig())
        nn.init.ones_(gpt.layers[0].attention.q_proj.lora_b.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        is_matrix = ".lora_" in name if lora else "layers" in name and parameter.ndim == 2
        expected = before[name] * (0.95 if is_matrix else 1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.set_num_threads(1)  # sums of several threads may differ in their last bit
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("kind", ["sonnets-full", "paraphrases-lora"])
def test_accumulated_batches_are_one_large_batch(tmp_path, kind):
    """Micro-batches of different lengths count by their targets: no mean of means."""
    files, steps = make_files(tmp_path, dropout=0.0), []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        more = [f"--batch_size={batch_size}", f"--grad_accumulation={accumulation}"]
        more.append("--lora_dropout=0")
        folder = run(files, kind, tmp_path / str(batch_size), *more)
        steps.append(pd.read_csv(folder / "steps.csv"))
    for other in steps[1:]:
        pd.testing.assert_frame_equal(steps[0], other, rtol=1e-4)


class Stop(Exception):  # noqa: N818 (stands for a kill)
    pass


def stop_at(monkeypatch, owner, name, number, after):
    """Raise Stop at the given call of a function, before or after it."""
    original, calls = getattr(owner, name), []

    def counted(*given):
        calls.append(1)
        result = original(*given) if len(calls) < number or after else None
        if len(calls) == number:
            raise Stop
        return result

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The outcomes of runs without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return {kind: outcome(run(files, kind, folder / kind)) for kind in KINDS}


STOPS = {  # where a run is stopped, at which call, before or after it, and the steps left to do
    "without a state": (Trainer, "take_step", 1, False, {"sonnets": 6, "paraphrases": 8}),
    "in the second epoch": (Trainer, "take_step", 6, False, {"sonnets": 3, "paraphrases": 4}),
    "between state and best": (loop, "atomic_path", 2, False, {"sonnets": 3, "paraphrases": 4}),
    "after training": (Trainer, "save", 2, True, {"sonnets": 0, "paraphrases": 0}),
}


def stop_and_resume(files, whole, kind, folder, monkeypatch, place):
    """Compare with the uninterrupted run; returns the number of steps after resuming."""
    with monkeypatch.context() as patch:
        stop_at(patch, *place)
        with pytest.raises(Stop):
            run(files, kind, folder)
    calls, original = [], Trainer.take_step
    monkeypatch.setattr(Trainer, "take_step", lambda *a: calls.append(1) or original(*a))
    assert outcome(run(files, kind, folder, "--resume")) == whole[kind]
    return len(calls)


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("kind", ["sonnets-lora", "paraphrases-full"])
def test_resumed_equals_uninterrupted(files, whole, tmp_path, monkeypatch, kind, stop):
    """Bit for bit, with dropout: best/, predictions, and tables but for times."""
    *place, left = STOPS[stop]
    steps = stop_and_resume(files, whole, kind, tmp_path / "cut", monkeypatch, place)
    assert steps == left[kind.split("-")[0]]


@pytest.mark.parametrize("number", [3, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_in_the_middle_of_an_epoch(
    files, whole, tmp_path, monkeypatch, save_every_step, kind, number
):
    """With a state after every step."""
    place = (Trainer, "take_step", number, True)
    steps = stop_and_resume(files, whole, kind, tmp_path / "cut", monkeypatch, place)
    assert steps == {"sonnets": 6, "paraphrases": 8}[kind.split("-")[0]] - (number - 1)


def test_a_state_of_another_model_is_rejected(tmp_path):
    result, _ = fit(tmp_path / "a")
    torch.save(state_of(result) | {"weights": {"0": torch.ones(2, 2)}}, result / "state.pt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(tmp_path / "a", resume=True)
