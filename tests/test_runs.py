"""The folder of a run: its name, what may be resumed, locks, and files that are whole or absent."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_runs import make_files, run

from config import ROOT, InputError
from training import runs
from training.runs import atomic_path, open_run, write_text


def start(out_dir=None, resume=False, inputs=None, name="a", **others):
    options = {"out_dir": out_dir and str(out_dir), "resume": resume, "lr": 0.1, **others}
    return open_run("task", name, options | (inputs or {}))


def test_a_named_folder_is_used_once(tmp_path):
    """--resume continues the run, or starts it."""
    assert start(tmp_path / "a", resume=True) == tmp_path / "a"
    assert start(tmp_path / "a", resume=True) == tmp_path / "a"
    before = (tmp_path / "a" / "config.json").read_bytes()
    with pytest.raises(InputError, match="holds a run: --resume it, or name another --out_dir"):
        start(tmp_path / "a")
    assert (tmp_path / "a" / "config.json").read_bytes() == before


def test_folders_of_others_are_not_replaced(tmp_path):
    """Neither a best/ without config.json nor, by a file, any folder."""
    (tmp_path / "best").mkdir()
    with pytest.raises(InputError, match="best is not of a run; name another --out_dir"):
        start(tmp_path)
    with pytest.raises(OSError, match="best"):
        write_text(tmp_path / "best", "a")
    assert (tmp_path / "best").is_dir()


def test_a_repeated_command_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """--resume continues the last of them."""
    monkeypatch.chdir(tmp_path)
    assert [start(resume=resume).name for resume in (True, False, False)] == ["a", "a-2", "a-3"]
    assert start(resume=True) == Path("runs/task/a-3")
    assert start(name="b") == Path("runs/task/b")


INPUTS = {"data_sha256": {"sonnet_path": "a"}, "model_sha256": "b", "processes": 1, "dtype": "c"}


@pytest.mark.parametrize("name", ["lr", "use_lora", *INPUTS])
def test_another_run_is_not_resumed(tmp_path, name):
    """The message names what differs, and nothing is written."""
    start(tmp_path, inputs=INPUTS)
    before = (tmp_path / "config.json").read_bytes()
    other = {"inputs": INPUTS | {name: "x"}} if name in INPUTS else {"inputs": INPUTS, name: "x"}
    with pytest.raises(InputError, match=f"has (another |--){name} .*, not x"):
        start(tmp_path, resume=True, **other)
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_commit_says_whether_code_was_edited(tmp_path, monkeypatch):
    """A table of results that is written again is not code."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.environment()["commit"] is None
    for name in ("code.py", "table.csv"):
        (tmp_path / name).write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a"]
    for command in (["init"], ["add", "."], [*author, "commit", "-m", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "table.csv").write_text("2")
    commit = runs.environment()["commit"]
    assert re.fullmatch("[0-9a-f]{12}", commit)
    (tmp_path / "code.py").write_text("2")
    assert runs.environment()["commit"] == f"{commit}+"


def test_other_code_and_packages_are_noted(tmp_path, monkeypatch, capsys):
    """Such a run continues, and the commits before are kept."""
    start(tmp_path)
    now = runs.environment()
    for change in ({"commit": "abc+"}, {"packages": now["packages"] | {"torch": "9"}}):
        monkeypatch.setattr(runs, "environment", lambda change=change: now | change)
        start(tmp_path, resume=True)
        assert "note: resumed with other code or packages" in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["packages"]["torch"] == "9"
    assert config["resumed"] == [now["commit"], "abc+"]


def test_a_moved_run_and_moved_data_are_resumed(tmp_path, monkeypatch):
    """Data and model are compared by their contents, however their paths are spelled."""
    files = make_files(tmp_path)
    run(files, "sonnets-full", tmp_path / "one", "--epochs=0")
    (tmp_path / "one").rename(tmp_path / "two")
    runs.locks.clear()  # as in another process
    shutil.copytree(files / "model", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    names = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
    given = [f"--{name}=sonnets.txt" for name in names] + ["--model_size=copy", "--resume"]
    run(files, "sonnets-full", Path("two"), "--epochs=0", *given)
    Path("sonnets.txt").write_text("1\na\nb\nc\nd\n")
    with pytest.raises(InputError, match="two has another data_sha256"):
        run(files, "sonnets-full", Path("two"), "--epochs=0", *given)


def test_a_run_that_another_process_writes_is_refused(tmp_path):
    """Until that process ends, also by a kill."""
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]).acquire(); print(); input()"
    process = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(process, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(InputError, match="another process writes it"):
            start(tmp_path)
        writer.kill()
    assert start(tmp_path) == tmp_path


def test_files_are_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    """A full disk leaves the old contents and no other file; threads may write one file."""
    path = tmp_path / "deep" / "file"
    with ThreadPoolExecutor(8) as pool:  # temporary names are unique
        list(pool.map(lambda _: write_text(path, "old\n"), range(100)))
    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda *given, **more: write(*given, **more) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(path, "new\n")
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("file", b"old\n")]


def test_folders_are_replaced_completely_or_not_at_all(tmp_path):
    """They keep nothing of their predecessors."""
    path = tmp_path / "best"

    def save(name, number=1):
        with atomic_path(path) as folder:
            folder.mkdir()
            (folder / name).touch()
            assert number / number

    save("one")
    with pytest.raises(ZeroDivisionError):
        save("two", 0)
    assert [file.name for file in path.iterdir()] == ["one"]
    save("three")
    assert [file.name for file in path.iterdir()] == ["three"]
    assert list(tmp_path.iterdir()) == [path]


class Malicious:
    """A pickle of this creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_broken_state_is_an_error_and_never_executed(tmp_path):
    files, executed = make_files(tmp_path), tmp_path / "executed"
    path = run(files, "sonnets-lora", tmp_path / "run") / "state.pt"
    torch.save({"epochs": Malicious(executed)}, tmp_path / "saved")
    pickled = pickle.dumps({"epochs": Malicious(executed)}, protocol=2)
    for content in (path.read_bytes()[:1000], b"", pickled, (tmp_path / "saved").read_bytes()):
        path.write_bytes(content)
        with pytest.raises((pickle.UnpicklingError, EOFError, RuntimeError)):
            run(files, "sonnets-lora", tmp_path / "run", "--resume")
    assert not executed.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_and_resumed_equals_uninterrupted():
    """At a few of the points that the script tests."""
    command = [sys.executable, "tests/kill_everywhere.py", "--every=43", "--first=19"]
    command += ["--only", "sonnets-full", "paraphrases-lora"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" 0 failures") == 2
