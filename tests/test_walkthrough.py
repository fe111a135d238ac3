"""walkthrough.ipynb: its outputs are committed, and it runs.

python tests/test_walkthrough.py  # execute the notebook and write its outputs
"""

import json
import os
import shutil
from pathlib import Path

import nbformat
import pytest
from matplotlib import font_manager  # noqa: F401 (finds the fonts, which prints a warning if slow)
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "walkthrough.ipynb"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(folder):
    """The notebook with the outputs of an execution in `folder`; raises if a cell fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": folder}}
    client = NotebookClient(notebook, timeout=900, resources=resources, record_timing=False)
    threads = {"OMP_NUM_THREADS": "2"}  # the tiny model is not faster with more
    client.execute(env=threads | os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    notebook.metadata = METADATA
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook):
    """The names of the streams that cells printed to."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return {output["name"] for output in outputs if output["output_type"] == "stream"}


@pytest.fixture(scope="module")
def notebook():
    """The committed notebook."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_outputs_are_of_one_execution(notebook):
    """All cells were executed in order, without errors and warnings, and nothing else is kept."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert printed(notebook) == {"stdout"}
    assert notebook["metadata"] == METADATA
    assert not any(cell["metadata"] for cell in notebook["cells"])


@pytest.mark.skipif("RUN_NOTEBOOK" not in os.environ, reason="takes minutes; set RUN_NOTEBOOK=1")
def test_runs_and_changes_no_file(tmp_path):
    """In a copy of code and data, so that new files in ignored folders are seen as well."""
    for name in ("data", "models", "modules", "speed", "training", "evaluation"):
        ignored = shutil.ignore_patterns("cache", "quora-*.csv", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert printed(execute(tmp_path)) == {"stdout"}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


if __name__ == "__main__":
    nbformat.write(execute(ROOT), NOTEBOOK)
