"""What is on disk is whole or not there: atomic files, folders by name and counter, no unrestricted pickle."""

import json
import os
import pickle
import shutil
import subprocess

import pytest
import torch

import runs
from config import InputError
from runs import Run, replacing_folder, write_bytes


def options(out_dir=None, resume=False, **others):
    return {"out_dir": out_dir and str(out_dir), "resume": resume, "lr": 0.1, **others}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return tmp_path


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk or a kill before the last instant must leave the old content."""
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"old")

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    """best/ must survive an error while its successor is written, and hold nothing old afterwards."""
    best = tmp_path / "best"
    with replacing_folder(best) as fresh:
        (fresh / "one").write_text("1")

    def fail():
        with replacing_folder(best) as fresh:
            (fresh / "two").write_text("2")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert {path.name: path.read_text() for path in best.iterdir()} == {"one": "1"}
    with replacing_folder(best) as fresh:
        assert not list(fresh.iterdir())
        (fresh / "two").write_text("2")
    assert {path.name: path.read_text() for path in best.iterdir()} == {"two": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_name_that_is_taken_gets_a_counter(root):
    """Running again never asks and never overwrites."""
    folders = [Run("sonnets", "tiny-full-1", options(), {"commit": "abc"}).folder for _ in range(3)]
    assert folders == [root / "runs" / "sonnets" / name for name in ("tiny-full-1", "tiny-full-1-2", "tiny-full-1-3")]
    written = json.loads((folders[2] / "config.json").read_text(encoding="utf-8"))
    assert written == {"options": options(), "commit": "abc"}


def test_a_named_folder_is_never_taken_twice(tmp_path):
    """--out_dir names the folder itself: no counter there, so another run in it is an error."""
    assert Run("sonnets", "a", options(tmp_path / "mine"), {}).folder == tmp_path / "mine"
    for again in (options(tmp_path / "mine"), options(tmp_path / "mine", resume=True, lr=0.2)):
        with pytest.raises(InputError, match="mine already holds a run"):
            Run("sonnets", "a", again, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        Run("sonnets", "a", options(tmp_path / "file"), {})


def test_resume_takes_the_newest_unfinished_run_of_equal_options(root):
    """Not a finished one, not one of other options, and the newest of several; with none left, a new one."""
    older, newer, finished, other = (Run("s", "a", options(lr=lr), {}).folder for lr in (0.1, 0.1, 0.1, 0.2))
    (finished / "summary.json").write_text("{}")
    for age, folder in enumerate((other, finished, newer, older)):
        os.utime(folder, (1e9 - age, 1e9 - age))
    run = Run("s", "a", options(resume=True), {})
    assert (run.folder, run.resumed) == (newer, True)
    (newer / "summary.json").write_text("{}")
    assert Run("s", "a", options(resume=True), {}).folder == older
    (older / "summary.json").write_text("{}")
    run = Run("s", "a", options(resume=True), {})
    assert (run.folder.name, run.resumed) == ("a-5", False)


def test_state_comes_back_as_it_was(tmp_path):
    """And with nothing saved yet there is none."""
    run = Run("s", "a", options(tmp_path / "run"), {})
    assert run.load_state() is None
    run.save_state({"parameters": [torch.arange(3.0)], "rows": [{"epoch": 1, "peak": None}]})
    state = run.load_state()
    assert state["rows"] == [{"epoch": 1, "peak": None}]
    assert torch.equal(state["parameters"][0], torch.arange(3.0))


class Malicious:
    """A pickle of this creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def save_raw(thing, path):
    path.write_bytes(pickle.dumps(thing))


@pytest.mark.parametrize("dump", [torch.save, save_raw])
def test_a_malicious_state_is_refused_and_not_executed(tmp_path, dump):
    """The report's checkpoints were pickled Namespaces, loaded without restriction."""
    run = Run("s", "a", options(tmp_path / "run"), {})
    run.state_path.parent.mkdir()
    dump({"progress": Malicious(tmp_path / "executed")}, run.state_path)
    with pytest.raises(InputError, match=r"state\.pt can't be read"):
        run.load_state()
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "executed")))  # what an unrestricted load does
    assert (tmp_path / "executed").exists()


def test_a_state_cut_short_is_refused(tmp_path):
    """Half a file, from a disk that failed, must not end in a traceback."""
    run = Run("s", "a", options(tmp_path / "run"), {})
    run.save_state({"parameters": [torch.zeros(1000)]})
    run.state_path.write_bytes(run.state_path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"state\.pt can't be read"):
        run.load_state()


def test_metrics_are_a_row_an_epoch(tmp_path):
    """A figure that only later epochs have must not shift the columns, and what is unknown is empty."""
    run = Run("s", "a", options(tmp_path / "run"), {})
    run.write_metrics([{"epoch": 1, "peak": None}, {"epoch": 2, "peak": 0.5}])
    assert (run.folder / "metrics.csv").read_bytes() == b"epoch,peak\n1,\n2,0.5\n"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_edited_code_is_told_from_its_commit(root):
    """A run of edited Python files is no run of the commit; tables that a run rewrites don't count as edits."""
    for name in ("code.py", "table.md"):
        (root / name).write_text("1")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one"):
        subprocess.run(["git", *words.split()], cwd=root, check=True)
    clean = runs.commit()
    assert len(clean) == 40
    (root / "table.md").write_text("2")
    assert runs.commit() == clean
    (root / "code.py").write_text("2")
    assert runs.commit() == clean + "+"
