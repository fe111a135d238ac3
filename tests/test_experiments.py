"""A question becomes a table: what is run, what a table shows, and intervals worked out by hand."""

import argparse
import json
import sys

import pandas as pd
import pytest

import experiments
import plots  # noqa: F401 (not the plots.py of the `task` fixture)
import runs
from config import InputError
from experiments import EXPERIMENTS, Experiment, compare, decide, format_values, gather, run_folder

SCRIPT = '''
"""A task that takes no time."""
import argparse, json, pathlib, sys
def parse_options(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1.0)
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
    code = "edited" if options.lr == 0.125 else folder.name.rpartition("-")[2]
    config = {"commit": "c0ffee", "dtype": "float32", "code_sha256": code}
    (folder / "config.json").write_text(json.dumps(config))
    summary = {"seed": options.seed, "dev_loss": loss, "best_epoch": 1}
    summary |= {"trainable_parameters": 10, "seconds_per_epoch": 1.0}
    summary |= {"dev_rhymes": 0.5, "gold_dev_rhymes": 1.0, "random_dev_rhymes": 0.0}
    (folder / "summary.json").write_text(json.dumps(summary))
'''
PANELS = ("parameters", ("dev_loss", "seconds_per_epoch"))


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task script in a repository of its own; returns a function: what was run since."""
    (tmp_path / "fake_task.py").write_text(SCRIPT)
    (tmp_path / "plots.py").write_text("COLOR = 1\n")
    for module in (experiments, runs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs" / "experiments")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_task", raising=False)
    rows = {"one": "", "two": "--lr 2"}
    monkeypatch.setitem(
        EXPERIMENTS, "fake", Experiment("fake_task", rows, {"dev_loss": 1.5}, PANELS)
    )

    def ran():
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return ran


def collect(seeds=1, jobs=1, given=(), accept_other_code=False):
    options = argparse.Namespace(seeds=seeds, jobs=jobs, accept_other_code=accept_other_code)
    return gather(EXPERIMENTS["fake"], options, list(given))


def call_main(monkeypatch, *arguments):
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", *arguments])
    with pytest.raises(SystemExit) as end:
        experiments.main()
    return end.value.code or 0


def edit(path, old, new, monkeypatch):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    monkeypatch.delitem(sys.modules, "fake_task", raising=False)


def test_a_run_is_made_once_and_again_if_an_option_changes(task):
    """More seeds add their runs only; an option counts by its value, not by how it is given."""
    found = collect(seeds=2)
    assert task() == ["1 11711", "2 11711", "1 11712", "2 11712"]
    assert found[found["row"] == "two"]["dev_loss"].tolist() == [3, 4]
    pd.testing.assert_frame_equal(collect(seeds=2), found)
    assert task() == []
    collect(seeds=3, jobs=2)
    assert sorted(task()) == ["1 11713", "2 11713"]
    collect(given=["--lr", "1.0"])  # both rows are the same run then, which exists
    assert task() == []
    collect(given=["--lr", "0.5"])
    assert task() == ["0.5 11711"]


def test_runs_of_other_code_are_repeated(task, tmp_path, monkeypatch, capsys):
    """An edit of a file that computes is counted; --accept_other_code uses the runs."""
    before = collect()
    assert task() == ["1 11711", "2 11711"]
    assert "other code" not in capsys.readouterr().out
    edit(tmp_path / "fake_task.py", "options.seed % 10", "options.seed % 10 + 1", monkeypatch)
    accepted = collect(accept_other_code=True)
    assert task() == []
    assert "2 runs were made with other code; they are used" in capsys.readouterr().out
    assert accepted["dev_loss"].tolist() == before["dev_loss"].tolist()
    after = collect()
    out = capsys.readouterr().out
    assert "2 runs were made with other code; they are repeated" in out
    assert "--accept_other_code" in out
    assert task() == ["1 11711", "2 11711"]
    assert after["dev_loss"].tolist() == [loss + 1 for loss in before["dev_loss"]]
    collect()
    assert (task(), capsys.readouterr().out) == ([], "")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("fake_task.py", "import argparse", "# a comment\nimport argparse"),
        ("fake_task.py", "takes no time", "takes a moment"),
        ("plots.py", "1", "2"),
    ],
    ids=["comment", "docstring", "plots.py"],
)
def test_an_edit_that_changes_no_result_repeats_nothing(
    task, tmp_path, monkeypatch, capsys, name, old, new
):
    """Runs take hours: a better comment or plot must not cost them."""
    before = collect()
    task()
    edit(tmp_path / name, old, new, monkeypatch)
    pd.testing.assert_frame_equal(collect(), before)
    assert task() == []
    assert "other code" not in capsys.readouterr().out


def test_a_run_whose_code_was_edited_meanwhile_is_not_used(task, monkeypatch):
    """The folder's name would be that of code that did not compute it."""
    rows = {"edited": "--lr 0.125"}
    monkeypatch.setitem(EXPERIMENTS, "fake", Experiment("fake_task", rows, {"dev_loss": 1}, ()))
    for _ in range(2):
        [reason] = collect()["failed"]
        assert "the code was edited" in reason
        assert task() == ["0.125 11711"]


