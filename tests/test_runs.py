"""The folder of a run: its name, what may be resumed, locks, and files that are whole or absent."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest
import torch
from small_runs import make_files, run

from config import InputError
from training import runs
from training.runs import Run, write_csv, write_text


def options(out_dir=None, resume=False, **others):
    return {"out_dir": out_dir and str(out_dir), "resume": resume, "lr": 0.1, **others}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return tmp_path / "runs" / "task"


def test_a_name_that_is_taken_gets_a_number(root):
    """Nothing is overwritten; --resume continues the last run, or starts the first."""
    assert Run("task", "a", options(resume=True), {}).folder == root / "a"
    folders = [Run("task", "a", options(), {}).folder.name for _ in range(2)]
    assert folders == ["a-2", "a-3"]
    assert Run("task", "a", options(resume=True), {}).folder.name == "a-3"
    assert Run("task", "b", options(), {}).folder.name == "b"


def test_a_named_folder_is_used_once(tmp_path):
    folder = Run("task", "a", options(tmp_path / "mine"), {}).folder
    assert folder == tmp_path / "mine"
    before = (folder / "config.json").read_bytes()
    with pytest.raises(InputError, match="mine holds a run: --resume it, or name another"):
        Run("task", "a", options(folder), {})
    assert (folder / "config.json").read_bytes() == before
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is a file, or inside of one"):
            Run("task", "a", options(path), {})


@pytest.mark.parametrize(
    ("given", "inputs", "named"),
    [
        ({"lr": 0.2}, {}, "has --lr 0.1, not 0.2"),
        ({"use_lora": True}, {}, "--use_lora None, not True"),
        ({}, {"data_sha256": {"sonnet_path": "other"}}, "another data_sha256"),
        ({}, {"model_sha256": "other"}, "another model_sha256"),
        ({}, {"processes": 2}, "another processes"),
        ({}, {"dtype": "bfloat16"}, "another dtype"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, given, inputs, named):
    """The message names what differs."""
    first = {
        "data_sha256": {"sonnet_path": "a"},
        "model_sha256": "b",
        "processes": 1,
        "dtype": "float32",
    }
    Run("task", "a", options(tmp_path), first)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=named):
        Run("task", "a", options(tmp_path, resume=True, **given), first | inputs)
    assert (tmp_path / "config.json").read_bytes() == before


def test_other_code_and_packages_are_noted(tmp_path, monkeypatch, capsys):
    """Such a run continues, and config.json says since when."""
    Run("task", "a", options(tmp_path), {})
    now = runs.environment()
    changes = [{"commit": "abc+"}, {"packages": now["packages"] | {"torch": "9"}, "host": "far"}]
    for change in changes:
        monkeypatch.setattr(runs, "environment", lambda change=change: now | change)
        Run("task", "a", options(tmp_path, resume=True), {})
        assert f"note: resumed with another {', '.join(change)}" in capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"options": options(tmp_path), **now, "resumed": changes}


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_commit_is_marked_if_tracked_code_was_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.environment()["commit"] is None
    for name in ("code.py", "table.md"):
        (tmp_path / name).write_text("1")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    commits = []
    for name in ("table.md", "new.py", "code.py"):
        (tmp_path / name).write_text("2")
        commits.append(runs.environment()["commit"])
    assert commits == [commits[0], commits[0], commits[0] + "+"]


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
    with open("sonnets.txt", "a") as file:
        file.write("\n6\n\na\nb\nc\nd\n")
    with pytest.raises(InputError, match="two has another data_sha256"):
        run(files, "sonnets-full", Path("two"), "--epochs=0", *given)


def test_a_run_that_another_process_writes_is_refused(tmp_path):
    """Until that process ends, also by a kill; the message names lock file and host."""
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]).acquire(); print(); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as writer:
        writer.stdout.readline()
        with pytest.raises(InputError, match=r"\.lock is locked by .* host unknown"):
            Run("task", "a", options(tmp_path), {})
        (tmp_path / "config.json").write_text('{"host": "far"}')
        with pytest.raises(InputError, match=r"\.lock is locked by a process on the host far"):
            Run("task", "a", options(tmp_path, resume=True), {})
        writer.kill()
    (tmp_path / "config.json").unlink()
    assert Run("task", "a", options(tmp_path), {}).folder == tmp_path


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError()])
def test_a_disk_without_locks_is_noted(tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    assert Run("task", "a", options(tmp_path), {}).folder == tmp_path
    assert "note: this disk has no locks; do not start two runs" in capsys.readouterr().out


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    """A full disk leaves the old contents and no other file."""
    path = tmp_path / "deep" / "file"
    write_text(path, "old\n")
    monkeypatch.setattr(
        Path, "write_text", lambda path, *_, **__: path.write_bytes(b"ne") and 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        write_text(path, "new\n")
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("file", b"old\n")]


def test_threads_may_write_one_file(tmp_path):
    """Temporary names are unique, so that none is renamed by another writer."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_text(tmp_path / "file", str(n) * 1000), [1, 2] * 100))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len(set((tmp_path / "file").read_text())) == 1


