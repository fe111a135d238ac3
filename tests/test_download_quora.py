"""data/download_quora.py: its files, its splits, and that a bad archive changes nothing."""

import importlib.util
import io
import re
import subprocess
import sys
import urllib.error
import zipfile
from http.client import IncompleteRead

import pytest

from config import ROOT, InputError
from datasets import read_pairs

SCRIPT = ROOT / "data" / "download_quora.py"
HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
NAMES = ("quora-train.csv", "quora-dev.csv", "quora-test-student.csv")
PLAIN = [
    f"{n}\t{2 * n}\t{2 * n + 1}\tWhat is {n}?\tWhy is {n} so?\t{n % 2}" for n in range(1000, 3000)
]
TRICKY = [
    '1\t1\t2\t"What does ""so"" mean?"\tWhat is "so"?\t1',
    '2\t3\t4\t"A\ttab?"\tÀ quoi ça sert, 你好?\t0\r',
    '3\t5\t6\t"Be" or not?\tAn open " quote?\t0',
    "8\t15\t16\tHow  are you?\tWho is it?\t1",
    '11\t19\t20\t"Never closed?\tBut whole?\t0',
]
LEFT_OUT = [
    "5\t9\t10\tNo label here?\tNone?",
    "6\t11\t12\t \tEmpty before?\t0",
    "7\t13\t14\tA third label?\tIs it?\t2",
    "9\t15\t16\twho is it?\tHow are you?\t1",  # the texts of 8
    "1\t15\t16\tAn id again?\tOnce more?\t1",
    '10\t17\t18\t"Never closed?\tIs it?',
    "",
]
EXPECTED = {
    "1": ('What does "so" mean?', 'What is "so"?', 1),
    "2": ("A tab?", "À quoi ça sert, 你好?", 0),
    "3": ('"Be" or not?', 'An open " quote?', 0),
    "8": ("How  are you?", "Who is it?", 1),
    "11": ('"Never closed?', "But whole?", 0),
    **{str(n): (f"What is {n}?", f"Why is {n} so?", n % 2) for n in range(1000, 3000)},
}


