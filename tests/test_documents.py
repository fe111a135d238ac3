"""README.md and RESULTS.md agree with the committed results, and name files that exist."""

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.documents import include_tables

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])


@DOCUMENTS
def test_tables_are_those_of_the_results(name, tmp_path):
    """A table that was typed or is out of date differs from the file that its marks name."""
    copy = Path(shutil.copy(ROOT / name, tmp_path / name))
    include_tables(copy)
    assert copy.read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


@DOCUMENTS
def test_numbers_in_sentences_are_in_the_results(name):
    """Numbers with two or more decimals outside of code and tables were written by a command."""
    text = (ROOT / name).read_text(encoding="utf-8")
    marked = r"```.*?```|<!-- \S+ \d+ -->.*?<!-- end -->|`[^`]*`"
    prose = re.sub(marked, "", text, flags=re.DOTALL)
    paths = [*ROOT.glob("results/*.md"), *ROOT.glob("benchmarks/results/*.md")]
    results = "".join(path.read_text(encoding="utf-8") for path in paths)
    stale = set(re.findall(r"\d+\.\d\d+", prose)) - set(re.findall(r"\d+\.\d\d+", results))
    assert not stale, f"{name} says {stale}, which is in no table"


@DOCUMENTS
def test_links_and_plots_exist(name):
    """Paths of links and pictures inside the repository."""
    for path in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_table_of_files_is_complete():
    """README.md names every folder and every file of code at the top level, and only those."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|", text, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert all((ROOT / name).exists() for name in named), named
    code = [
        path for pattern in ("*.py", "models/*.py", "modules/*.py") for path in ROOT.glob(pattern)
    ]
    for path in code:
        relative = path.relative_to(ROOT)
        folder = f"{relative.parent.as_posix()}/"
        assert {relative.as_posix(), folder} & named or path.name == "__init__.py", relative


@DOCUMENTS
def test_scripts_of_commands_exist(name):
    """`python FILE` and `pytest FILES` in code."""
    text = (ROOT / name).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    scripts = re.findall(r"\b(?:python|--nproc_per_node=2) (\S+\.py)", code)
    scripts += re.findall(r"\btests/\w+\.py", code)
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts), scripts
