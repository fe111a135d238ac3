"""data/download_quora.py as a process: what it writes, how it splits, and that a failure changes nothing."""

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
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
NAMES = ("quora-train.csv", "quora-dev.csv", "quora-test-student.csv")
PLAIN = [f"{n}\t{2 * n}\t{2 * n + 1}\tWhat is {n}?\tWhy is {n} so?\t{n % 2}" for n in range(1000, 1600)]
TRICKY = [  # line 2 on
    '1\t1\t2\t"What does ""so"" mean?"\tWhat is "so"?\t1',
    '2\t3\t4\t"A\ttab?"\tÀ quoi ça sert, 你好?\t0\r',
    '3\t5\t6\t"Be" or not?\tAn open " quote?\t0',
    '4\t7\t8\t"Two\nlines?"\tOne line?\t1',
    "5\t9\t10\tNo label here?\tNone?",  # line 7: the row before takes two
    "6\t11\t12\t \tEmpty before?\t0",
    "7\t13\t14\tA third label?\tIs it?\t2",
    "8\t15\t16\tHow  are you?\tWho is it?\t1",
    "9\t15\t16\twho is it?\tHow are you?\t1",
    "9\t15\t16\tAn id again?\tOnce more?\t1",
    '10\t17\t18\t"Never closed?\tIs it?',
    "",
    '11\t19\t20\t"Never closed?\tBut whole?\t0',
    '12\t21\t22\tNo end?\t"Or is it in',
    '13\t23\t24\tthe row below?\tIs it 5"\t0',
]
EXPECTED = {
    "1": ('What does "so" mean?', 'What is "so"?', "1.0"), "2": ("A tab?", "À quoi ça sert, 你好?", "0.0"),
    "3": ('"Be" or not?', 'An open " quote?', "0.0"), "4": ("Two lines?", "One line?", "1.0"),
    "8": ("How  are you?", "Who is it?", "1.0"), "9": ("who is it?", "How are you?", "1.0"),
    "11": ('"Never closed?', "But whole?", "0.0"), "13": ("the row below?", 'Is it 5"', "0.0"),
}  # fmt: skip


def pack(path, train, dev, header=HEADER, encoding="utf-8"):
    with zipfile.ZipFile(path, "w") as file:
        for name, rows in (("train", train), ("dev", dev)):
            file.writestr(f"QQP/{name}.tsv", "\n".join([header, *rows, ""]).encode(encoding))
    return path


def run(source, out, *python):
    command = [sys.executable, "-W", "error", *(python or ["data/download_quora.py"]), "--source", str(source)]
    environment = {**os.environ, "no_proxy": "127.0.0.1", "PYTHONUTF8": "1"}
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, timeout=60,
                          encoding="utf-8", check=False)  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def read(out):
    """Each file's rows below the header."""
    found = {}
    for name in NAMES:
        with open(out / name, encoding="utf-8", newline="") as file:
            header, *found[name] = csv.reader(file, delimiter="\t", strict=True)
        labels = [] if name == NAMES[2] else ["is_duplicate"]
        assert header == ["", "id", "sentence1", "sentence2", *labels]
        assert all(len(row) == len(header) for row in found[name])
        assert [row[0] for row in found[name]] == [str(index) for index in range(len(found[name]))]
    return found


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("archive") / "QQP.zip", TRICKY + PLAIN[:400], PLAIN[400:])


@pytest.fixture(scope="module")
def written(archive, tmp_path_factory):
    """The folder that a run wrote to, and what it printed."""
    out = tmp_path_factory.mktemp("written") / "data"
    code, printed, err = run(archive, out)
    assert (code, err) == (0, "")
    return out, printed


@contextlib.contextmanager
def serving(*answers):
    """Yield an address that gives these (status, announced length, bytes) in turn, then 404."""
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


def test_every_good_row_is_written_once_as_it_was(written):
    """Ids, texts and labels survive quotes, tabs, line breaks and unicode; the test file has no labels."""
    out, _ = written
    assert sorted(contents(out)) == sorted(map(Path, NAMES))
    assert not any(b"\r" in content for content in contents(out).values())
    found = {row[1]: tuple(row[2:]) for rows in read(out).values() for row in rows}
    expected = EXPECTED | {str(n): (f"What is {n}?", f"Why is {n} so?", f"{n % 2}.0") for n in range(1000, 1600)}
    assert found.keys() == expected.keys()
    assert all(row == expected[id][: len(row)] for id, row in found.items())
    assert sum(map(len, read(out).values())) == len(expected)


