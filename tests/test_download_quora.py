"""data/download_quora.py as a process: its files, its splits, and that errors change nothing."""

import contextlib
import csv
import os
import random
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from config import ROOT
from datasets import read_pairs

HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
NAMES = ("quora-train.csv", "quora-dev.csv", "quora-test-student.csv")
PLAIN = [
    f"{n}\t{2 * n}\t{2 * n + 1}\tWhat is {n}?\tWhy is {n} so?\t{n % 2}" for n in range(1000, 1600)
]
TRICKY = [  # from line 2
    '1\t1\t2\t"What does ""so"" mean?"\tWhat is "so"?\t1',
    '2\t3\t4\t"A\ttab?"\tÀ quoi ça sert, 你好?\t0\r',
    '3\t5\t6\t"Be" or not?\tAn open " quote?\t0',
    '4\t7\t8\t"Two\nlines?"\tOne line?\t1',
    "5\t9\t10\tNo label here?\tNone?",  # line 7: the record before has two lines
    "6\t11\t12\t \tEmpty before?\t0",
    "7\t13\t14\tA third label?\tIs it?\t2",
    "8\t15\t16\tHow  are you?\tWho is it?\t1",
    "9\t15\t16\twho is it?\tHow are you?\t1",
    "9\t15\t16\tAn id again?\tOnce more?\t1",
    '10\t17\t18\t"Never closed?\tIs it?',
    "",
    '11\t19\t20\t"Never closed?\tBut whole?\t0',
    '12\t21\t22\tNo end?\t"Or is it in',
    '13\t23\t24\tthe record below?\tIs it 5"\t0',
]
EXPECTED = {
    "1": ('What does "so" mean?', 'What is "so"?', "1.0"),
    "2": ("A tab?", "À quoi ça sert, 你好?", "0.0"),
    "3": ('"Be" or not?', 'An open " quote?', "0.0"),
    "4": ("Two lines?", "One line?", "1.0"),
    "8": ("How  are you?", "Who is it?", "1.0"),
    "9": ("who is it?", "How are you?", "1.0"),
    "11": ('"Never closed?', "But whole?", "0.0"),
    "13": ("the record below?", 'Is it 5"', "0.0"),
    **{str(n): (f"What is {n}?", f"Why is {n} so?", f"{n % 2}.0") for n in range(1000, 1600)},
}


def pack(path, train, dev, header=HEADER, encoding="utf-8"):
    """Make an archive of the lines of both members."""
    with zipfile.ZipFile(path, "w") as file:
        for name, lines in (("train", train), ("dev", dev)):
            file.writestr(f"QQP/{name}.tsv", "\n".join([header, *lines, ""]).encode(encoding))
    return path


def run(source, out, *python):
    """Run the script, in which warnings are errors; returns exit code, output and errors."""
    command = [sys.executable, "-W", "error", *(python or ["data/download_quora.py"])]
    done = subprocess.run(
        [*command, "--source", str(source), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "no_proxy": "127.0.0.1", "PYTHONUTF8": "1"},
        capture_output=True,
        timeout=60,
        encoding="utf-8",
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def read(out):
    """The records of each file."""
    records = {}
    for name in NAMES:
        with open(out / name, encoding="utf-8", newline="") as file:
            header, *records[name] = csv.reader(file, delimiter="\t", strict=True)
        labels = [] if name == NAMES[2] else ["is_duplicate"]
        assert header == ["", "id", "sentence1", "sentence2", *labels]
        assert all(len(record) == len(header) for record in records[name])
        indices = [str(index) for index in range(len(records[name]))]
        assert [record[0] for record in records[name]] == indices
    return records


def file_of_each_id(out):
    """The name of the file that each id was written to."""
    return {record[1]: name for name, records in read(out).items() for record in records}


def contents(folder):
    """The bytes of all files, by relative path."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "QQP.zip"
    return pack(path, TRICKY + PLAIN[:400], PLAIN[400:])


@pytest.fixture(scope="module")
def written(archive, tmp_path_factory):
    """The folder with the three files, and what the script printed."""
    out = tmp_path_factory.mktemp("written") / "data"
    code, printed, err = run(archive, out)
    assert (code, err) == (0, "")
    return out, printed


@contextlib.contextmanager
def serving(*answers):
    """Yield an address that answers (status, Content-Length, bytes) in turn, then 404."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, length, body = left.pop(0) if left else (404, 0, b"")
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/QQP.zip"
        finally:
            server.shutdown()
            thread.join()


def test_every_usable_record_is_written_once(written):
    """Quotes, tabs, line breaks and Unicode lose nothing; the test file has no labels."""
    out, _ = written
    assert sorted(contents(out)) == sorted(NAMES)
    assert not any(b"\r" in content for content in contents(out).values())
    records = [record[1:] for records in read(out).values() for record in records]
    assert sorted(record[0] for record in records) == sorted(EXPECTED)
    for identity, *fields in records:
        assert tuple(fields) == EXPECTED[identity][: len(fields)]


@pytest.mark.parametrize("name", NAMES)
def test_read_pairs_reads_the_same(written, name):
    """The training script reads what csv reads."""
    records = read(written[0])[name]
    pairs = read_pairs(written[0] / name)
    columns = [pairs[column] for column in ("id", "sentence1", "sentence2")]
    assert list(zip(*columns, strict=True)) == [tuple(record[1:4]) for record in records]
    assert pairs["label"].dropna().tolist() == [
        float(record[4]) for record in records if record[4:]
    ]


def test_dropped_records_are_counted_and_named(written):
    """Each reason has the lines of its records."""
    out, printed = written
    for line in (
        "dropped: 7 ",
        "4 without six fields: QQP/train.tsv:7, QQP/train.tsv:13, QQP/train.tsv:14, ",
        "1 with an empty question: QQP/train.tsv:8",
        "1 with a label other than 0 and 1: QQP/train.tsv:9",
        "1 with the id of a ",
        "Quora's terms",
    ):
        assert line in printed
    assert re.search(r"with the id of .*: QQP/train.tsv:12\n", printed)
    sizes = [int(size) for size in re.findall(r"(\d+) pairs", printed)]
    assert sizes == [len(records) for records in read(out).values()]


def test_the_split_depends_on_the_texts_alone(written, tmp_path):
    """Repeated and swapped pairs are in the same file, whatever the order of the archive."""
    numbers = range(1000, 1600)
    swapped = [f"9{n}\t1\t2\twhy is {n} so? \tWHAT is {n}?\t{n % 2}" for n in numbers]
    lines = PLAIN + TRICKY[7:9] + swapped
    random.Random(0).shuffle(lines)
    assert run(pack(tmp_path / "shuffled.zip", lines[:100], lines[100:]), tmp_path)[0] == 0
    before, after = file_of_each_id(written[0]), file_of_each_id(tmp_path)
    assert len(after) == 1202
    assert after["8"] == after["9"] == before["8"]
    assert all(after[f"9{n}"] == after[str(n)] == before[str(n)] for n in numbers)


def test_the_splits_have_the_shares_of_the_course(tmp_path):
    """70, 10 and 20 %."""
    lines = [f"{n}\t1\t2\tq {n}\tr {n}\t0" for n in range(10_000)]
    assert run(pack(tmp_path / "many.zip", lines, []), tmp_path)[0] == 0
    shares = [len(records) / 10_000 for records in read(tmp_path).values()]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.015)


