"""A batch in parts, or over processes, is the same step: equal losses and weights, within float error."""

import csv
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

import processes
from config import ROOT

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(script, folder, *options, launcher=(sys.executable,)):
    """Run a script's real command; returns its metrics, summary and saved weights."""
    command = [*launcher, str(ROOT / script), "--dtype", "float32", "--seed", "3", "--out_dir", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        metrics = list(csv.DictReader(file))
    weights = {}
    for path in sorted((folder / "best").glob("*.safetensors")):
        weights |= load_file(path)
    return metrics, json.loads((folder / "summary.json").read_text(encoding="utf-8")), weights, done.stdout


def assert_same_run(one, other):
    for ours, theirs in zip(one[0], other[0], strict=True):
        for name in ("train_loss", "dev_loss"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5)
    for weights in (one[2], other[2]):
        for name in [name for name in weights if name.endswith("c_attn.bias")]:
            # a key's bias moves all scores of a row alike: its gradient is 0, and AdamW makes steps of its rounding
            query, _, value = weights.pop(name).chunk(3)
            weights |= {f"{name}.query": query, f"{name}.value": value}
    assert_close(one[2], other[2], atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Eleven sonnets, so that the last batch is short, and 21 pairs."""
    folder = tmp_path_factory.mktemp("files")
    sonnets = (ROOT / "data" / "Shakespeare_Sonnets_test.csv").read_text(encoding="utf-8")
    (folder / "sonnets.csv").write_text(sonnets, encoding="utf-8")
    pairs = (ROOT / "data" / "verses-dev.csv").read_text(encoding="utf-8").split("\n")[:22]
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return folder


def sonnet_options(files, *more):
    return ["--sonnet_path", str(files / "sonnets.csv"), "--epochs", "2", "--max_new_tokens", "3", *more]


def pair_options(files, *more):
    paths = [part for split in ("train", "dev", "test") for part in (f"--para_{split}", str(files / "pairs.csv"))]
    return [*paths, "--epochs", "2", "--pooling", "generalized", *more]


def test_accumulated_batches_are_one_large_batch(files, tmp_path):
    """Parts count by their tokens: a plain mean of means would weigh a short part's tokens more."""
    large = run("sonnet_generation.py", tmp_path / "large", *sonnet_options(files, "--batch_size", "8"))
    for name, batch, accumulation in (("half", "4", "2"), ("eighth", "1", "8")):
        options = sonnet_options(files, "--batch_size", batch, "--grad_accumulation", accumulation)
        assert_same_run(run("sonnet_generation.py", tmp_path / name, *options), large)


@pytest.mark.parametrize(("script", "options", "more"), [
    ("sonnet_generation.py", sonnet_options, ("--batch_size", "5")),
    ("paraphrase_detection.py", pair_options, ("--batch_size", "5", "--use_lora", "--lora_dropout", "0")),
])  # fmt: skip
def test_two_processes_take_the_steps_of_one(files, tmp_path, script, options, more):
    """The last batch has a single row, so that one process has none. Only one of them prints."""
    two = run(script, tmp_path / "two", *options(files, *more), launcher=TORCHRUN)
    one = run(script, tmp_path / "one", *options(files, *more))
    assert_same_run(two, one)
    assert two[3].count("epoch  2/2") == 1
    assert two[1]["best_dev_loss"] == pytest.approx(one[1]["best_dev_loss"], rel=1e-5)


def test_two_processes_resume(files, tmp_path):
    """Stopped by a signal that reaches both, they save once, and go on to the weights of an uninterrupted run."""
    options = sonnet_options(files, "--batch_size", "4", "--use_lora", "--lora_dropout", "0.3")
    whole = run("sonnet_generation.py", tmp_path / "whole", *options, launcher=TORCHRUN)
    folder = tmp_path / "cut"
    code = (
        "import os, signal, sys, training\n"
        "save = training._end_epoch\n"
        "def end(*arguments):\n"
        "    save(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "training._end_epoch = end\n"
        "import sonnet_generation as script\n"
        "from config import exit_cleanly\n"
        "with exit_cleanly():\n"
        "    script.main(script.parse_options(sys.argv[1:]))\n"
    )
    (tmp_path / "stopped.py").write_text(code, encoding="utf-8")
    command = [*TORCHRUN, str(tmp_path / "stopped.py"), "--dtype", "float32", "--seed", "3", "--out_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "stopped by SIGTERM" in done.stderr
    assert (folder / "resume" / "state.pt").is_file()
    resumed = run("sonnet_generation.py", folder, *options, "--resume", launcher=TORCHRUN)
    assert_same_run(resumed, whole)
    assert resumed[2].keys() == whole[2].keys()


def test_alone_nothing_changes():
    """The shares of one process are all the rows, and sums are the numbers themselves."""
    rows = list(range(7))
    assert processes.parts(rows, 1) == [rows]
    assert processes.parts(rows, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert processes.parts([1], 4) == [[1]]
    assert processes.total(1.5, 2) == [1.5, 2]
    assert (processes.rank(), processes.size(), processes.is_writer()) == (0, 1, True)