def test_what_is_dropped_is_counted_with_its_lines(written):
    """No row goes missing in silence."""
    _, printed = written
    for line in ("dropped: 7 rows", "4 without six fields: QQP/train.tsv:7, QQP/train.tsv:13, QQP/train.tsv:14, ",
                 "1 with an empty question: QQP/train.tsv:8", "1 with a label other than 0 and 1: QQP/train.tsv:9",
                 "1 with the id of a row above: QQP/train.tsv:12"):  # fmt: skip
        assert line in printed
    sizes = [int(size) for size in re.findall(r"(\d+) pairs", printed)]
    assert sizes == [len(rows) for rows in read(written[0]).values()]
    assert "Quora's terms" in printed


def test_a_pair_of_texts_has_one_split_whatever_the_order(written, tmp_path):
    """Swapped and repeated pairs stay together, and shuffled rows go where they went before."""
    swapped = [f"9{n}\t1\t2\twhy is {n} so? \tWHAT is {n}?\t{n % 2}" for n in range(1000, 1600)]
    rows = PLAIN + TRICKY[7:9] + swapped
    random.Random(0).shuffle(rows)
    assert run(pack(tmp_path / "shuffled.zip", rows[:100], rows[100:]), tmp_path)[0] == 0
    before = {row[1]: name for name, rows in read(written[0]).items() for row in rows}
    after = {row[1]: name for name, rows in read(tmp_path).items() for row in rows}
    assert len(after) == 1202
    assert after["8"] == after["9"] == before["8"]
    assert all(after[f"9{n}"] == after[str(n)] == before[str(n)] for n in range(1000, 1600))


def test_the_splits_have_the_courses_shares(tmp_path):
    """70, 10 and 20 %."""
    rows = [f"{n}\t1\t2\tq {n}\tr {n}\t0" for n in range(10_000)]
    assert run(pack(tmp_path / "many.zip", rows, []), tmp_path)[0] == 0
    assert [len(rows) / 10_000 for rows in read(tmp_path).values()] == pytest.approx([0.7, 0.1, 0.2], abs=0.015)


def test_an_address_is_downloaded_once(archive, written, tmp_path):
    """The second run takes the archive from the cache; both write what a local archive gives."""
    body = archive.read_bytes()
    with serving((200, len(body), body)) as address:
        for printed in ("", "downloaded before"):
            code, out, err = run(address, tmp_path)
            assert (code, err) == (0, "")
            assert printed in out
            assert [(tmp_path / name).read_bytes() for name in NAMES] == [
                (written[0] / name).read_bytes() for name in NAMES
            ]


def test_a_download_that_breaks_off_leaves_nothing(archive, tmp_path):
    """Fewer bytes than announced, then an error status, then the whole archive."""
    body = archive.read_bytes()
    with serving((200, len(body), body[:5000]), (503, 0, b""), (200, len(body), body)) as address:
        for expected in ("5,000 of", "503"):
            code, _, err = run(address, tmp_path)
            assert code == 2
            assert re.fullmatch(rf"error: http:.*{expected}.*--source\n", err)
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
    "no rows": (lambda path, _: pack(path, [], []), "no question pair"),
    "UTF-16": (lambda path, _: pack(path, PLAIN, PLAIN, encoding="utf-16"), "UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_ends_with_a_line_and_2_and_changes_nothing(case, archive, tmp_path):
    """Files of an earlier run stay as they were, and nothing half-written is beside them."""
    make, named = BAD[case]
    source, out = tmp_path / "source.zip", tmp_path / "out"
    make(source, archive)
    out.mkdir()
    for name in NAMES:
        (out / name).write_text("earlier", encoding="utf-8")
    code, printed, err = run(source, out)
    assert (code, printed) == (2, "")
    assert re.fullmatch(r"error: .*--source.*\n", err)
    assert named in err
    assert set(contents(out).values()) == {b"earlier"}
    assert sorted(contents(out)) == sorted(map(Path, NAMES))


def test_a_downloaded_page_that_is_no_archive_is_named(tmp_path):
    """It would be taken from the cache again, so the message says to delete it."""
    with serving((200, 6, b"<html>")) as address:
        code, _, err = run(address, tmp_path)
    (page,) = contents(tmp_path)
    assert code == 2
    assert str(page) in err
    assert "delete it" in err


def test_an_address_that_refuses_ends_with_a_line_and_2(tmp_path):
    """No server there; the message names the address and the way out."""
    with serving() as address:
        pass
    code, _, err = run(address, tmp_path)
    assert code == 2
    assert re.fullmatch(rf"error: {address}.*--source\n", err)
    assert contents(tmp_path) == {}


def test_neither_torch_nor_pandas_is_needed(archive, tmp_path):
    """The script takes what Python has, and tqdm."""
    probe = ("import runpy, sys; sys.modules |= dict.fromkeys(['torch', 'pandas', 'numpy']); "
             "runpy.run_path('data/download_quora.py', run_name='__main__')")  # fmt: skip
    code, _, err = run(archive, tmp_path, "-c", probe)
    assert (code, err) == (0, "")
