"""Tables of runs: what is run, stored and kept, and what a report shows."""

import json
import re
import shlex
import shutil
from itertools import chain

import pandas as pd
import pytest

import experiments
import paraphrase_detection
import sonnet_generation
from config import ROOT, InputError
from datasets import read_sonnets
from evaluation import tables
from evaluation.tables import metric_by_seed
from experiments import EXPERIMENTS, Experiment, make_jobs, write_fold

SCRIPT = '''
"""A task that takes no time; its loss is --lr plus the last digit of the seed."""
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=1.0)
parser.add_argument("--seed", type=int)
names = "model_size data out_dir held_out_sonnet_path dev_sonnet_path sonnet_path"
for name in names.split():
    parser.add_argument("--" + name)
options = parser.parse_args()
with open(pathlib.Path(__file__).with_name("log"), "a") as log:
    log.write(f"{options.lr:g} {options.seed}\\n")
sys.stdout.buffer.write(b"\\xff")  # not UTF-8
if options.lr > 2:
    sys.stderr.buffer.write(b"some \\xff\\nerror: the loss is nan\\n")
    sys.exit(1)
folder, loss = pathlib.Path(options.out_dir), options.lr + options.seed % 10
folder.mkdir()
(folder / "threads").write_text(os.environ["OMP_NUM_THREADS"])
config = {"commit": "123456789012+", "dtype": "float32"}
(folder / "config.json").write_text(json.dumps(config))
summary = {"seed": options.seed, "dev_loss": loss, "test_loss": loss, "best_epoch": 1}
summary |= {"trainable_parameters": 10 * options.lr, "seconds_per_epoch": 1.0}
summary |= {"test_rhymes": 0.5, "dataset": "verses", "test_accuracy": 0.75}
(folder / "summary.json").write_text(json.dumps(summary))
lines = [f"{split},{i},{loss + i},5,{i}" for split in ("dev", "test") for i in (1, -1, 0)]
header = "split,id,loss,tokens,sentence1"
(folder / "per_text.csv").write_text("\\n".join([header, *lines]))
'''


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task script in a repository of its own; returns a function: what was run since."""
    (tmp_path / "fake_task.py").write_text(SCRIPT)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("[!S]*"))
    set_rows(monkeypatch, [("one", "", ""), ("two", "", "--lr 2")])
    baselines = "baseline,dev_accuracy,test_accuracy\nmajority class,0.5,0.5011\n"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "baselines-verses.csv").write_text(baselines)

    def ran():
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return sorted(lines)

    return ran


def set_rows(monkeypatch, rows, **settings):
    """Rows are compared with the row `one`."""
    experiment = Experiment("fake_task.py", rows, {"one": ""}, {"dev_loss": 1.5}, **settings)
    monkeypatch.setitem(EXPERIMENTS, "fake", experiment)


def run(*arguments):
    return experiments.main(["fake", "--seeds", "2", *arguments])


def cells(table, row):
    """The first line of a markdown table that begins with a cell."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return next([cell.strip() for cell in line] for line in lines if line[0].strip() == row)


def test_a_table_is_run_stored_and_reported(task, tmp_path, capsys):
    """Each run is a line of NAME.csv, and each held-out text one of NAME-texts.csv.gz."""
    assert run("--jobs", "2") == 0
    assert task() == ["1 11711", "1 11712", "2 11711", "2 11712"]
    results = tmp_path / "results"
    runs = pd.read_csv(results / "fake.csv", dtype={"commit": str})
    assert runs[["row", "seed", "dev_loss"]].values.tolist() == [
        ["one", 11711, 2],
        ["one", 11712, 3],
        ["two", 11711, 3],
        ["two", 11712, 4],
    ]
    assert runs.iloc[2][["options", "commit", "jobs"]].tolist() == ["--lr 2", "123456789012+", 2]
    texts = pd.read_csv(results / "fake-texts.csv.gz")
    assert texts.columns.tolist() == [*experiments.KEY, "split", "id", "loss", "tokens"]
    assert texts.iloc[0].fillna("").tolist() == ["one", "", 0, 11711, "dev", -1, 1.0, 5]
    assert len(texts) == 4 * 6
    report = (results / "fake.md").read_text("utf-8")
    columns = ["row", "dev loss", "test loss", "test accuracy", "test rhymes"]
    assert cells(report, "row")[:5] == columns
    assert cells(report, "one")[1:7] == [*["2.500 ± 0.707"] * 2, "0.750", "0.500", "10", "1"]
    assert cells(report, "majority class")[1:5] == ["", "", "0.501", ""]
    difference = next(block for block in report.split("\n\n") if "verdict" in block)
    expected = ["two", "dev_loss", "one", "+1.000", *["+1.000 to +1.000"] * 3, "1.5", "equivalent"]
    assert cells(difference, "two") == expected
    assert "precision: 4 of 123456789012+ float32." in report
    assert "seconds" not in cells(report, "row")  # two runs at a time disturb each other
    assert report in capsys.readouterr().out
    assert (results / "fake.png").read_bytes().startswith(b"\x89PNG")