def test_a_changed_default_or_file_is_run_again(task, tmp_path, monkeypatch):
    """The hash is of values, not of what was typed; a file counts with its contents."""

    def folder(*arguments):
        return run_folder("fake_task", list(arguments), "code")

    before = folder("--seed", "1")
    assert folder("--seed", "1", "--out_dir", "x", "--resume") == before
    paths = [tmp_path / name for name in ("a.csv", "b.csv")]
    for path in paths:
        path.write_text("a")
    first, second = (folder("--data", str(path)) for path in paths)
    assert first == second
    paths[1].write_text("b")
    assert folder("--data", str(paths[1])) != first
    edit(tmp_path / "fake_task.py", "default=1.0", "default=1.25", monkeypatch)
    assert folder("--seed", "1") != before


def test_changed_weights_of_the_base_are_run_again(task, tmp_path):
    """A folder whose weights are trained further keeps its name."""
    folders = []
    for weights in (b"1", b"2"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        folders.append(run_folder("fake_task", ["--model_size", str(tmp_path)], "code"))
    assert folders[0] != folders[1]


def test_a_failed_run_is_shown_and_repeated(task, tmp_path, monkeypatch, capsys):
    """The table has the row and the reason, the other runs stay, and the exit code is 1."""
    rows = {"one": "", "three": "--lr 3"}
    experiment = Experiment("fake_task", rows, {"dev_loss": 1}, (("dev_loss",),))
    monkeypatch.setitem(EXPERIMENTS, "fake", experiment)
    for expected in (4, 2):
        assert call_main(monkeypatch, "--seeds", "2") == 1
        assert len(task()) == expected
    table = (tmp_path / "results" / "fake.md").read_text(encoding="utf-8")
    assert "Failed: three, seeds 11711, 11712: error: the loss is nan" in table
    assert cells(table, "three")[1] == ""
    assert cells(table, "one")[1] == "2.500 ± 0.707"
    assert table in capsys.readouterr().out
    records = pd.read_csv(tmp_path / "results" / "fake.csv").sort_values(["row", "seed"])
    failed = records["failed"].fillna("").tolist()
    assert failed == ["", "", *["error: the loss is nan"] * 2]


def test_a_table_of_failed_runs_only(task, tmp_path, monkeypatch):
    """The reasons, not a traceback."""
    experiment = Experiment("fake_task", {"one": ""}, {"dev_loss": 1}, (("dev_loss",),))
    monkeypatch.setitem(EXPERIMENTS, "fake", experiment)
    assert call_main(monkeypatch, "--lr", "3") == 1
    [path] = (tmp_path / "results").glob("*.md")
    assert "error: the loss is nan" in path.read_text(encoding="utf-8")


def cells(table, row):
    """The first line of a markdown table that begins with a cell."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return next([cell.strip() for cell in line] for line in lines if line[0].strip() == row)


def test_a_table_and_its_plot(task, tmp_path, monkeypatch):
    """Given options are in the name; the table has commits and both baselines of form."""
    assert call_main(monkeypatch, "--seeds", "2", "--data", "a/b") == 0
    [plot] = (tmp_path / "results").glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stem.endswith("data-a-b")
    table = plot.with_suffix(".md").read_text(encoding="utf-8")
    difference = next(block for block in table.split("\n\n") if "verdict" in block)
    expected = ["two", "dev_loss", "one", "+1.000", "+1.000 to +1.000", "", "1.5", "equivalent"]
    assert cells(difference, "two") == expected
    assert cells(table, "Shakespeare")[1] == "1.000"
    assert cells(table, "random lines")[1] == "0.000"
    assert "4 of c0ffee" in table


def test_chosen_rows_have_files_of_their_own(task, tmp_path, monkeypatch):
    """Part of a table does not replace the whole one; words that match nothing are an error."""
    assert call_main(monkeypatch, "--rows", "tw", "x", "--seeds", "1", "--lr", "2") == 0
    assert task() == ["2 11711"]
    [path] = (tmp_path / "results").glob("*.md")
    assert path.name == "fake-tw-x-lr-2.md"
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", "--rows", "three"])
    with pytest.raises(InputError, match="three matches none of one; two"):
        experiments.main()


@pytest.mark.parametrize("option", ["--seed=3", "--out_dir=x", "--resume"])
def test_options_that_are_set_for_each_run_are_rejected(task, monkeypatch, option):
    """They would be ignored, or mix all runs in one folder."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", option])
    with pytest.raises(InputError, match=option.split("=")[0]):
        experiments.main()
    assert task() == []


