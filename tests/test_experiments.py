"""A question to a table: what is run and what is not, what a table shows, and intervals worked out by hand."""

import csv
import json
import sys

import pytest

import experiments
import figures
from config import InputError
from experiments import EXPERIMENTS, Experiment, differences, folder_of, gather, shown

SCRIPT = """
import argparse, json, pathlib, sys
def parse_options(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=DEFAULT)
    parser.add_argument("--seed", type=int)
    for name in ("model_size", "data", "out_dir"):
        parser.add_argument("--" + name, default="tiny" if name == "model_size" else None)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args(arguments)
if __name__ == "__main__":
    options = parse_options()
    with open(pathlib.Path(__file__).with_name("log"), "a") as log:
        log.write(f"{options.lr:g} {options.seed}\\n")
    if options.lr > 2:
        sys.exit("error: the loss is nan")
    folder, loss = pathlib.Path(options.out_dir), options.lr + options.seed % 10
    (folder / "config.json").write_text(json.dumps({"commit": "c0ffee", "dtype": "float32"}))
    (folder / "metrics.csv").write_text(f"epoch,train_loss,dev_loss\\n1,{loss},{loss}\\n2,{loss},{loss}\\n")
    (folder / "summary.json").write_text(json.dumps({
        "seed": options.seed, "dev_loss": loss, "best_epoch": 1, "trainable_parameters": 10, "gold_dev_rhymes": 1.0,
        "dev_rhymes": 0.5, "shuffled_dev_rhymes": 0.0}))
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A script that takes no time, in a repository of its own; returns a function that says what was run since."""
    (tmp_path / "fake_task.py").write_text(SCRIPT.replace("DEFAULT", "1.0"))
    for module in (experiments, figures):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_task", raising=False)
    panels = ("curves", "parameters", ("dev_loss", "seconds_per_epoch"))
    monkeypatch.setitem(
        EXPERIMENTS, "fake", Experiment("fake_task", {"one": "", "two": "--lr 2"}, {"dev_loss": 1.5}, panels)
    )

    def ran():
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return ran


def test_a_run_is_made_once_and_anew_when_an_option_changes(task):
    """More seeds add their runs only; an option given, also in other words, decides what is the same."""
    found = gather(EXPERIMENTS["fake"], 2, 1, [])
    assert task() == ["1 11711", "2 11711", "1 11712", "2 11712"]
    assert [run["dev_loss"] for run in found["two"]] == [3, 4]
    assert gather(EXPERIMENTS["fake"], 2, 1, []) == found
    assert task() == []
    gather(EXPERIMENTS["fake"], 3, 2, [])
    assert sorted(task()) == ["1 11713", "2 11713"]
    gather(EXPERIMENTS["fake"], 1, 1, ["--lr", "1.0"])  # both rows are the same run then, which is there
    assert task() == []
    gather(EXPERIMENTS["fake"], 1, 1, ["--lr", "0.5"])
    assert task() == ["0.5 11711"]


def test_a_changed_default_or_file_runs_anew(task, tmp_path, monkeypatch):
    """What is hashed are values, not what was typed; a file counts by what is in it, wherever it lies."""
    before = folder_of("fake_task", ["--seed", "1"])
    assert folder_of("fake_task", ["--seed", "1", "--out_dir", "x", "--resume"]) == before
    (tmp_path / "a.csv").write_text("a")
    (tmp_path / "b.csv").write_text("a")
    first, second = (folder_of("fake_task", ["--data", str(tmp_path / name)]) for name in ("a.csv", "b.csv"))
    assert first == second
    (tmp_path / "b.csv").write_text("b")
    assert folder_of("fake_task", ["--data", str(tmp_path / "b.csv")]) != first
    (tmp_path / "fake_task.py").write_text(SCRIPT.replace("DEFAULT", "1.25"))
    monkeypatch.delitem(sys.modules, "fake_task")
    assert folder_of("fake_task", ["--seed", "1"]) != before


