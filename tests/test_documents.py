"""README.md and RESULTS.md say what results/ and benchmarks/results/ say."""

import re
import shutil
from pathlib import Path

import pytest

from runs import include_tables

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])


@DOCUMENTS
def test_tables_are_those_of_the_results(name, tmp_path):
    """A table that was typed, or left behind by a newer run, differs from the file that its marks name."""
    copy = shutil.copy(ROOT / name, tmp_path / name)
    include_tables(copy)
    assert copy.read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


@DOCUMENTS
def test_figures_in_sentences_stand_in_the_results(name):
    """Every number with two decimals or more that stands outside code and tables is one that a command wrote."""
    text = (ROOT / name).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|<!-- \S+ \d+ -->.*?<!-- end -->|`[^`]*`", "", text, flags=re.DOTALL)
    results = [path.read_text(encoding="utf-8") for folder in ("results", "benchmarks/results")
               for path in (ROOT / folder).glob("*.md")]  # fmt: skip
    known = {number for result in results for number in re.findall(r"\d+\.\d\d+", result)}
    stale = sorted(set(re.findall(r"\d+\.\d\d+", prose)) - known)
    assert not stale, f"{name} says {stale}, which no table does: after new runs, revise the sentences"


@DOCUMENTS
def test_files_that_are_named_are_there(name):
    """Paths in links and pictures."""
    for path in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_only_the_named_paragraph_changes(tmp_path, monkeypatch):
    """Marks of a file that is not there, or that has no such paragraph, keep what stands between them."""
    monkeypatch.setattr("runs.ROOT", tmp_path)
    (tmp_path / "table.md").write_text("| a |\n|---|\n\n| b |\n|---|\n| 2 |\n")
    document = tmp_path / "text.md"
    document.write_text("<!-- table.md 2 -->\nold\n<!-- end -->\nx\n<!-- no.md 1 -->\nkept\n<!-- end -->\n"
                        "<!-- table.md 3 -->\nkept too\n<!-- end -->\n")  # fmt: skip
    for _ in range(2):
        include_tables(document)
        assert document.read_text() == (
            "<!-- table.md 2 -->\n| b |\n|---|\n| 2 |\n<!-- end -->\nx\n<!-- no.md 1 -->\nkept\n<!-- end -->\n"
            "<!-- table.md 3 -->\nkept too\n<!-- end -->\n")  # fmt: skip