def test_a_table_has_the_columns_of_all_records(tmp_path):
    write_csv(tmp_path / "a.csv", [{"epoch": 1, "peak": None}, {"epoch": 2, "peak": 0.5}])
    assert (tmp_path / "a.csv").read_bytes() == b"epoch,peak\n1,\n2,0.5\n"


def test_best_is_replaced_completely_or_not_at_all(tmp_path):
    """It keeps nothing of its predecessor; leftovers of a killed process are removed."""
    result = Run("task", "a", options(tmp_path), {})

    def save(name, error=False):
        def write(folder):
            folder.mkdir()
            (folder / name).write_text(name)
            if error:
                raise OSError("no space")

        result.save_best(write)

    save("one")
    with pytest.raises(OSError, match="no space"):
        save("two", error=True)
    assert [path.name for path in result.best.iterdir()] == ["one"]
    save("three")
    assert [path.name for path in result.best.iterdir()] == ["three"]
    (result.folder / "predictions").mkdir()
    for folder in (result.folder, result.best, result.folder / "predictions"):
        runs.temporary(folder / "file").touch()
    Run("task", "a", options(tmp_path, resume=True), {})
    assert not [path for path in tmp_path.rglob("*.tmp")]


@pytest.mark.skipif(os.name != "posix", reason="needs modes")
@pytest.mark.parametrize("kind", ["sonnets-lora", "paraphrases-full"])
def test_all_files_have_the_mode_of_the_umask(tmp_path, kind):
    """safetensors makes files for their owner alone."""
    files = make_files(tmp_path)
    before = os.umask(0o027)
    try:
        folder = run(files, kind, tmp_path / "run", "--epochs=1")
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}
    modes.pop(".lock")
    assert set(modes.values()) == {0o640}, modes
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_dir()} == {0o750}


class Malicious:
    """A pickle of this creates a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_broken_state_is_an_error_and_never_executed(tmp_path):
    result = Run("task", "a", options(tmp_path / "run"), {})
    assert result.load_state() is None
    result.save_state({"parameters": [torch.arange(1000.0)]})
    assert torch.equal(result.load_state()["parameters"][0], torch.arange(1000.0))
    path, bad = result.folder / "state.pt", Malicious(tmp_path / "executed")
    half = path.read_bytes()[:1000]
    for content in (half, b"", pickle.dumps({"progress": bad})):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"state\.pt cannot be read .*; delete it"):
            result.load_state()
    torch.save({"progress": bad}, path)
    with pytest.raises(InputError, match=r"(?s)state\.pt cannot be read .*; delete it"):
        result.load_state()
    assert not (tmp_path / "executed").exists()


def test_the_configuration_names_what_a_result_depends_on(tmp_path):
    folder = run(make_files(tmp_path), "sonnets-full", tmp_path / "run", "--epochs=0")
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() >= {"options", "commit", "packages", "python", "device_type", "dtype"}
    assert config["packages"]["torch"] == torch.__version__
    assert (config["processes"], len(config["data_sha256"]), len(config["model_sha256"])) == (
        1,
        3,
        64,
    )
    (tmp_path / "abc").write_bytes(b"abc")
    assert runs.file_sha256(tmp_path / "abc").startswith(
        "ba7816bf8f01cfea414140de5dae"
    )  # FIPS 180-2
