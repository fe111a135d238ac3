"""Micro-batches and several processes take the same steps as one batch in one process."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys

import pandas as pd
import pytest
import torch
from kill_everywhere import SCRIPTS, make_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import distributed
from config import ROOT, InputError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
STOPPED = """
import os, signal, sys
from training import Trainer
end_epoch = Trainer.end_epoch
def end_and_stop(self):
    end_epoch(self)
    os.kill(os.getpid(), signal.SIGTERM)
Trainer.end_epoch = end_and_stop
import sonnet_generation as script
from cli import exit_cleanly
with exit_cleanly():
    script.main(script.parse_options(sys.argv[1:]))
"""

COUNTED = """
import json, os, sys
import torch.distributed as dist
import training
calls = []
for name in ("all_reduce", "all_gather_object", "all_gather", "broadcast", "reduce", "barrier"):
    def counted(*arguments, name=name, call=getattr(dist, name)):
        calls[-1].append([name, arguments[0].numel() if name == "all_reduce" else None])
        return call(*arguments)
    setattr(dist, name, counted)
step, end_epoch = training.Trainer.step, training.Trainer.end_epoch
training.Trainer.step = lambda *arguments: (calls.append([]), step(*arguments))
training.Trainer.end_epoch = lambda self: (calls.append([]), end_epoch(self))
training.LOG_INTERVALS["cpu"] = 2
import sonnet_generation as script
calls.append([])
shutdown = training.distributed.shutdown
def report():
    if os.environ["RANK"] == "0":
        print(json.dumps(calls), file=sys.stderr)
    shutdown()
training.distributed.shutdown = report
script.main(script.parse_options(sys.argv[1:]))
"""


def start(script, folder, *options):
    """Run a script's command in two processes."""
    command = [*TORCHRUN, str(ROOT / script), f"--out_dir={folder}", *options]
    settings = {"cwd": folder.parent, "env": ENVIRONMENT, "capture_output": True, "text": True}
    return subprocess.run(command, **settings, timeout=300)


def outcome(folder):
    """Metrics, summary and saved weights of a run."""
    weights = {}
    for path in sorted((folder / "best").glob("*.safetensors")):
        weights |= load_file(path)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return pd.read_csv(folder / "metrics.csv"), summary, weights


def run_two(task, folder, *options):
    result = start(SCRIPTS[task].__file__, folder, *options)
    assert result.returncode == 0, result.stderr
    return *outcome(folder), result.stdout


def run_one(task, folder, *options):
    """Run a script in this process."""
    SCRIPTS[task].main(SCRIPTS[task].parse_options([*options, f"--out_dir={folder}"]))
    return outcome(folder)


def assert_same_run(one, other):
    for name in ("train_loss", "dev_loss"):
        assert one[0][name].tolist() == pytest.approx(other[0][name].tolist(), rel=1e-5)
    for weights in (one[2], other[2]):
        for name in [name for name in weights if name.endswith("c_attn.bias")]:
            # A key's bias moves all scores of a row alike: its gradient is 0 plus rounding errors,
            # which AdamW turns into steps.
            query, _, value = weights.pop(name).chunk(3)
            weights |= {f"{name}.query": query, f"{name}.value": value}
    assert_close(one[2], other[2], atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without dropout, eleven sonnets, so that the last batch is short, and 21 pairs."""
    folder = tmp_path_factory.mktemp("files")
    config = make_model(folder / "model") / "config.json"
    config.write_text(config.read_text().replace('pdrop": 0.1', 'pdrop": 0.0'))
    lines = "From fairest\ncreatures\nwe {0}\ndesire"
    sonnets = [f"{n}\n\n{lines.format('thy brow ' * n)}\n" for n in range(1, 12)]
    (folder / "sonnets.txt").write_text("\n".join(sonnets))
    pairs = [f"p{n}\t{'thy brow ' * n}\t{'thy' if n % 2 else 'z'}\t{n % 2}\n" for n in range(1, 22)]
    (folder / "pairs.csv").write_text("id\tsentence1\tsentence2\tis_duplicate\n" + "".join(pairs))
    return folder


def options(files, task, batch_size, *more):
    if task == "sonnets":
        names = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
        given = [f"--{name}={files / 'sonnets.txt'}" for name in names] + ["--max_new_tokens=3"]
    else:
        given = [f"--para_{split}={files / 'pairs.csv'}" for split in ("train", "dev", "test")]
        given += ["--pooling=generalized", "--pair_encoding=joint"]
    given += [f"--model_size={files / 'model'}", "--epochs=2", f"--batch_size={batch_size}"]
    return [*given, "--lr=0.001", "--seed=3", "--device=cpu", "--dtype=float32", *more]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Predictions are written below the working directory."""
    monkeypatch.chdir(tmp_path)


def test_accumulated_batches_are_one_large_batch(files, tmp_path):
    """Micro-batches count by their tokens: a mean of means would weigh short ones more."""
    large = run_one("sonnets", tmp_path / "large", *options(files, "sonnets", 8))
    for batch_size, accumulation in ((4, 2), (1, 8)):
        given = options(files, "sonnets", batch_size, f"--grad_accumulation={accumulation}")
        assert_same_run(run_one("sonnets", tmp_path / str(batch_size), *given), large)


@pytest.mark.parametrize(
    ("task", "more"), [("sonnets", ()), ("paraphrases", ("--use_lora", "--lora_dropout=0"))]
)
def test_two_processes_take_the_steps_of_one(files, tmp_path, task, more):
    """The last batch has one example, so that one process has none. Only the main one prints."""
    given = options(files, task, 5, *more)
    two = run_two(task, tmp_path / "two", *given)
    # Also in a process of its own with one thread, so that only the sums over examples differ.
    command = [sys.executable, SCRIPTS[task].__file__, f"--out_dir={tmp_path / 'one'}", *given]
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=300)
    one = outcome(tmp_path / "one")
    assert_same_run(two, one)
    assert two[3].count("epoch  2/2") == 1
    assert two[1]["best_dev_loss"] == pytest.approx(one[1]["best_dev_loss"], rel=1e-5)
    steps = [pd.read_csv(tmp_path / name / "steps.csv") for name in ("two", "one")]
    assert_close(*(torch.tensor(table.to_numpy()) for table in steps), rtol=1e-4, atol=1e-6)


