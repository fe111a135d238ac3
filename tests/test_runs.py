"""Files on disk are complete or absent, run folders are never reused, and no pickle is executed."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import runs
from config import InputError
from files import atomic_folder, write_csv, write_text
from runs import Run, new_folder

SHA256 = {"model_sha256": "abc", "processes": 1, "data_sha256": {"a.csv": "def"}}


def options(out_dir=None, resume=False, **others):
    return {"out_dir": out_dir and str(out_dir), "resume": resume, "lr": 0.1, **others}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return tmp_path


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    """A full disk or a kill before the last instant leaves the old content."""
    path = tmp_path / "deep" / "file"
    write_text(path, "old")

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            write_text(path, "new")
    assert path.read_bytes() == b"old"
    write_text(path, "new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path):
    """best/ survives an error while its successor is written, and keeps nothing old afterwards."""
    best = tmp_path / "best"

    def replace(name, error=None):
        with atomic_folder(best) as folder:
            assert not list(folder.iterdir())
            (folder / name).write_text(name)
            if error:
                raise error

    def contents():
        return {path.name: path.read_text() for path in best.iterdir()}

    replace("one")
    with pytest.raises(OSError, match="no space"):
        replace("two", OSError("no space"))
    assert contents() == {"one": "one"}
    replace("two")
    assert contents() == {"two": "two"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_table_has_the_columns_of_all_records(tmp_path):
    """A metric that only later epochs have does not shift the columns; unknown values are empty."""
    write_csv(tmp_path / "metrics.csv", [{"epoch": 1, "peak": None}, {"epoch": 2, "peak": 0.5}])
    assert (tmp_path / "metrics.csv").read_bytes() == b"epoch,peak\n1,\n2,0.5\n"


def test_a_name_that_is_taken_gets_a_number(root):
    """Running again never asks and never overwrites."""
    folders = [Run("sonnets", "tiny-1", options(), {"commit": "abc"}).folder for _ in range(3)]
    names = ("tiny-1", "tiny-1-2", "tiny-1-3")
    assert folders == [root / "runs" / "sonnets" / name for name in names]
    config = json.loads((folders[2] / "config.json").read_text(encoding="utf-8"))
    assert config == {"options": options(), "commit": "abc"}


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path):
    """Also if none of their folders was there a moment ago."""
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder(tmp_path / "runs", "a"), range(64)))
    assert sorted(folders) == sorted((tmp_path / "runs").iterdir())


def test_a_named_folder_is_never_used_twice(tmp_path):
    """--out_dir names the folder itself, so another run in it is an error."""
    assert Run("sonnets", "a", options(tmp_path / "mine"), {}).folder == tmp_path / "mine"
    for again in (options(tmp_path / "mine"), options(tmp_path / "mine", resume=True, lr=0.2)):
        with pytest.raises(InputError, match="mine already holds a run"):
            Run("sonnets", "a", again, {})
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="is a file"):
            Run("sonnets", "a", options(path), {})


def test_resume_takes_the_newest_unfinished_run_with_the_same_options(root):
    """Not a finished one and not one with other options; if none is left, a new run starts."""
    rates = (0.1, 0.1, 0.1, 0.2)
    older, newer, finished, other = (Run("s", "a", options(lr=lr), {}).folder for lr in rates)
    (finished / "summary.json").write_text("{}")
    for age, folder in enumerate((other, finished, newer, older)):
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert Run("s", "a", options(resume=True), {}).folder == newer
    (newer / "summary.json").write_text("{}")
    assert Run("s", "a", options(resume=True), {}).folder == older
    (older / "summary.json").write_text("{}")
    assert Run("s", "a", options(resume=True), {}).folder.name == "a-5"


@pytest.mark.parametrize(
    "change",
    [{"model_sha256": "xyz"}, {"processes": 2}, {"data_sha256": {"a.csv": "xyz"}}],
    ids=lambda change: next(iter(change)),
)
def test_resume_compares_data_base_model_and_number_of_processes(root, change):
    """A continued run would mix two models, two data sets or two orders of random numbers."""
    first = Run("s", "a", options(), SHA256).folder
    assert Run("s", "a", options(resume=True), SHA256 | {"commit": "other"}).folder == first
    assert Run("s", "a", options(resume=True), SHA256 | change).folder != first
    with pytest.raises(InputError, match="already holds a run"):
        Run("s", "a", options(first, resume=True), SHA256 | change)


def test_a_run_is_locked_until_its_process_ends(tmp_path):
    """Another process that resumes the run gets an error; once the writer was killed, the run."""
    folder = tmp_path / "run"
    code = (
        "import sys, time\nfrom runs import Run\n"
        "options = {'out_dir': sys.argv[1], 'resume': False, 'lr': 0.1}\n"
        "Run('s', 'a', options, {})\nprint('open', flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    writer = subprocess.Popen(command, cwd=runs.ROOT, stdout=subprocess.PIPE)
    try:
        assert writer.stdout.readline() == b"open\n"
        before = (folder / "config.json").read_bytes()
        with pytest.raises(InputError, match="being written by another process"):
            Run("s", "a", options(folder, resume=True), {})
        assert (folder / "config.json").read_bytes() == before
    finally:
        writer.kill()
        writer.communicate()
    assert Run("s", "a", options(folder, resume=True), {}).folder == folder


def test_a_state_is_read_as_it_was_written(tmp_path):
    """Before the first state is saved there is none."""
    run = Run("s", "a", options(tmp_path / "run"), {})
    assert run.load_state() is None
    run.save_state({"parameters": [torch.arange(3.0)], "epochs": [{"epoch": 1, "peak": None}]})
    state = run.load_state()
    assert state["epochs"] == [{"epoch": 1, "peak": None}]
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
def test_a_malicious_state_is_rejected_and_not_executed(tmp_path, dump):
    """The report's checkpoints were pickled Namespaces, loaded without restriction."""
    run = Run("s", "a", options(tmp_path / "run"), {})
    run.state_path.parent.mkdir()
    dump({"progress": Malicious(tmp_path / "executed")}, run.state_path)
    with pytest.raises(InputError, match=r"state\.pt cannot be read"):
        run.load_state()
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious(tmp_path / "executed")))  # what an unrestricted load does
    assert (tmp_path / "executed").exists()


