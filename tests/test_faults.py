"""What goes wrong while a run is under way: kills, full and vanished disks, numbers that are not finite.

`python tests/kill_everywhere.py` is the whole of it; here, every so-manieth of its points.
"""

import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import figures
from config import exit_cleanly
from models.sonnet_gpt import SonnetGPT
from training import Task

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["sonnets-full", "sonnets-lora", "paraphrases-full", "paraphrases-lora"]
posix = pytest.mark.skipif(os.name != "posix", reason="forks, and is killed by a signal")


@posix
def test_killed_anywhere_and_resumed_equals_uninterrupted():
    """At every 53rd write, fsync, rename or removal: summary, best/, predictions, metrics and names of files."""
    command = [sys.executable, "tests/kill_everywhere.py", "--every=53", "--first=20", "--random=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["kind"] for each in found] == KINDS
    for each in found:
        assert each["points"] > 100
        assert each["equal"] == each["kills"] > 1, each["unequal"]
        assert each["random_equal"] == 1, each["unequal"]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A one-layer model, six sonnets and eight pairs."""
    kill_everywhere = pytest.importorskip("kill_everywhere")
    root = tmp_path_factory.mktemp("kit")
    kill_everywhere.make_model(root / "model")
    kill_everywhere.make_data(root)
    return kill_everywhere, root


@pytest.fixture
def run(kit, tmp_path, monkeypatch, capsys):
    """Run a kind's command in this process, as the script does; returns the exit code and the last line of stderr."""
    kill_everywhere, root = kit
    for name in ("draw_curves", "draw_attention"):
        monkeypatch.setattr(figures, name, lambda *_: None)

    def start(kind, *more):
        script = kill_everywhere.SCRIPTS[kind.split("-")[0]]
        try:
            with exit_cleanly():
                script.main(script.parse_options(kill_everywhere.options(root, kind, tmp_path / "run", *more)))
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert error.count("\n") == 1, error
            return stop.code, error.strip()
        return 0, capsys.readouterr().out

    start.folder = tmp_path / "run"
    return start


def metrics(folder):
    timed = {"seconds", "tokens_per_second", "peak_memory_gb"}
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in timed} for row in csv.DictReader(file)]


