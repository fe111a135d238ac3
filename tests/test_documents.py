"""README.md and RESULTS.md agree with the committed results, and name files that exist."""

import re
import shutil
import tokenize
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmarks import documents
from benchmarks.documents import include_tables

ROOT = Path(__file__).resolve().parent.parent
CODE = ("modules", "models", "speed", "training", "evaluation")
DOCUMENTS = pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])


@DOCUMENTS
def test_tables_are_those_of_the_results(name, tmp_path):
    """A table that was typed or is out of date differs from the file that its marks name."""
    copy = Path(shutil.copy(ROOT / name, tmp_path / name))
    include_tables(copy)
    assert copy.read_text(encoding="utf-8") == (ROOT / name).read_text(encoding="utf-8")


def sentences(name):
    """A document without its code and copied tables, with single spaces."""
    text = (ROOT / name).read_text(encoding="utf-8")
    marked = r"```.*?```|<!-- \S+ \d+ -->.*?<!-- end -->|`[^`]*`"
    return " ".join(re.sub(marked, "", text, flags=re.DOTALL).split())


@DOCUMENTS
@pytest.mark.parametrize("pattern", [r"\d+\.\d\d+", r"[+-]\d\.\d+ to [+-]\d\.\d+"])
def test_numbers_in_sentences_are_in_the_results(name, pattern):
    """Numbers with two or more decimals, and signed intervals, were written by a command."""
    paths = [*ROOT.glob("results/*.md"), *ROOT.glob("benchmarks/results/*.md")]
    results = "".join(path.read_text(encoding="utf-8") for path in paths)
    stale = set(re.findall(pattern, sentences(name))) - set(re.findall(pattern, results))
    assert not stale, f"{name} says {stale}, which is in no table"


@DOCUMENTS
def test_links_and_plots_exist(name):
    """Paths of links and pictures inside the repository."""
    for path in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_the_overview_is_that_of_the_results(tmp_path, monkeypatch):
    """README.md's table is made from the committed runs, and its plot from chosen candidates."""
    monkeypatch.setattr(documents, "OVERVIEW", tmp_path / "overview")
    documents.write_overview()
    made, committed = tmp_path / "overview.md", ROOT / "results" / "overview.md"
    assert made.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")
    assert documents.chosen_runs("lora_best").groupby("row")["chosen"].nunique().eq(1).all()


def test_a_curve_joins_the_ranks_of_its_targets():
    """However the rows are ordered, and whatever their numbers of parameters."""
    sizes = {"q, rank 4": 4, "full": 9, "all, rank 1": 5, "q, rank 1": 1}
    runs = pd.DataFrame(sizes.items(), columns=["row", "trainable_parameters"])
    figure = Figure()
    documents.draw_parameters(figure.subfigures(), runs.assign(seed=1, dev_loss=0.5))
    curves = {curve.get_label(): curve.lines[0] for curve in figure.axes[0].containers}
    found = {name: line.get_xdata().tolist() for name, line in curves.items()}
    assert found == {"q": [1, 4], "full": [9], "all": [5]}


def test_outputs_are_of_the_commands():
    """README.md shows each command and, copied from its file, what it printed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, words in documents.COMMANDS.items():
        assert f"<!-- results/outputs/{name}.md -->\n```\npython {words[0]} {words[1]}" in text


def test_the_tree_of_files_is_complete():
    """README.md names every folder and every file of code at the top level, and only those."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## Files\n.*?```\n(.*?)```", text, flags=re.DOTALL)[1]
    named = set(re.findall(r"\w+\.(?:py|ipynb)|\w+/", tree))
    files = {path.name for path in ROOT.glob("*.py")} | {"walkthrough.ipynb"}
    folders = {f"{name}/" for name in (*CODE, "data", "results", "benchmarks", "tests")}
    assert named == files | folders


def lines_of_code(path):
    """The number of lines that are not blank and hold more than a comment or a docstring."""
    lines, previous = set(), tokenize.NEWLINE
    layout = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with open(path, encoding="utf-8") as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            is_docstring = token.type == tokenize.STRING and previous in layout
            if token.type not in layout and not is_docstring:
                lines |= set(range(token.start[0], token.end[0] + 1))
            previous = token.type
    return len(lines)


def test_the_size_is_counted():
    """The number in README.md's first sentence, rounded to hundreds."""
    paths = [*ROOT.glob("*.py"), *(path for name in CODE for path in ROOT.glob(f"{name}/*.py"))]
    lines = sum(map(lines_of_code, paths))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    claimed = int(re.search(r"([\d,]+) lines of Python", text)[1].replace(",", ""))
    assert claimed == round(lines, -2), lines


@DOCUMENTS
def test_scripts_of_commands_exist(name):
    """`python FILE` and `pytest FILES` in code."""
    text = (ROOT / name).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    scripts = re.findall(r"\b(?:python|--nproc_per_node=2) (\S+\.py)", code)
    scripts += re.findall(r"\btests/\w+\.py", code)
    assert scripts
    assert all((ROOT / script).is_file() for script in scripts), scripts