def test_an_address_is_downloaded_once(archive, written, tmp_path):
    """The second run uses the cache; both write the same files as with a local archive."""
    body = archive.read_bytes()
    with serving((200, len(body), body)) as address:
        for attempt in range(2):
            code, printed, errors = run(address, tmp_path)
            assert (code, errors) == (0, "")
            assert ("downloaded before" in printed) == (attempt == 1)
            for name in NAMES:
                assert (tmp_path / name).read_bytes() == (written[0] / name).read_bytes()


def test_an_interrupted_download_leaves_nothing(archive, tmp_path):
    """Fewer bytes than announced, then an error status, then the complete archive."""
    body = archive.read_bytes()
    answers = (200, len(body), body[:5000]), (503, 0, b""), (200, len(body), body)
    with serving(*answers) as address:
        for expected in ("5,000 of", "503"):
            code, _, errors = run(address, tmp_path)
            assert code == 2
            assert re.fullmatch(rf"error: http:.*{expected}.*--source\n", errors)
            assert contents(tmp_path) == {}
        assert run(address, tmp_path)[0] == 0


def truncated(path, archive):
    path.write_bytes(archive.read_bytes()[:-3000])


def damaged(path, archive):
    path.write_bytes(archive.read_bytes().replace(b"What is 1599?", b"What is 1598?"))


def without_dev(path, archive):
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        new.writestr("QQP/train.tsv", old.read("QQP/train.tsv"))


BAD = {
    "no zip archive": (lambda path, _: path.write_text("<html>", encoding="utf-8"), "zip"),
    "truncated": (truncated, "zip"),
    "damaged at its end": (damaged, "CRC"),
    "without dev": (without_dev, "QQP/dev.tsv"),
    "absent": (lambda *_: None, "No such file"),
    "a folder": (lambda path, _: path.mkdir(), "source.zip"),
    "other columns": (lambda path, _: pack(path, [], [], "index\tquestion"), "index"),
    "no pairs": (lambda path, _: pack(path, [], []), "no question pair"),
    "UTF-16": (lambda path, _: pack(path, PLAIN, PLAIN, encoding="utf-16"), "UTF-8"),
}


@pytest.mark.parametrize(("make", "cause"), BAD.values(), ids=BAD)
def test_bad_archives_change_nothing(make, cause, archive, tmp_path):
    """The error is one line and exit code 2; files of an earlier run stay, and no others appear."""
    source, out = tmp_path / "source.zip", tmp_path / "out"
    make(source, archive)
    out.mkdir()
    for name in NAMES:
        (out / name).write_text("earlier", encoding="utf-8")
    code, printed, errors = run(source, out)
    assert (code, printed) == (2, "")
    assert re.fullmatch(r"error: .*--source.*\n", errors)
    assert cause in errors
    assert contents(out) == dict.fromkeys(NAMES, b"earlier")


def test_a_downloaded_page_that_is_no_archive_is_named(tmp_path):
    """The cache would be used again, so the message says to delete it."""
    with serving((200, 6, b"<html>")) as address:
        code, _, errors = run(address, tmp_path)
    (page,) = contents(tmp_path)
    assert code == 2
    assert str(tmp_path / page) in errors
    assert "delete it" in errors


def test_an_address_without_a_server(tmp_path):
    """The message names the address and the way out."""
    with serving() as address:
        pass
    code, _, errors = run(address, tmp_path)
    assert code == 2
    assert re.fullmatch(rf"error: {address}.*--source\n", errors)
    assert contents(tmp_path) == {}


def test_neither_torch_nor_pandas_is_needed(archive, tmp_path):
    """The script uses the standard library and tqdm."""
    probe = (
        "import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'pandas', 'numpy']); "
        "runpy.run_path('data/download_quora.py', run_name='__main__')"
    )
    code, _, errors = run(archive, tmp_path, "-c", probe)
    assert (code, errors) == (0, "")