@pytest.fixture
def script():
    """The script as a new module, so that tests can change its constants."""
    spec = importlib.util.spec_from_file_location("download_quora", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pack(path, train, dev, header=HEADER, encoding="utf-8"):
    """Make an archive of the lines of both members."""
    with zipfile.ZipFile(path, "w") as file:
        for name, lines in (("train", train), ("dev", dev)):
            file.writestr(f"QQP/{name}.tsv", "\n".join([header, *lines, ""]).encode(encoding))
    return path


@pytest.fixture
def archive(tmp_path):
    return pack(tmp_path / "QQP.zip", TRICKY + LEFT_OUT + PLAIN[:1500], PLAIN[1500:])


def read(folder):
    """The pairs of each file, as the training script reads them."""
    return [read_pairs(folder / name) for name in NAMES]


def test_every_usable_line_is_written_once(script, archive, tmp_path, capsys):
    """Quotes, tabs and Unicode lose nothing, and the splits have the shares of the course."""
    script.main(["--source", str(archive), "--out", str(tmp_path / "out")])
    train, dev, test = read(tmp_path / "out")
    sizes = [len(train), len(dev), len(test)]
    assert sum(sizes) == len(EXPECTED)
    assert [size / sum(sizes) for size in sizes] == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    for pair in (pair for table in (train, dev, test) for pair in table.itertuples()):
        assert (pair.sentence1, pair.sentence2) == EXPECTED[pair.id][:2]
        assert pair.label == EXPECTED[pair.id][2] or pair.id in set(test["id"])
    assert test["label"].isna().all()
    assert f"left out: {len(LEFT_OUT)} lines" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(NAMES)
    header, first = (tmp_path / "out" / NAMES[0]).read_text(encoding="utf-8").split("\n")[:2]
    assert header == "\tid\tsentence1\tsentence2\tis_duplicate"  # as the course's files
    assert re.fullmatch(r"0\t.*\t[01]\.0", first)


def test_the_split_depends_on_the_texts_alone(script, archive, tmp_path):
    """Swapped texts, other ids and another order of the archive give the same files."""
    swapped = [f"9{n}\t1\t2\twhy is {n} so? \tWHAT is {n}?\t0" for n in reversed(range(1000, 3000))]
    other = pack(tmp_path / "other.zip", swapped[:7], swapped[7:])
    script.main(["--source", str(archive), "--out", str(tmp_path / "a")])
    script.main(["--source", str(other), "--out", str(tmp_path / "b")])
    for ours, theirs in zip(read(tmp_path / "a"), read(tmp_path / "b"), strict=True):
        assert {"9" + name for name in ours["id"] if int(name) >= 1000} == set(theirs["id"])


def test_small_files_have_labels_and_come_from_the_full_ones(
    script, archive, tmp_path, monkeypatch
):
    """The first of train, the first of dev, and the last of train, if there are enough."""
    with pytest.raises(InputError, match=r"too few for --small; .*--source"):
        script.main(["--source", str(archive), "--out", str(tmp_path), "--small"])
    script.main(["--source", str(archive), "--out", str(tmp_path / "full")])
    for name, size in (("SMALL_TRAIN", 700), ("SMALL_DEV", 100), ("SMALL_TEST", 200)):
        monkeypatch.setattr(script, name, size)
    script.main(["--source", str(archive), "--out", str(tmp_path), "--small"])
    full_train, full_dev, _ = read(tmp_path / "full")
    train, dev, test = read(tmp_path)
    assert train["id"].tolist() == full_train["id"][:700].tolist()
    assert dev["id"].tolist() == full_dev["id"][:100].tolist()
    assert test["id"].tolist() == full_train["id"][-200:].tolist()
    assert not any(table["label"].isna().any() for table in (train, dev, test))


def test_the_archive_is_downloaded_once(script, archive, tmp_path, monkeypatch):
    """An interrupted download is an error and leaves nothing."""
    answers = [IncompleteRead(b"PK", 5000), urllib.error.URLError("no route"), archive.read_bytes()]

    class Response(io.BytesIO):
        def read(self):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(script, "ARCHIVE", tmp_path / "cache" / "QQP.zip")
    monkeypatch.setattr(script.urllib.request, "urlopen", lambda *_, **__: Response())
    for cause in ("5000 more", "no route"):
        with pytest.raises(InputError, match=f"{cause}.*try again, or .*--source"):
            script.main(["--out", str(tmp_path / "out")])
        assert list(tmp_path.iterdir()) == [archive]
    for _ in range(2):
        script.main(["--out", str(tmp_path / "out")])
    assert sum(map(len, read(tmp_path / "out"))) == len(EXPECTED)


def damaged(path, archive):
    path.write_bytes(archive.read_bytes().replace(b"What is 2999?", b"What is 2998?"))


def without_dev(path, archive):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("QQP/train.tsv", HEADER)


BAD = {
    "no zip archive": (lambda path, _: path.write_text("<html>"), "zip"),
    "damaged": (damaged, "CRC"),
    "without dev": (without_dev, "QQP/dev.tsv"),
    "absent": (lambda *_: None, "No such file"),
    "other columns": (lambda path, _: pack(path, [], [], "index\tquestion"), "index"),
    "no pairs": (lambda path, _: pack(path, [], []), "no question pair"),
    "UTF-16": (lambda path, _: pack(path, PLAIN, PLAIN, encoding="utf-16"), "utf-8"),
}


@pytest.mark.parametrize(("make", "cause"), BAD.values(), ids=BAD)
def test_bad_archives_change_nothing(make, cause, script, archive, tmp_path):
    """The error names the cause and the way out."""
    make(tmp_path / "source.zip", archive)
    with pytest.raises(InputError, match=f"{cause}.*--source"):
        script.main(["--source", str(tmp_path / "source.zip"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, SCRIPT, "--source", tmp_path / "none.zip", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