def test_without_continue_a_table_starts_afresh(task, tmp_path):
    """An edited line never meets an old number, equal results are equal bytes, and the old stay."""
    run()
    before = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    texts = pd.read_csv(tmp_path / "results" / "fake-texts.csv.gz")
    task()
    run()
    assert len(task()) == 4
    after = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    assert after.pop("before-fake.csv") == before["fake.csv"]
    assert after.pop("before-fake-texts.csv.gz") == before.pop("fake-texts.csv.gz")
    del after["fake-texts.csv.gz"]  # a compressed file names itself
    assert after == before
    assert pd.read_csv(tmp_path / "results" / "fake-texts.csv.gz").equals(texts)
    for name in ("fake.csv", "fake-texts.csv.gz"):  # as if it was interrupted at once
        pd.read_csv(tmp_path / "results" / name)[:0].to_csv(tmp_path / "results" / name)
    run()
    assert (tmp_path / "results" / "before-fake.csv").read_bytes() == before["fake.csv"]


def test_continue_keeps_finished_runs(task, tmp_path, monkeypatch):
    """Those of the same options; more seeds are added, and rows of other options run again."""
    run()
    before = (tmp_path / "results" / "fake.md").read_text("utf-8")
    task()
    run("--continue")
    assert task() == []
    assert (tmp_path / "results" / "fake.md").read_text("utf-8") == before
    run("--continue", "--seeds", "3")
    assert task() == ["1 11713", "2 11713"]
    set_rows(monkeypatch, [("one", "", ""), ("two", "", "--lr 1.5")])
    run("--continue")
    assert task() == ["1.5 11711", "1.5 11712"]
    runs = pd.read_csv(tmp_path / "results" / "fake.csv")
    assert runs["row"].tolist() == ["one"] * 3 + ["two"] * 2
    assert cells((tmp_path / "results" / "fake.md").read_text("utf-8"), "one")[-1] == "3"


def test_continue_without_a_table_starts_one(task):
    assert run("--continue") == 0
    assert len(task()) == 4


def test_a_failed_run_is_shown_and_not_stored(task, tmp_path, monkeypatch, capsys):
    """With its errors; the other runs stay, and the exit code is 1."""
    set_rows(monkeypatch, [("one", "", ""), ("three", "", "--lr 3")])
    assert run() == 1
    assert len(task()) == 4
    assert "failed: three-0-11711: some \ufffd\nerror: the loss is nan" in capsys.readouterr().out
    report = (tmp_path / "results" / "fake.md").read_text("utf-8")
    assert cells(report, "one")[1] == "2.500 ± 0.707"
    assert set(pd.read_csv(tmp_path / "results" / "fake.csv")["row"]) == {"one"}
    assert run("--continue") == 1
    assert task() == ["3 11711", "3 11712"]
    assert run("--lr", "3") == 1  # all fail: no traceback


def test_a_seed_with_a_failed_run_is_left_out_of_the_difference(task, tmp_path, monkeypatch):
    """Only pairs of runs are compared."""
    script = (tmp_path / "fake_task.py").read_text()
    condition = "options.lr > 1 and options.seed == 11712"
    (tmp_path / "fake_task.py").write_text(script.replace("options.lr > 2", condition))
    assert run() == 1
    report = (tmp_path / "results" / "fake.md").read_text("utf-8")
    difference = next(block for block in report.split("\n\n") if "verdict" in block)
    assert cells(difference, "two")[3:5] == ["+1.000", ""]
    assert cells(difference, "two")[-1] == "undecided"


def test_a_candidate_is_chosen_on_dev(task, tmp_path, monkeypatch):
    """Two seeds of each candidate, then all seeds of the best; one that failed is not chosen."""
    candidates = {"a": "--lr 2", "b": "--lr 1.5", "c": "--lr 3"}
    rows = [("two", name, options) for name, options in candidates.items()]
    set_rows(monkeypatch, [("one", "", ""), *rows])
    assert run("--seeds", "3") == 1
    runs = [f"{lr} {seed}" for lr in ("2", "1.5", "3") for seed in (11711, 11712)]
    expected = [*runs, "1.5 11713", *(f"1 {seed}" for seed in (11711, 11712, 11713))]
    assert task() == sorted(expected)
    report = (tmp_path / "results" / "fake.md").read_text("utf-8")
    assert cells(report, "two")[-2:] == ["3", "b"]
    assert cells(report, "two")[1] == "3.500 ± 1.000"


def test_a_cross_validation(task, tmp_path, monkeypatch):
    """Every row runs in every fold; texts are those of all folds, and the plot shows them."""
    set_rows(monkeypatch, [("one", "", ""), ("two", "a", "--lr 2")], cross_validation=True)
    assert run("--seeds", "1") == 0
    assert len(task()) == 2 * 11
    assert len(pd.read_csv(tmp_path / "results" / "fake-texts.csv.gz")) == 2 * 11 * 6