@pytest.mark.parametrize(
    ("over_seeds", "over_pairs", "margin", "verdict"),
    [
        ((), (), 0.1, "undecided"),
        ((), (0.2, 0.4), 0.1, "undecided"),  # one seed, however many pairs
        ((), (-0.01, 0.01), 0.1, "undecided"),
        ((0.2, 0.4), (), 0.1, "higher"),
        ((0.2, 0.4), (0.1, 0.5), 0.1, "higher"),
        ((0.2, 0.4), (-0.1, 0.5), 0.1, "undecided"),
        ((-0.4, -0.2), (-0.5, -0.1), 0.1, "lower"),
        ((-0.05, 0.09), (), 0.1, "equivalent"),
        ((0.01, 0.09), (), 0.1, "equivalent"),
        ((-0.05, 0.09), (-0.2, 0.05), 0.1, "undecided"),
        ((-0.05, 0.09), (), 0.0, "undecided"),
    ],
)
def test_verdicts_by_hand(over_seeds, over_pairs, margin, verdict):
    """All intervals have to agree, and one seed decides nothing."""
    assert decide(over_seeds, over_pairs, margin) == verdict


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.1, 0.2, 0.3), "undecided"),
        ((0.18, 0.2, 0.22), "higher"),
        ((-0.18, -0.2, -0.22), "lower"),
        ((0.01, 0.02, 0.03), "equivalent"),
        ((0.2,), "undecided"),
    ],
)
def test_differences_by_hand(gains, verdict):
    """A row is compared with its own baseline, over the same seeds, with a margin of 0.1.

    The first is 0.2 with 4.303 standard errors of 0.1 / sqrt 3: -0.048 to 0.448.
    """
    experiment = Experiment("fake", {"a: x": "", "b: x": "", "b: y": ""}, {"dev_loss": 0.1}, ())
    records = []
    for seed, gain in enumerate(gains):
        values = {"a: x": 9.0, "b: x": 4.0 + seed, "b: y": 4.0 + seed + gain}
        records += [
            {"row": row, "seed": seed, "folder": row, "dev_loss": loss}
            for row, loss in values.items()
        ]
    [record] = compare(experiment, pd.DataFrame(records)).to_dict("records")
    assert (record["row"], record["baseline"], record["verdict"]) == ("b: y", "b: x", verdict)
    if gains == (0.1, 0.2, 0.3):
        assert record["difference"] == "+0.200"
        assert record["95 % CI over seeds"] == "-0.048 to +0.448"
    if len(gains) == 1:
        assert record["95 % CI over seeds"] == ""


