"""Faults during a run: kills, full and vanished disks, numbers that are not finite.

`python tests/kill_everywhere.py` tests every point of a run; these tests take some of them.
"""

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

import plots
from cli import exit_cleanly
from models.sonnet_gpt import SonnetGPT
from training import Task

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["sonnets-full", "sonnets-lora", "paraphrases-full", "paraphrases-lora"]
posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and signals")


@posix
def test_killed_anywhere_and_resumed_equals_uninterrupted():
    """At every 97th write, fsync, rename or removal: the same files with the same contents."""
    command = [sys.executable, "tests/kill_everywhere.py", "--every=97", "--first=20", "--random=1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    counts = [json.loads(line) for line in result.stdout.splitlines()]
    assert [count["kind"] for count in counts] == KINDS
    for count in counts:
        assert count["points"] > 100
        assert count["equal"] == count["kills"] > 1, count["unequal"]
        assert count["random_equal"] == 1, count["unequal"]


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
    """Run a command in this process, as the script does; returns exit code and output."""
    kill_everywhere, root = kit
    for name in ("draw_curves", "draw_attention"):
        monkeypatch.setattr(plots, name, lambda *_: None)

    def start(kind, *more):
        script = kill_everywhere.SCRIPTS[kind.split("-")[0]]
        given = kill_everywhere.options(root, kind, tmp_path / "run", *more)
        try:
            with exit_cleanly():
                script.main(script.parse_options(given))
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert error.count("\n") == 1, error
            return stop.code, error.strip()
        return 0, capsys.readouterr().out

    start.folder = tmp_path / "run"
    start.metrics = lambda: kill_everywhere.untimed(tmp_path / "run" / "metrics.csv")
    return start


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


DISK = """
import json, pathlib, sys
sys.path.insert(0, "tests")
import kill_everywhere as k
bench = k.Bench(pathlib.Path(sys.argv[1]))
for kind in ("sonnets-full", "paraphrases-lora"):
    whole, points, _ = bench.whole(kind)
    at = [number for number, name in enumerate(points, 1) if name == "before save"][2]
    code = bench.run(kind, "cut", at=at, event=k.limit_files(3000))
    path = bench.root / "cut/run/resume/state.pt"
    state = k.torch.load(path, weights_only=True)["progress"]
    log = bench.log("cut")
    unequal = k.differences(bench.resumed(kind, "cut"), whole)
    print(json.dumps([code, log, state["epoch"], unequal]))
"""


@posix
def test_a_full_disk_keeps_the_last_state(tmp_path):
    """From the third save on, files are limited to 3000 bytes: one line, exit code 1."""
    command = [sys.executable, "-c", DISK, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for line, saved in zip(result.stdout.splitlines(), (1, 0), strict=True):
        code, log, epoch, unequal = json.loads(line)
        assert (code, epoch, unequal) == (1, saved, [])
        error = r"error: \S+: .*File too large.*; saved files are intact .*--resume\)"
        assert re.fullmatch(error, log.splitlines()[-1])
        assert "Traceback" not in log


def failing(call, number, kind):
    def wrapped(*arguments, **settings):
        if kind in str(arguments[-1]):
            raise OSError(number, os.strerror(number), str(arguments[-1]))
        return call(*arguments, **settings)

    return wrapped


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get
)
@pytest.mark.parametrize("target", ["state.pt", "best", "steps.csv", "summary.json", "run.txt"])
def test_a_write_that_fails_is_named_and_can_be_resumed(run, monkeypatch, number, target):
    """A read-only folder, a full or broken disk: exit code 1 and the file; --resume completes."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace, number, target))
        code, message = run("sonnets-lora")
    assert code == 1
    assert target in message
    assert os.strerror(number) in message
    assert "--resume" in message
    assert run("sonnets-lora", "--resume")[0] == 0
    assert len(run.metrics()) == 2


def test_a_folder_that_vanishes_is_not_created_again(run, monkeypatch):
    """An unmounted disk: to continue would leave half a run in its place."""
    original = SonnetGPT.loss

    def loss(self, *arguments):
        if (run.folder / "resume").exists():
            shutil.rmtree(run.folder)
        return original(self, *arguments)

    monkeypatch.setattr(SonnetGPT, "loss", loss)
    code, message = run("sonnets-full")
    assert code == 1
    assert f"{run.folder.name}/" in Path(message.split(": ")[1]).as_posix()
    assert not (run.folder / "config.json").exists()


def test_a_best_that_a_kill_left_half_replaced_is_restored(run):
    """Between two renames only best.old exists; it must not be lost before another is complete."""
    assert run("sonnets-full")[0] == 0
    best = contents(run.folder / "best")
    (run.folder / "summary.json").unlink()
    os.replace(run.folder / "best", run.folder / "best.old")
    assert run("sonnets-full", "--resume")[0] == 0
    assert contents(run.folder / "best") == best
    assert not (run.folder / "best.old").exists()


def test_a_state_without_its_configuration_is_rejected(run):
    """Otherwise another run's state in a named folder would be continued silently."""
    assert run("sonnets-full")[0] == 0
    for name in ("config.json", "summary.json"):
        (run.folder / name).unlink()
    for more in ((), ("--resume",)):
        code, message = run("sonnets-full", *more)
        assert (code, "already holds a run" in message) == (2, True)


HOLD = """
import sys, time, runs
runs.Run.save_state = lambda *_: (print("writing", flush=True), time.sleep(60))
script = __import__(sys.argv[1])
script.main(script.parse_options(sys.argv[2:]))
"""


@posix
def test_a_run_that_another_process_writes_is_rejected(kit, run):
    """--resume and a second start exit with code 2 and change nothing; a killed writer is none."""
    kill_everywhere, root = kit
    given = kill_everywhere.options(root, "sonnets-lora", run.folder)
    command = [sys.executable, "-c", HOLD, "sonnet_generation", *given]
    writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line == "writing\n" for line in writer.stdout)
        before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
        code, message = run("sonnets-lora", "--resume")
        assert (code, "written by another process" in message) == (2, True)
        assert run("sonnets-lora")[0] == 2
        assert writer.poll() is None
        after = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
        assert after == before
        assert run.folder / "config.json" in before
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert run("sonnets-lora", "--resume")[0] == 0
    assert len(run.metrics()) == 2