def test_folds_partition_the_sonnets(tmp_path):
    """Each sonnet is a test and a dev text once, and none of them is trained on in that fold."""
    splits = [
        [
            read_sonnets(option.partition("=")[2])["id"].tolist()
            for option in write_fold(tmp_path, k)
        ]
        for k in range(experiments.FOLDS)
    ]
    tests, devs, _ = zip(*splits, strict=True)
    for ids in (tests, devs):
        assert sorted(chain(*ids)) == list(range(1, 155))
    for test, dev, train in splits:
        assert (len(test), len(dev)) == (14, 14)
        assert sorted(test + dev + train) == list(range(1, 155))
    assert devs == tests[1:] + tests[:1]
    assert sorted(tests[0])[:5] == [6, 8, 13, 31, 33]  # the same on every machine


def test_chosen_rows_and_options_have_files_of_their_own(task, tmp_path):
    """Part of a table does not replace the whole one; words that match nothing are an error."""
    assert run("--rows", "tw", "x", "--seeds", "1", "--data", "b/a", "--lr", "1") == 0
    assert task() == ["2 11711"]  # the option of the row counts
    report = (tmp_path / "results" / "fake-tw-x-data-b-a-lr-1.md").read_text("utf-8")
    assert "| verdict" not in report  # a single row is compared with nothing
    with pytest.raises(InputError, match="no row of fake"):
        run("--rows", "three")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_run(name, tmp_path):
    """Its options exist and differ within a row, and comparisons are of its rows."""
    experiment = EXPERIMENTS[name]
    script, *outputs = experiment.script.format(tmp_path, tmp_path).split()
    modules = {f"{task.__name__}.py": task for task in (sonnet_generation, paraphrase_detection)}
    found = set()
    for row, _, options in experiment.rows:
        values = vars(modules[script].parse_options([*outputs, *options.split()]))
        found.add((row, json.dumps(values, sort_keys=True)))
    assert len(found) == len(experiment.rows)
    rows = {row for row, _, _ in experiment.rows}
    compared = [
        row for row in rows if any(re.match(p, row) for p in experiment.comparisons.values())
    ]
    assert rows <= {*compared, *experiment.comparisons}


def test_given_options_replace_the_model_and_not_the_row():
    """A base model stays untrained."""
    extra = ["--model_size", "a folder", "--epochs", "1"]
    for job in make_jobs(EXPERIMENTS["sonnets"], [""], extra).to_dict("records"):
        options = sonnet_generation.parse_options(shlex.split(job["options"]))
        assert options.epochs == (0 if job["row"] == "base model" else 1)
        assert options.model_size == "a folder"


def test_values_of_texts_by_hand():
    """Means over texts are the metrics: a text of 30 tokens counts three times one of 10."""
    key = {"row": "a", "seed": 1, "fold": 0}
    sonnets = {"split": "test", "id": ["9", "4"], "loss": [2.0, 4.0], "tokens": [30, 10]}
    values = metric_by_seed(pd.DataFrame(), pd.DataFrame(key | sonnets), "test_loss")
    assert values.loc["a"][0].to_dict("records") == [{"4": 2.0, "9": 3.0}]
    pairs = {"split": ["test", "test", "dev"], "id": list("abc"), "correct": [0, 1, 1]}
    values = metric_by_seed(pd.DataFrame(), pd.DataFrame(key | pairs), "test_accuracy")
    assert values.loc["a"].to_numpy().tolist() == [[0, 1]]
    runs = pd.DataFrame([key | {"peak_memory_gb": 2.0}, key | {"fold": 1, "peak_memory_gb": 4.0}])
    assert metric_by_seed(runs, pd.DataFrame(), "peak_memory_gb").to_numpy().tolist() == [[3]]


def test_metrics_that_were_not_measured_are_left_out():
    """The course's test pairs of Quora have no labels: only dev is compared."""
    keys = [{"row": row, "seed": seed, "fold": 0} for row in "ab" for seed in (1, 2)]
    pairs = {"split": "dev", "id": list("xyz"), "loss": 0.5}
    frames = [pd.DataFrame(key | pairs).assign(correct=range(3)) for key in keys]
    margins = {"dev_accuracy": 0.01, "test_accuracy": 0.01, "test_loss": 0.02}
    differences = tables.compare(pd.DataFrame(keys), pd.concat(frames), {"a": ""}, margins)
    assert differences["metric"].tolist() == ["dev_accuracy"]
    assert differences["row"].tolist() == ["b"]


def test_pairs_are_stored_without_their_texts(task, tmp_path):
    """Whether a prediction is correct, and four digits of the loss."""
    script = (tmp_path / "fake_task.py").read_text()
    script = script.replace("split,id,loss,tokens,sentence1", "split,id,loss,predicted,label")
    (tmp_path / "fake_task.py").write_text(script.replace("{loss + i}", "{loss + i + 1 / 3}"))
    assert run("--rows", "one", "--seeds", "1") == 0
    texts = pd.read_csv(tmp_path / "results" / "fake-one-texts.csv.gz")
    assert texts.columns.tolist()[4:] == ["split", "id", "loss", "predicted", "correct"]
    assert texts["loss"].tolist() == [1.3333, 2.3333, 3.3333] * 2
    assert set(texts["correct"]) == {0}
