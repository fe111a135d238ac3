"""Bad input through the real commands: one line with value and way out, exit code 2, no file."""

import dataclasses
import errno
import math
import re
import shutil

import pytest
import torch
from small_runs import HEADER, SCRIPTS, arguments, command, make_files, run

from config import GPT2Config, InputError, LoRAConfig, SamplingConfig, TrainConfig
from training.options import exit_cleanly
from training.runs import Run

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
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, data, the files above, and a classifier as a run leaves it."""
    root = make_files(tmp_path_factory.mktemp("files"))
    shutil.copytree(
        run(root, "paraphrases-full", root / "run", "--epochs=1") / "best", root / "best"
    )
    shutil.rmtree(root / "run")
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
    (BOTH, "--epochs=1.5", "argument --epochs: invalid int value: '1.5'"),
    (BOTH, "--dropout=1", "dropout must be a number of at least 0 and below 1, not 1.0"),
    (BOTH, "--schedule=none", "argument --schedule: invalid choice: 'none'"),
    (BOTH, "--dtype=float16", "--dtype float16 needs CUDA; use auto"),
    (BOTH, "--device=tpu", "--device tpu is not possible here; use auto, cpu, or cuda"),
    (BOTH, "--device=cuda:99", "there is no device cuda:99 here"),
    (BOTH, "--use_gpu", "--device cpu is not possible here"),
    (BOTH, "--batchsize=1", r"unrecognized .*--batchsize=1; did you mean --batch_size\?"),
    (BOTH, "--model_size=gpt3", "gpt3 is neither one of tiny, gpt2, .* nor a model folder"),
    (BOTH, "--out_dir={}/file/below", "below is a file, or inside of one; name a folder"),
    ("sonnets", "--temperature=-1", "temperature must be a number of at least 0, not -1.0"),
    ("sonnets", "--sonnet_path=absent.csv", "absent.csv cannot be read .* check the path"),
    ("sonnets", "--sonnet_path={}/file", "file contains no sonnet: expected a number"),
    ("sonnets", "--held_out_sonnet_path={}/latin", "latin is not UTF-8 .byte 5.; save it as UTF-8"),
    ("sonnets", "--sonnet_path={}/long.txt", "sonnet 1 has .* tokens; the model reads 64"),
    ("sonnets", "--dev_sonnet_path={}/prompts.txt", "dev sonnet 1 has no lines after the prompt"),
    ("sonnets", "--sonnet_out={}/sonnets.txt", "--sonnet_out .*sonnets.txt is an input"),
    ("sonnets", "--sonnet_out={}/model", "--sonnet_out .*model is .*a folder"),
    ("sonnets", "--sonnet_out={}/file/out.txt", "--sonnet_out .*inside of a file"),
    ("sonnets", "--score={}/prompts.txt", "prompts.txt lacks the sonnets 2, 3, 4, 5; add them"),
    ("sonnets", "--generate={}/model --prompt=", "--prompt '' is empty; give a text"),
    ("sonnets", "--generate={}/model --prompt=a --num_samples=0", "num_samples must be"),
    ("paraphrases", "--use_lora --freeze_gpt", "--use_lora trains GPT-2 and --freeze_gpt does not"),
    ("paraphrases", "--para_train=absent.csv", "absent.csv cannot be read .* check the path"),
    ("paraphrases", "--para_test={}/file", "file has no column id, sentence1, sentence2"),
    ("paraphrases", "--para_test={}/badlabel.csv", "badlabel.csv, line 2: label is '2'; write 0"),
    ("paraphrases", "--para_dev={}/nolabels.csv", "nolabels.csv has no labels in is_duplicate"),
    ("paraphrases", "--para_test={}/nopairs.csv", "the test pairs: no pair has two texts"),
    ("paraphrases", "--para_train={}/notexts.csv", "the train pairs: no pair has two texts"),
    ("paraphrases", "--para_test_out={}/pairs.csv", "--para_test_out .*pairs.csv is an input"),
    ("paraphrases", "--para_dev_out={}/x --para_test_out={}/x", "--para_test_out .*another output"),
    ("paraphrases", "--predict={}/model", "head.safetensors is not .*; name the best/ folder"),
    ("paraphrases", "--predict={}/best --pair a ", "has an empty text; give two texts"),
    ("paraphrases", "--score={}/predictions.csv", "'p0, maybe' is not an id, a comma, and 0 or 1"),
    ("paraphrases", "--score={}/few.csv", "few.csv lacks 6 ids, among them p1"),
]  # fmt: skip
CASES = [(task, *case) for tasks, *case in OPTIONS for task in BOTH if task in tasks]


@pytest.mark.parametrize(("task", "given", "message"), CASES)
def test_bad_options_and_files(files, tmp_path, monkeypatch, capsys, task, given, message):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    more = given.replace("{}", str(files)).split(" ")
    code, error = stop(task, arguments(files, f"{task}-full", tmp_path / "run", *more), capsys)
    assert re.match(f"error: .*{message}", error), error
    assert code == 2
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


@pytest.mark.parametrize("config", [TrainConfig, LoRAConfig, SamplingConfig, GPT2Config])
def test_settings_have_ranges(config):
    """Of every number: not below the least or above the largest value, no NaN, no truth value."""
    for entry in dataclasses.fields(config):
        if entry.type in (int, float):
            low, high = entry.metadata.get("limits", (1 if entry.type is int else 0, 2**24))
            bad = [low - 1, math.nan, True] + ([high] if entry.metadata else [])
            for value in bad:
                with pytest.raises(InputError, match=rf"{entry.name} must be .* not {value}"):
                    config(**{entry.name: value})


def test_incomplete_data_sets(tmp_path, monkeypatch, capsys):
    """A set is not completed with the files of another."""
    monkeypatch.setattr(SCRIPTS["paraphrases"], "ROOT", tmp_path)
    for given, message in (
        (
            "--dataset=quora",
            r"quora-train.csv does not exist; python data/download_quora.py makes it",
        ),
        ("--para_train=x", "--para_dev is missing too; or name a --dataset"),
    ):
        assert re.match(f"error: .*{message}", stop("paraphrases", given.split(), capsys)[1])


FAULTS = [
    (KeyboardInterrupt(), 130, "stopped; repeat the command with --resume to continue"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: out of memory; use a smaller"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 1, "error: out of memory; use a smaller"),
    (FloatingPointError("loss nan"), 1, "error: loss nan; saved files are intact"),
    (OSError(errno.ENOSPC, "No space left", "f"), 1, "error: f: No space left; saved files are"),
]


@pytest.mark.parametrize(("fault", "code", "message"), FAULTS)
def test_faults_during_a_run(files, tmp_path, monkeypatch, capsys, fault, code, message):
    """One line without a traceback; --resume completes the run."""

    def fail(self, state):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", fail)
        found, error = stop("sonnets", arguments(files, "sonnets-lora", tmp_path / "run"), capsys)
    assert (found, error.startswith(message)) == (code, True), error
    run(files, "sonnets-lora", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), exit_cleanly():
        raise RuntimeError("a bug")
