"""Bad input through the real commands: one line with value and way out, exit code 2, no file."""

import dataclasses
import errno
import math
import re
import shutil

import pytest
import torch
from small_runs import HEADER, SCRIPTS, arguments, command, make_files, run

from config import ROOT, InputError, LoRAConfig, SamplingConfig, TrainConfig
from training.loop import Trainer
from training.options import exit_cleanly

BOTH = ("sonnets", "paraphrases")
FILES = {
    "file": b"",
    "prompts.txt": b"1\na\nb\nc\n",
    "long.txt": b"1\n" + b"word by word\n" * 99,
    "latin": b"1\ncaf\xe9\n",
    "nolabels.csv": b"id\tsentence1\tsentence2\na\tx\ty\n",
    "nopairs.csv": HEADER.encode(),
    "notexts.csv": HEADER.encode() + b"a\t\ty\t1\n",
    "badlabel.csv": HEADER.encode() + b"a\tx\ty\t2\n",
    "predictions.csv": b"id\np0, maybe\n",
    "few.csv": b"id\np0, 1\n",
    "twice.csv": b"id\np0, 1\np0, 0\n",
    "labels.csv": HEADER.replace("\n", "\tis_duplicate\n").encode() + b"a\tx\ty\t1\t0\n",
    "blank.txt": b"1\n\xe3\x80\x80\n",  # an ideographic space
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, data, the files above, and a classifier as a run leaves it."""
    root = make_files(tmp_path_factory.mktemp("files"))
    folder = run(root, "paraphrases-full", root / "run", "--epochs=1")
    shutil.copytree(folder / "best", root / "best")
    shutil.rmtree(folder)
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    return root


def stop(task, given, capsys):
    """The exit code and the one line on the screen of a command that fails."""
    with pytest.raises(SystemExit) as caught, exit_cleanly():
        command(task, given)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return caught.value.code, error


OPTIONS = [
    (BOTH, "--dropout=1", "dropout must be at least 0 and below 1, not 1.0"),
    (BOTH, "--lr=nan", "lr must be at least 1e-12 and below 1000, not nan"),
    (BOTH, "--device=tpu", "there is no device tpu here; --device is auto, cpu or cuda:N"),
    (BOTH, "--device=cuda:99", "there is no device cuda:99 here"),
    (BOTH, "--use_gpu", "there is no device cuda:0 here"),
    (BOTH, "--model_size=gpt3", "gpt3 is neither one of tiny, gpt2, .* nor a model folder"),
    ("sonnets", "--sonnet_out={}/sonnets.txt", "--sonnet_out .*sonnets.txt is an input"),
    ("sonnets", "--sonnet_out={}/model", "--sonnet_out .*model is .* a folder"),
    ("sonnets", "--sonnet_out=", "--sonnet_out .* is .* a folder"),
    ("paraphrases", "--para_dev_out=x --para_test_out=x", "--para_test_out .*x is .* taken"),
    ("sonnets", "--prompt=a", "--prompt needs --generate DIR, a trained model"),
    ("paraphrases", "--pair a b", "--pair needs --predict DIR, a trained model"),
    ("sonnets", "--sonnet_path={}/blank.txt", "blank.txt: sonnet 1 is empty"),
    ("paraphrases", "--para_test={}/labels.csv", "no column is_duplicate, or several"),
    ("paraphrases", "--score={}/twice.csv", "twice.csv: the id p0 occurs more than once"),
    (BOTH, "--out_dir={}/file/below", "below is a file, or another process writes it"),
    ("sonnets", "--temperature=-1", "temperature must be at least 0 and below inf, not -1.0"),
    ("sonnets", "--sonnet_path=absent.csv", "absent.csv cannot be read .*: .*No such file"),
    ("sonnets", "--sonnet_path={}/file", "file contains no sonnet: expected a number"),
    ("sonnets", "--held_out_sonnet_path={}/latin", "latin cannot be read .* in position 5"),
    ("sonnets", "--sonnet_path={}/long.txt", "sonnet 1 has .* tokens; the model reads 64"),
    ("sonnets", "--dev_sonnet_path={}/prompts.txt", "prompts.txt has a sonnet without lines after"),
    ("sonnets", "--score={}/prompts.txt", "prompts.txt lacks sonnets of .*sonnets.txt"),
    ("sonnets", "--generate={}/model --prompt=", "the prompt '' has 0 tokens; 1 to 63 fit"),
    ("paraphrases", "--use_lora --freeze_gpt", "the methods lora and frozen exclude each other"),
    ("paraphrases", "--para_train=absent.csv", "absent.csv cannot be read as UTF-8 text"),
    ("paraphrases", "--para_test={}/file", "file has no column id, or several"),
    ("paraphrases", "--para_test={}/badlabel.csv", "badlabel.csv, line 2: label is '2'; write 0"),
    ("paraphrases", "--para_dev={}/nolabels.csv", "nolabels.csv has no labels in is_duplicate"),
    ("paraphrases", "--para_test={}/nopairs.csv", "no pair has two texts"),
    ("paraphrases", "--para_train={}/notexts.csv", "no pair has two texts"),
    ("paraphrases", "--predict={}/model", "head.safetensors is not .*; name the best/ folder"),
    ("paraphrases", "--predict={}/best --pair a ", "no pair has two texts"),
    ("paraphrases", "--score={}/predictions.csv", "predictions.csv has no 0 or 1 for 7 ids, as p0"),
    ("paraphrases", "--score={}/few.csv", "few.csv has no 0 or 1 for 6 ids, as p1"),
]  # fmt: skip
CASES = [(task, *case) for tasks, *case in OPTIONS for task in BOTH if task in tasks]


@pytest.mark.parametrize(("task", "given", "message"), CASES)
def test_bad_options_and_files(files, tmp_path, monkeypatch, capsys, task, given, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    more = given.replace("{}", str(files)).split(" ")
    code, error = stop(task, arguments(files, f"{task}-full", tmp_path / "run", *more), capsys)
    assert re.match(f"error: .*{message}", error), error
    assert code == 2
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


ARGUMENTS = {
    "--epochs=1.5": "argument --epochs: invalid int value: '1.5'",
    "--schedule=none": "argument --schedule: invalid choice: 'none'",
    "--batchsize=1": "unrecognized arguments: --batchsize=1",
}


@pytest.mark.parametrize("task", SCRIPTS)
@pytest.mark.parametrize(("given", "message"), ARGUMENTS.items())
def test_arguments_that_argparse_rejects(capsys, task, given, message):
    """A short usage and a line with the value."""
    with pytest.raises(SystemExit, match="2"):
        command(task, [given])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"error: {message}" in lines[1]


@pytest.mark.parametrize("config", [TrainConfig, LoRAConfig, SamplingConfig])
def test_settings_have_ranges(config):
    """Of every number: not below the least or above the largest value, and not NaN."""
    for entry in dataclasses.fields(config):
        if entry.type in (int, float):
            low, high = entry.metadata["limits"]
            for value in (low - 1, high, math.nan):
                with pytest.raises(InputError, match=rf"{entry.name} must be .* not {value}"):
                    config(**{entry.name: value})


def test_incomplete_data_sets(tmp_path, monkeypatch, capsys):
    """A set is not completed with the files of another."""
    monkeypatch.setattr(SCRIPTS["paraphrases"], "ROOT", tmp_path)
    for given, message in (
        ("--dataset=quora", "quora-train.csv cannot be read"),
        (f"--para_train={ROOT / 'data' / 'verses-dev.csv'}", "--para_dev is missing; name all"),
        (f"--para_dev_out={tmp_path}/data/verses-test.csv", "verses-test.csv is an input"),
    ):
        assert re.match(f"error: .*{message}", stop("paraphrases", given.split(), capsys)[1])


FAULTS = [
    (KeyboardInterrupt(), 130, "stopped; --resume continues a run, and --continue a table"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: CUDA out of memory; saved files"),
    (FloatingPointError("loss nan"), 1, "error: loss nan; saved files are intact"),
    (OSError(errno.ENOSPC, "No space", "f"), 1, "error: [Errno 28] No space: 'f'; saved files are"),
]


@pytest.mark.parametrize(("fault", "code", "message"), FAULTS)
def test_faults_during_a_run(files, tmp_path, monkeypatch, capsys, fault, code, message):
    """One line without a traceback; --resume completes the run."""

    def fail(self):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", fail)
        found, error = stop("sonnets", arguments(files, "sonnets-lora", tmp_path / "run"), capsys)
    assert (found, error.startswith(message)) == (code, True), error
    run(files, "sonnets-lora", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), exit_cleanly():
        raise RuntimeError("a bug")