def test_two_processes_resume(files, tmp_path):
    """Stopped by a signal, both end and the run continues to the weights of an uninterrupted one.

    A single process does not resume it: its dropout would differ.
    """
    given = options(files, "sonnets", 4, "--use_lora", "--lora_dropout=0.3")
    whole = run_two("sonnets", tmp_path / "whole", *given)
    folder = tmp_path / "cut"
    (tmp_path / "stopped.py").write_text(STOPPED, encoding="utf-8")
    stopped = start(tmp_path / "stopped.py", folder, *given)
    assert stopped.returncode != 0
    assert "stopped by SIGTERM" in stopped.stderr
    assert "torchrun --nproc_per_node=2" in stopped.stderr
    assert len(pd.read_csv(folder / "metrics.csv")) == 1
    with pytest.raises(InputError, match="already holds a run"):
        run_one("sonnets", folder, *given, "--resume")
    resumed = run_two("sonnets", folder, *given, "--resume")
    assert_same_run(resumed, whole)
    assert resumed[2].keys() == whole[2].keys()
    assert (folder / "steps.csv").read_bytes() == (tmp_path / "whole/steps.csv").read_bytes()


def test_one_collective_for_gradients_per_step(files, tmp_path):
    """And one of a few numbers at log steps, here every second and the last of three."""
    (tmp_path / "counted.py").write_text(COUNTED, encoding="utf-8")
    given = options(files, "sonnets", 4, "--use_lora", "--grad_accumulation=1", "--epochs=1")
    result = start(tmp_path / "counted.py", tmp_path / "run", *given)
    _, *steps, _ = json.loads(re.search(r"^\[\[.*", result.stderr, re.MULTILINE)[0])
    summary = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert summary["processes"] == 2
    gradients = steps[0][0]
    assert gradients[0] == "all_reduce"
    assert gradients[1] > 100
    # Two numbers per step, and two signals.
    assert steps == [[gradients], [gradients, ["all_reduce", 6]], [gradients, ["all_reduce", 4]]]


def test_two_nodes_train_and_resume(files, tmp_path):
    """Stopped and continued by the commands that they print, they reach the weights of one."""
    given = options(files, "sonnets", 5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = f"--nnodes=2 --node_rank={{}} --master_addr=127.0.0.1 --master_port={port}"
    script, folder = tmp_path / "stopped.py", tmp_path / "two"
    script.write_text(STOPPED, encoding="utf-8")
    command = [str(script), *given, f"--out_dir={folder}"]
    errors = run_nodes([[*torchrun.format(node).split(), *command] for node in (0, 1)])
    printed = [re.search("continue with: torchrun (.*)", text)[1] for text in errors]
    nodes = [f"--nproc_per_node=1 {torchrun.format(node)}" for node in (0, 1)]
    assert printed == [f"{node} {shlex.join(command)} --resume" for node in nodes]
    assert len(pd.read_csv(folder / "metrics.csv")) == 1
    uninterrupted = SCRIPTS["sonnets"].__file__
    run_nodes([shlex.split(line.replace(str(script), uninterrupted)) for line in printed])
    assert_same_run(outcome(folder), run_one("sonnets", tmp_path / "one", *given))


def run_nodes(commands):
    """Run torchrun as on several machines; returns what each wrote to stderr."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    settings = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    nodes = [subprocess.Popen([*launcher, *c], text=True, **settings) for c in commands]
    return [node.communicate(timeout=300)[1] for node in nodes]


def test_gradients_are_views_of_one_tensor_in_the_layout_of_their_parameters(monkeypatch):
    """Backward adds to them, and zero_grad must not replace them."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    transposed = nn.Parameter(torch.randn(3, 2).T)
    parameters = [nn.Parameter(torch.randn(2)), transposed]
    flat = distributed.flat_gradients(parameters)
    for factor in (1.0, 2.0):
        (transposed * torch.arange(6.0).view(2, 3) * factor).sum().backward()
        assert transposed.grad.stride() == transposed.stride()
        assert transposed.grad.tolist() == [
            [0, factor, 2 * factor],
            [3 * factor, 4 * factor, 5 * factor],
        ]
        assert flat.tolist() == [0, 0, *transposed.grad.T.flatten().tolist()]
        torch.optim.SGD(parameters).zero_grad(set_to_none=False)
        assert not flat.any()


def test_a_single_process_needs_no_group():
    """Its share is the whole batch, and sums are the numbers themselves."""
    indices = list(range(7))
    assert distributed.micro_batches(indices, 1) == [indices]
    assert distributed.micro_batches(indices, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert distributed.micro_batches([1], 4) == [[1]]
    assert distributed.all_reduce(torch.tensor([1.5, 2])).tolist() == [1.5, 2]
    assert distributed.flat_gradients([torch.zeros(3)]) is None
    assert distributed.all_gather("a") == ["a"]
    assert distributed.from_main_process(lambda: 3) == 3
    state = (distributed.rank(), distributed.world_size(), distributed.is_main_process())
    assert state == (0, 1, True)