def test_changed_weights_of_the_base_run_anew(task, tmp_path):
    """A folder of weights that is trained further keeps its name."""
    folders = []
    for weights in (b"1", b"2"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        folders.append(folder_of("fake_task", ["--model_size", str(tmp_path)]))
    assert folders[0] != folders[1]


def test_a_failed_run_is_shown_and_tried_again(task, tmp_path, monkeypatch, capsys):
    """The table has the row and the reason, the other runs stand, and the exit code is 1."""
    rows = {"one": "", "three": "--lr 3"}
    monkeypatch.setitem(EXPERIMENTS, "fake", Experiment("fake_task", rows, {"dev_loss": 1}, (("dev_loss",),)))
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", "--seeds", "2"])
    for expected in (4, 2):
        with pytest.raises(SystemExit) as end:
            experiments.main()
        assert end.value.code == 1
        assert len(task()) == expected
    table = (tmp_path / "results" / "fake.md").read_text(encoding="utf-8")
    assert "Failed: three, seed 11711, 11712: error: the loss is nan" in table
    assert "| three |  |" in table
    assert "| one | 2.500 ± 0.707 |" in table
    assert table in capsys.readouterr().out
    with open(tmp_path / "results" / "fake.csv", newline="", encoding="utf-8") as file:
        assert [row["failed"] for row in csv.DictReader(file)] == ["", "", *["error: the loss is nan"] * 2]


def test_a_table_and_its_figure(task, tmp_path, monkeypatch):
    """Every panel is drawn; given options are in the name; a table names its commits, ceiling and floor."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", "--seeds", "2", "--data", "a/b"])
    with pytest.raises(SystemExit) as end:
        experiments.main()
    assert not end.value.code
    assert (tmp_path / "results" / "fake-data-a-b.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "results" / "fake-data-a-b.md").read_text(encoding="utf-8")
    assert "| two | dev loss | one | +1.000 | +1.000 to +1.000 |  | 1.5 | equivalent |" in table
    assert "| Shakespeare's own | 1.000 |" in table
    assert "| his lines, shuffled | 0.000 |" in table
    assert "4 of c0ffee" in table


def test_chosen_rows_alone_are_run_and_have_files_of_their_own(task, tmp_path, monkeypatch):
    """A part of a table must not take the whole one's place; words that find nothing are an error."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", "--rows", "tw", "x", "--seeds", "1", "--lr", "2"])
    with pytest.raises(SystemExit) as end:
        experiments.main()
    assert not end.value.code
    assert task() == ["2 11711"]
    assert [path.name for path in sorted((tmp_path / "results").glob("*.md"))] == ["fake-tw-x-lr-2.md"]
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", "--rows", "three"])
    with pytest.raises(InputError, match="three finds none of the rows one; two"):
        experiments.main()


@pytest.mark.parametrize(("gains", "verdict"), [
    ((0.1, 0.2, 0.3), "undecided"),  # 0.2, and 4.303 standard errors of 0.1 / sqrt 3: -0.048 to 0.448
    ((0.1, 0.2, 0.1), "undecided"), ((0.18, 0.2, 0.22), "higher"), ((-0.18, -0.2, -0.22), "lower"),
    ((0.01, 0.02, 0.03), "equivalent"), ((0.01,), "undecided"),
])  # fmt: skip
def test_verdicts_by_hand(gains, verdict):
    """With a margin of 0.1: the whole interval decides, one seed nothing, and a row is paired with its own baseline."""
    experiment = Experiment("fake", {"a: x": "", "b: x": "", "b: y": ""}, {"dev_loss": 0.1}, ())
    base = [{"dev_loss": 4.0 + seed} for seed in range(len(gains))]
    tuned = [{"dev_loss": 4.0 + seed + gain} for seed, gain in enumerate(gains)]
    lines = differences(experiment, {"a: x": base, "b: x": base, "b: y": tuned})
    assert [(line[0], line[2], line[-1]) for line in lines] == [("b: y", "b: x", verdict)]
    if gains == (0.1, 0.2, 0.3):
        assert lines[0][3:5] == ["+0.200", "-0.048 to +0.448"]


def test_a_failed_seed_leaves_its_pair_out():
    """Pairs are of the same seed; that of a failed run is dropped from both sides."""
    experiment = Experiment("fake", {"a": "", "b": ""}, {"dev_loss": 0.1}, ())
    found = {"a": [{"dev_loss": 1.0}, {}, {"dev_loss": 3.0}], "b": [{"dev_loss": 2.0}, {"dev_loss": 9.0}, {}]}
    assert differences(experiment, found)[0][3:5] == ["+1.000", ""]


def test_the_interval_over_items(tmp_path, monkeypatch):
    """Of 100 pairs, 50 more are judged right than by the baseline: 0.5, and 1.96 standard errors of 0.05 around it."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    labels = [row % 2 for row in range(100)]
    pairs = "".join(f"{row}\t{row}\tx\ty\t{label}\n" for row, label in enumerate(labels))
    (tmp_path / "dev.csv").write_text("\tid\tsentence1\tsentence2\tis_duplicate\n" + pairs)
    for name, predicted in (("a", [0] * 100), ("b", labels)):
        (tmp_path / name / "predictions").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"options": {"para_dev": str(tmp_path / "dev.csv")}}))
        lines = "".join(f"{row}, {label} \n" for row, label in enumerate(predicted))
        (tmp_path / name / "predictions" / "para-dev-output.csv").write_text("id \t Predicted_Is_Paraphrase \n" + lines)
    experiment = Experiment("fake", {"a": "", "b": ""}, {"dev_accuracy": 0.01}, ())
    found = {name: [{"folder": name, "dev_accuracy": share}] for name, share in (("a", 0.5), ("b", 1.0))}
    (line,) = differences(experiment, found)
    low, high = map(float, line[5].split(" to "))
    assert (line[3], line[4], line[7]) == ("+0.500", "", "higher")
    assert (0.5 - low, high - 0.5) == pytest.approx((0.098, 0.098), abs=0.02)


@pytest.mark.parametrize(("values", "expected"), [
    ([4.2361, 4.2379], "4.237 ± 0.001"), ([36864, 36864], "36,864"), ([None, 24.75], "24.75"), ([None], ""),
])  # fmt: skip
def test_how_figures_are_shown(values, expected):
    """Three decimals or about four digits, and a deviation only where there is one."""
    assert shown(values) == expected


def test_every_entry_can_be_run():
    """Its options are the script's, each row has a baseline, and what it compares the script measures."""
    for name, experiment in EXPERIMENTS.items():
        assert len({folder_of(experiment.script, options.split()) for options in experiment.rows.values()}) == len(
            experiment.rows
        ), name
        assert all(experiment.baseline(row) in experiment.rows for row in experiment.rows)
        assert any(experiment.baseline(row) != row for row in experiment.rows)