def test_a_failed_seed_leaves_its_pair_out():
    """The seed of a failed run is dropped from both sides."""
    experiment = Experiment("fake", {"a": "", "b": ""}, {"dev_loss": 0.1}, ())
    values = [
        ("a", 1, 1.0),
        ("a", 2, None),
        ("a", 3, 3.0),
        ("b", 1, 2.0),
        ("b", 2, 9.0),
        ("b", 3, None),
    ]
    runs = pd.DataFrame(values, columns=["row", "seed", "dev_loss"])
    runs["folder"] = runs["row"]
    [record] = compare(experiment, runs).to_dict("records")
    assert (record["difference"], record["95 % CI over seeds"]) == ("+1.000", "")
    assert record["verdict"] == "undecided"


def test_the_interval_over_pairs(tmp_path, monkeypatch):
    """Of 100 pairs, 50 more are correct than in the baseline: 0.5 with standard error 0.05."""
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    labels = [index % 2 for index in range(100)]
    rows = [f"{index}\t{index}\tx\ty\t{label}\n" for index, label in enumerate(labels)]
    path = tmp_path / "dev.csv"
    path.write_text("\tid\tsentence1\tsentence2\tis_duplicate\n" + "".join(rows))
    options = {"para_dev": str(path), "para_dev_out": "predictions/para-dev-output.csv"}
    records = []
    for name, predicted in (("a", [0] * 100), ("b", labels)):
        folder = tmp_path / name / "predictions"
        folder.mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"options": options}))
        lines = [f"{index}, {label} \n" for index, label in enumerate(predicted)]
        text = "id \t Predicted_Is_Paraphrase \n" + "".join(lines)
        (folder / "para-dev-output.csv").write_text(text)
        for seed in (1, 2):
            share = (0.5 if name == "a" else 1.0) + seed / 1000
            records.append({"row": name, "seed": seed, "folder": name, "dev_accuracy": share})
    experiment = Experiment("fake", {"a": "", "b": ""}, {"dev_accuracy": 0.01}, ())
    [record] = compare(experiment, pd.DataFrame(records)).to_dict("records")
    low, high = map(float, record["95 % CI over pairs"].split(" to "))
    assert (record["difference"], record["verdict"]) == ("+0.500", "higher")
    assert record["95 % CI over seeds"] == "+0.500 to +0.500"
    assert (0.5 - low, high - 0.5) == pytest.approx((0.098, 0.098), abs=0.02)
    one_seed = pd.DataFrame(records[::2])
    assert compare(experiment, one_seed)["verdict"].tolist() == ["undecided"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.2361, 4.2379], "4.237 ± 0.001"),
        ([36864, 36864], "36,864"),
        ([None, 24.75], "24.75"),
        ([None], ""),
    ],
)
def test_how_values_are_formatted(values, expected):
    """About four digits, and a deviation only where there is one."""
    assert format_values(pd.Series(values, dtype=float)) == expected


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_run(name):
    """Its options exist and differ, each row has a baseline, and something is compared."""
    experiment = EXPERIMENTS[name]
    options = [options.split() for options in experiment.rows.values()]
    folders = {run_folder(experiment.script, words, "code") for words in options}
    assert len(folders) == len(experiment.rows)
    assert all(experiment.baseline(row) in experiment.rows for row in experiment.rows)
    assert any(experiment.baseline(row) != row for row in experiment.rows)