@posix
@pytest.mark.parametrize("kind", ["sonnets-full", "paraphrases-lora"])
def test_a_full_disk_leaves_the_state_before(kit, tmp_path, kind):
    """A file-size limit from the third checkpoint on, in torch's writer: one line with the file, exit code 1."""
    probe = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import kill_everywhere as k, pathlib, json\n"
        "bench = k.Bench(pathlib.Path(sys.argv[1])); kind = sys.argv[2]\n"
        "whole, points, _ = bench.whole(kind)\n"
        "at = [n for n, name in enumerate(points, 1) if name == 'before save'][2]\n"
        "code = bench.run(kind, 'cut', at=at, event=k.limit_files(3000))\n"
        "state = k.torch.load(bench.root / 'cut/run/resume/state.pt', weights_only=True)['progress']\n"
        "log = bench.log('cut')\n"
        "print(json.dumps([code, log, state['epoch'], k.differences(bench.resumed(kind, 'cut'), whole)]))\n"
    )
    command = [sys.executable, "-c", probe, str(tmp_path), kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    code, log, epoch, unequal = json.loads(done.stdout)
    assert (code, epoch, unequal) == (1, 1 if kind.startswith("sonnets") else 0, [])
    *_, last = log.splitlines()
    assert re.fullmatch(r"error: \S+: .*File too large.*; what was saved before stands \(.* --resume\)", last), log
    assert "Traceback" not in log


def failing(call, number, kind):
    def wrapped(*arguments, **settings):
        if kind in str(arguments[-1]):
            raise OSError(number, os.strerror(number), str(arguments[-1]))
        return call(*arguments, **settings)

    return wrapped


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("target", ["state.pt", "best", "metrics.csv", "summary.json", "run.txt"])
def test_a_write_that_fails_is_named_and_can_be_resumed(run, monkeypatch, number, target):
    """A read-only folder, a full or broken disk: exit code 1, the file, and --resume ends the run as it would have."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, number, target))
        code, message = run("sonnets-lora")
    assert code == 1
    assert target in message
    assert os.strerror(number) in message
    assert "--resume" in message
    assert run("sonnets-lora", "--resume")[0] == 0
    assert len(metrics(run.folder)) == 2


def test_a_folder_that_vanishes_is_not_made_anew(run, monkeypatch):
    """An unmounted disk: going on would leave half a run in its place."""
    batches = SonnetGPT.loss

    def loss(self, *arguments):
        if (run.folder / "resume").exists():
            shutil.rmtree(run.folder)
        return batches(self, *arguments)

    monkeypatch.setattr(SonnetGPT, "loss", loss)
    code, message = run("sonnets-full")
    assert code == 1
    assert "run/config.json" in Path(message.split(": ")[1]).as_posix()
    assert not (run.folder / "config.json").exists()


def test_a_best_that_a_kill_left_half_replaced_comes_back(run):
    """Between the two renames there is best.old alone; it must not be lost before another is whole."""
    assert run("sonnets-full")[0] == 0
    best = {path.name: path.read_bytes() for path in (run.folder / "best").iterdir()}
    (run.folder / "summary.json").unlink()
    os.replace(run.folder / "best", run.folder / "best.old")
    assert run("sonnets-full", "--resume")[0] == 0
    assert {path.name: path.read_bytes() for path in (run.folder / "best").iterdir()} == best
    assert not (run.folder / "best.old").exists()


def test_a_state_without_its_configuration_is_not_taken(run):
    """Another run's state in a named folder would be gone on with in silence."""
    assert run("sonnets-full")[0] == 0
    for name in ("config.json", "summary.json"):
        (run.folder / name).unlink()
    code, message = run("sonnets-full")
    assert (code, "already holds a run" in message) == (2, True)


def poisoned(monkeypatch, epoch, what):
    """Make the loss, or the gradient alone, not finite in the second step of an epoch."""
    create = Task.__init__

    def wrapped(self, *arguments, **settings):
        create(self, *arguments, **settings)
        loss, batches, steps = self.loss, self.batches, [0, -1]

        def begin(number):
            steps[:] = [0, steps[1] + 1]  # asked for once before the first epoch, to count its steps
            return batches(number)

        def spoiled(model, batch):
            value = loss(model, batch)
            steps[0] += 1
            if steps == [2, epoch]:
                value = value * float("nan") if what == "loss" else Spoil.apply(value)
            return value

        object.__setattr__(self, "loss", spoiled)
        object.__setattr__(self, "batches", begin)

    monkeypatch.setattr(Task, "__init__", wrapped)


class Spoil(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("what", ["loss", "gradient's norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_stop_the_run(run, monkeypatch, kind, what):
    """Epoch, step, rows and what to try; best/ is the first epoch's, and so is metrics.csv; exit code 1."""
    poisoned(monkeypatch, 2, what)
    code, message = run(kind)
    assert code == 1
    assert re.search(rf"the {what} is (nan|inf) at epoch 2, step 2, rows \[\d(, \d)*\]; try a smaller --lr", message)
    assert "--dtype float32" in message
    assert [row["epoch"] for row in metrics(run.folder)] == ["1"]
    name = "adapter_model.safetensors" if kind.endswith("lora") else "model.safetensors"
    assert (run.folder / "best" / name).exists()
    assert not (run.folder / "summary.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_far_too_high_ends_so_too(run, kind):
    """Nothing is patched: at 1e30 the weights overflow by themselves."""
    code, message = run(kind, "--lr=1e30")
    assert code == 1
    assert re.search(r"(loss|norm) is (nan|inf).*try a smaller --lr", message)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(run, kind):
    """Each epoch's losses agree to 2 %: what bfloat16's 8 bits of a product cost, averaged."""
    assert run(kind, "--lr=0.001")[0] == 0
    exact = metrics(run.folder)
    shutil.rmtree(run.folder)
    assert run(kind, "--lr=0.001", "--dtype=bfloat16")[0] == 0
    for one, other in zip(exact, metrics(run.folder), strict=True):
        for name in ("train_loss", "dev_loss"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=0.02)
    assert metrics(run.folder) != exact