def test_a_truncated_state_is_rejected(tmp_path):
    """Half a file, from a disk that failed, does not end in a traceback."""
    run = Run("s", "a", options(tmp_path / "run"), {})
    run.save_state({"parameters": [torch.zeros(1000)]})
    run.state_path.write_bytes(run.state_path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"state\.pt cannot be read"):
        run.load_state()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_commit_is_marked_if_tracked_code_was_edited(root):
    """A run of edited code is not a run of the commit; results do not count."""
    assert runs.commit() is None
    (root / "code.py").write_text("1")
    (root / "table.md").write_text("1")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one"):
        subprocess.run(["git", *words.split()], cwd=root, check=True)
    clean = runs.commit()
    assert len(clean) == 40
    (root / "table.md").write_text("2")
    assert runs.commit() == clean
    (root / "code.py").write_text("2")
    assert runs.commit() == clean + "+"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the code."""
    path = tmp_path_factory.mktemp("tree")
    for pattern in (
        "*.py",
        "models/*.py",
        "modules/*.py",
        "tests/test_runs.py",
        "data/pretrain.py",
    ):
        for source in runs.ROOT.glob(pattern):
            copy = path / source.relative_to(runs.ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(source, copy)
    return path


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("training.py", "config.lr * (step + 1)", "config.lr * (step + 2)", True),
        ("modules/attention.py", "import torch\n", "import torch\n\nUNUSED = 1\n", True),
        ("models/paraphrase_gpt.py", "std=0.02", "std=0.03", True),
        ("evaluation.py", "1.96", "1.97", True),
        ("paraphrase_detection.py", '"warmup": 0.06', '"warmup": 0.07', True),
        ("config.py", "4 * self.n_embd", "3 * self.n_embd", True),
        ("training.py", "import torch\n", "# a comment\nimport torch  # and another\n\n\n", False),
        ("pooling.py", '"""', '"""Other words. ', False),
        ("plots.py", "import warnings", "import warnings\n\nCOLOR = 1", False),
        ("experiments.py", "FIRST_SEED = 11711", "FIRST_SEED = 11712", False),
        ("tests/test_runs.py", "import json", "import json, math", False),
    ],
)
def test_the_hash_of_the_code_is_of_what_computes(tree, monkeypatch, name, old, new, changes):
    """Comments, docstrings, layout, plots and tests do not change a result; anything else may."""
    monkeypatch.setattr(runs, "ROOT", tree)
    before = runs.code_sha256()
    path = tree / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    try:
        assert (runs.code_sha256() != before) == changes
    finally:
        path.write_text(text, encoding="utf-8")
    assert runs.code_sha256() == before


def test_a_new_file_of_code_changes_the_hash(tree, monkeypatch):
    """A pooling in a file of its own computes, too."""
    monkeypatch.setattr(runs, "ROOT", tree)
    before = runs.code_sha256()
    (tree / "models" / "new.py").write_text("x = 1\n")
    try:
        assert runs.code_sha256() != before
    finally:
        (tree / "models" / "new.py").unlink()


def test_the_environment_names_what_a_result_depends_on(tmp_path):
    """Versions, code, device, precision, and the data by content."""
    (tmp_path / "a.csv").write_bytes(b"abc")
    found = runs.environment(torch.device("cpu"), torch.bfloat16, [str(tmp_path / "a.csv")])
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert found["data_sha256"] == {str(tmp_path / "a.csv"): sha256}
    assert torch.__version__.startswith(found["packages"]["torch"].partition("+")[0])
    assert (found["dtype"], found["device_type"], found["processes"]) == ("bfloat16", "cpu", 1)
    assert found["code_sha256"] == runs.code_sha256()