class InfiniteGradient(torch.autograd.Function):
    """The identity with an infinite gradient."""

    @staticmethod
    def forward(context, value):
        return value.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("inf")


def spoil(monkeypatch, epoch, what):
    """Make the loss, or only the gradient, not finite in the second step of an epoch."""
    create = Task.__init__

    def wrapped(self, *arguments, **settings):
        create(self, *arguments, **settings)
        loss, batches = self.loss, self.batches
        place = [0, 0]  # epoch and step

        def start_epoch(number):
            place[:] = [number + 1, 0]
            return batches(number)

        def spoiled(model, batch):
            value = loss(model, batch)
            place[1] += 1
            if place == [epoch, 2]:
                value = value * float("nan") if what == "loss" else InfiniteGradient.apply(value)
            return value

        object.__setattr__(self, "loss", spoiled)
        object.__setattr__(self, "batches", start_epoch)

    monkeypatch.setattr(Task, "__init__", wrapped)


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_stop_the_run(run, monkeypatch, kind, what):
    """Exit code 1 with epoch, step, examples and advice; best/ and metrics.csv stay the first's."""
    spoil(monkeypatch, 2, what)
    code, message = run(kind)
    assert code == 1
    assert re.search(
        rf"{what} (nan|inf)\b.* at epoch 2, step 2 \(examples \[\d(, \d)*\]\)", message
    )
    assert "try a smaller --lr" in message
    assert "--dtype float32" in message
    assert [record["epoch"] for record in run.metrics()] == ["1"]
    name = "adapter_model.safetensors" if kind.endswith("lora") else "model.safetensors"
    assert (run.folder / "best" / name).exists()
    assert not (run.folder / "summary.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_learning_rate_that_is_much_too_high_stops_the_run(run, kind):
    """Nothing is patched: at 1e30 the weights overflow."""
    code, message = run(kind, "--lr=1e30")
    assert code == 1
    assert re.search(r"(loss|norm)( is)? (nan|inf).*try a smaller --lr", message)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(run, kind):
    """The losses of each epoch agree to 2 %: bfloat16 has 8 bits, but errors average out."""
    assert run(kind, "--lr=0.001")[0] == 0
    exact = run.metrics()
    shutil.rmtree(run.folder)
    assert run(kind, "--lr=0.001", "--dtype=bfloat16")[0] == 0
    for one, other in zip(exact, run.metrics(), strict=True):
        for name in ("train_loss", "dev_loss"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=0.02)
    assert run.metrics() != exact
