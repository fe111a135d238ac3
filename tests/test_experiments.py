"""A question becomes a table: what is run, what a table shows, and intervals worked out by hand."""

import argparse
import importlib
import json
import shutil
import sys
from itertools import chain

import pandas as pd
import pytest

import experiments
import plots  # noqa: F401 (not the plots.py of the `task` fixture)
import runs
from config import ROOT, InputError
from datasets import read_sonnets
from experiments import (
    EXPERIMENTS,
    Experiment,
    absolute,
    combine,
    compare,
    decide,
    differences,
    format_values,
    gather,
    is_chosen,
    run_name,
    values_by_text,
    write_folds,
)

SCRIPT = '''
"""A task that takes no time."""
import argparse, json, pathlib, sys
def parse_options(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--seed", type=int)
    names = ("held_out_sonnet_path", "dev_sonnet_path", "sonnet_path")
    for name in ("model_size", "data", "out_dir", *names):
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
    code = "edited" if options.lr == 0.125 else folder.name.split("-")[-2]
    config = {"commit": "c0ffee", "dtype": "float32", "code_sha256": code}
    config |= {"device": "cpu", "threads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    summary = {"seed": options.seed, "dev_loss": loss, "best_epoch": 1}
    summary |= {"trainable_parameters": 10, "seconds_per_epoch": 1.0, "peak_memory_gb": 0.5}
    summary |= {"dev_rhymes": 0.5, "gold_dev_rhymes": 1.0, "random_dev_rhymes": 0.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [f"{split},{i},{loss + i},5" for split in ("dev", "test") for i in (-1, 0, 1)]
    (folder / "per_text.csv").write_text("\\n".join(["split,id,loss,num_targets", *lines]))
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
    monkeypatch.setattr(experiments, "STORED", tmp_path / "results" / "runs")
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("[!S]*"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "fake_task", raising=False)
    add_experiment(monkeypatch, {"one": "", "two": "--lr 2"})

    def ran():
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    return ran


def add_experiment(monkeypatch, rows, **settings):
    """Rows are compared with the row `one`."""
    experiment = Experiment("fake_task", rows, {"one": rows}, {"dev_loss": 1.5}, PANELS, **settings)
    monkeypatch.setitem(EXPERIMENTS, "fake", experiment)


def collect(seeds=1, jobs=1, given=(), accept_other_code=False, no_new_runs=False):
    options = argparse.Namespace(
        seeds=seeds, jobs=jobs, accept_other_code=accept_other_code, no_new_runs=no_new_runs
    )
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


def test_a_table_of_the_stored_runs(task, tmp_path, monkeypatch, capsys):
    """--no_new_runs shows what an interrupted table has, in rows with different seeds."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", "--no_new_runs"])
    with pytest.raises(InputError, match="no row of this table is stored"):
        experiments.main()
    collect(seeds=2)
    edit(tmp_path / "fake_task.py", "options.seed % 10", "options.seed % 10 + 1", monkeypatch)
    add_experiment(monkeypatch, {"one": ""})
    collect(seeds=4, accept_other_code=True)
    add_experiment(monkeypatch, {"one": "", "two": "--lr 2", "three": "--lr 3"})
    task()
    assert call_main(monkeypatch, "--no_new_runs") == 0
    assert task() == []
    table = (tmp_path / "results" / "fake.md").read_text(encoding="utf-8")
    assert [cells(table, row)[-1] for row in ("row", "one", "two")] == ["seeds", "4", "2"]
    assert "\n| three" not in table
    assert "deviation over 2 to 4 seeds" in table
    difference = next(block for block in table.split("\n\n") if "verdict" in block)
    assert cells(difference, "two")[3] == "+1.000"  # of the seeds that both rows have
    assert "9 runs failed or are not stored" in capsys.readouterr().out


def test_candidates_of_a_table_of_stored_runs(task, monkeypatch, capsys):
    """Only a complete comparison chooses one; rows without candidates do not depend on it."""
    add_experiment(monkeypatch, {"one": "", "best": {"a": "--lr 0.5", "b": "--lr 2"}})
    runs = collect(seeds=2)
    complete = collect(seeds=2, no_new_runs=True)
    assert complete[["row", "run"]].equals(runs[["row", "run"]])
    capsys.readouterr()
    loser = run_name("fake_task", ["--seed", "11712", "--lr", "2"])
    (experiments.STORED / f"{loser}.json").unlink()
    assert set(collect(seeds=2, no_new_runs=True)["row"]) == {"one"}
    assert "1 runs failed or are not stored" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", "--no_new_runs", "--rows", "best"])
    with pytest.raises(InputError, match="no row of this table is stored"):
        experiments.main()


def test_a_table_of_stored_folds(task, monkeypatch):
    """A seed that lacks a fold is left out: its mean would be of other texts."""
    add_experiment(monkeypatch, {"one": ""}, cross_validation=True)
    runs = collect(seeds=2)
    [path] = experiments.STORED.glob(f"{runs['run'].iloc[-1]}.json")
    path.unlink()
    assert set(collect(seeds=2, no_new_runs=True)["seed"]) == {11711}


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
    add_experiment(monkeypatch, {"edited": "--lr 0.125"})
    for _ in range(2):
        [reason] = collect()["failed"]
        assert "the code was edited" in reason
        assert task() == ["0.125 11711"]


def test_a_changed_default_or_file_is_run_again(task, tmp_path, monkeypatch):
    """The hash is of values, not of what was typed; a file counts with its contents."""

    def name(*arguments):
        return run_name("fake_task", list(arguments))

    before = name("--seed", "1")
    assert name("--seed", "1", "--out_dir", "x", "--resume") == before
    paths = [tmp_path / file for file in ("a.csv", "b.csv")]
    for path in paths:
        path.write_text("a")
    first, second = (name("--data", str(path)) for path in paths)
    assert first == second
    paths[1].write_text("b")
    assert name("--data", str(paths[1])) != first
    edit(tmp_path / "fake_task.py", "default=1.0", "default=1.25", monkeypatch)
    assert name("--seed", "1") != before


def test_a_base_is_identified_by_its_weights(task, tmp_path):
    """Not by its path: trained further, it keeps its name, and a copy has another one."""
    names = []
    for folder, weights in (("a", b"1"), ("a", b"2"), ("b", b"2")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "model.safetensors").write_bytes(weights)
        names.append(run_name("fake_task", ["--model_size", str(tmp_path / folder)]))
    assert names[0] != names[1]
    assert names[1] == names[2]


def test_a_failed_run_is_shown_and_repeated(task, tmp_path, monkeypatch, capsys):
    """The table has the row and the reason, the other runs stay, and the exit code is 1."""
    add_experiment(monkeypatch, {"one": "", "three": "--lr 3"})
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
    add_experiment(monkeypatch, {"one": ""})
    assert call_main(monkeypatch, "--lr", "3") == 1
    [path] = (tmp_path / "results").glob("*.md")
    assert "error: the loss is nan" in path.read_text(encoding="utf-8")


def cells(table, row):
    """The first line of a markdown table that begins with a cell."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return next([cell.strip() for cell in line] for line in lines if line[0].strip() == row)


def test_a_table_and_its_plot(task, tmp_path, monkeypatch):
    """Given options are in the name; the table has commits and both baselines of form."""
    assert call_main(monkeypatch, "--seeds", "2", "--data", "b/a") == 0
    [plot] = (tmp_path / "results").glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stem.endswith("data-a")
    table = plot.with_suffix(".md").read_text(encoding="utf-8")
    difference = next(block for block in table.split("\n\n") if "verdict" in block)
    expected = ["two", "dev_loss", "one", "+1.000", *["+1.000 to +1.000"] * 3, "1.5", "equivalent"]
    assert cells(difference, "two") == expected
    assert cells(table, "Shakespeare")[1] == "1.000"
    assert cells(table, "random lines")[1] == "0.000"
    assert "4 of c0ffee" in table


def test_a_run_that_two_rows_share_counts_once(task, tmp_path, monkeypatch):
    """The table says how many runs it rests on."""
    assert call_main(monkeypatch, "--seeds", "2", "--lr", "1") == 0
    [path] = (tmp_path / "results").glob("*.md")
    assert " 2 of c0ffee" in path.read_text(encoding="utf-8")


def test_chosen_rows_have_files_of_their_own(task, tmp_path, monkeypatch):
    """Part of a table does not replace the whole one; words that match nothing are an error."""
    assert call_main(monkeypatch, "--rows", "tw", "x", "--seeds", "1", "--lr", "2") == 0
    assert task() == ["2 11711"]
    [path] = (tmp_path / "results").glob("*.md")
    assert path.name == "fake-tw-x-lr-2.md"
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", "--rows", "three"])
    with pytest.raises(InputError, match="three matches none of one; two"):
        experiments.main()


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["LoRA"], ["LoRA"]),  # the whole name of a row
        (["LoR"], ["LoRA", "LoRA, rank 4"]),
        (["rank", "full"], ["full", "LoRA, rank 4"]),
        (["full", "LoRA"], ["full", "LoRA"]),
        (["base"], []),
    ],
)
def test_rows_are_chosen_by_words_or_whole_names(words, rows):
    """Otherwise nothing could select a row whose name is a part of another's."""
    names = ["full", "LoRA", "LoRA, rank 4"]
    assert [row for row in names if is_chosen(row, words, names)] == rows


def test_paths_of_given_options_are_absolute(tmp_path, monkeypatch):
    """Each run has a working directory of its own; other words stay as they are."""
    (tmp_path / "a.csv").touch()
    monkeypatch.chdir(tmp_path)
    words = ["--data", "a.csv", "--data=a.csv", "--lr=1", "", "b.csv"]
    path = str(tmp_path / "a.csv")
    assert list(map(absolute, words)) == ["--data", path, f"--data={path}", "--lr=1", "", "b.csv"]


@pytest.mark.parametrize("option", ["--seed=3", "--out_dir=x", "--resume"])
def test_options_that_are_set_for_each_run_are_rejected(task, monkeypatch, option):
    """They would be ignored, or mix all runs in one folder."""
    monkeypatch.setattr(sys, "argv", ["experiments.py", "fake", option])
    with pytest.raises(InputError, match=option.split("=")[0]):
        experiments.main()
    assert task() == []


@pytest.mark.parametrize(
    ("interval", "margin", "verdict"),
    [
        ((), 0.1, "undecided"),  # one seed
        ((0.2, 0.4), 0.1, "higher"),
        ((-0.1, 0.5), 0.1, "undecided"),
        ((-0.4, -0.2), 0.1, "lower"),
        ((-0.05, 0.09), 0.1, "equivalent"),
        ((0.01, 0.09), 0.1, "equivalent"),
        ((-0.2, 0.05), 0.1, "undecided"),
        ((-0.05, 0.09), 0.0, "undecided"),
    ],
)
def test_verdicts_by_hand(interval, margin, verdict):
    """A difference is equivalent within the margin, and otherwise has a sign or none."""
    assert decide(interval, margin) == verdict


@pytest.mark.parametrize(
    ("over_seeds", "over_texts", "over_both"),
    [
        ((), (0.2, 0.4), ()),  # one seed, however many texts
        ((0.2, 0.4), (), (0.2, 0.4)),  # time and memory
        ((0.0, 0.6), (-0.1, 0.7), (-0.2, 0.8)),  # 0.3, 0.4 and 0.5
        ((0.05, 0.55), (0.05, 0.55), (0.3 - 0.125**0.5, 0.3 + 0.125**0.5)),
        ((0.3, 0.3), (0.2, 0.7), (0.2, 0.7)),  # not symmetric
    ],
)
def test_the_interval_over_both_by_hand(over_seeds, over_texts, over_both):
    """Distances add like the sides of a right triangle: the fourth includes zero."""
    assert combine(0.3, over_seeds, over_texts) == pytest.approx(over_both)


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
    experiment = make_experiment(baseline="x", rows=["y"], margins={"dev_loss": 0.1})
    records = []
    for seed, gain in enumerate(gains):
        for row, loss in (("z", 9.0), ("x", 4.0 + seed), ("y", 4.0 + seed + gain)):
            records.append(record(row, seed, {"dev_loss": [loss - 1, loss, loss + 1]}))
    [difference] = compare(experiment, pd.DataFrame(records)).to_dict("records")
    assert (difference["row"], difference["baseline"]) == ("y", "x")
    assert difference["verdict"] == verdict
    if gains == (0.1, 0.2, 0.3):
        assert difference["difference"] == "+0.200"
        assert difference["95 % CI over seeds"] == "-0.048 to +0.448"
        assert difference["95 % CI over texts"] == "+0.200 to +0.200"
    if len(gains) == 1:
        assert difference["95 % CI over seeds"] == ""


def make_experiment(baseline, rows, margins):
    return Experiment("fake", {}, {baseline: rows}, margins, ())


def record(row, seed, texts, fold=0):
    return {"row": row, "seed": seed, "fold": fold, "texts": texts}


def test_a_failed_seed_leaves_its_pair_out():
    """The seed of a failed run is dropped from both sides."""
    values = [
        ("a", 1, [1.0]),
        ("a", 2, None),
        ("a", 3, [3.0]),
        ("b", 1, [2.0]),
        ("b", 2, [9.0]),
        ("b", 3, None),
    ]
    runs = pd.DataFrame([record(row, seed, v and {"dev_loss": v}) for row, seed, v in values])
    [difference] = compare(make_experiment("a", ["b"], {"dev_loss": 0.1}), runs).to_dict("records")
    assert (difference["difference"], difference["95 % CI over seeds"]) == ("+1.000", "")
    assert difference["verdict"] == "undecided"


def test_a_failed_fold_leaves_its_seed_out():
    """Otherwise the texts of the next fold would be compared with those of the failed one."""
    runs = pd.DataFrame(
        [
            record(
                row, seed, None if (row, seed, fold) == ("b", 2, 0) else {"dev_loss": texts}, fold
            )
            for row, gain in (("a", 0.0), ("b", 1.0))
            for seed in (1, 2, 3)
            for fold, texts in enumerate([[gain, gain + 5], [gain + 7]])
        ]
    )
    experiment = make_experiment("a", ["b"], {"dev_loss": 0.1})
    [(row, baseline, frame)] = differences(experiment, runs, "dev_loss")
    assert (row, baseline, frame.index.tolist()) == ("b", "a", [1, 3])
    assert frame.to_numpy().tolist() == [[1, 1, 1]] * 2


def test_the_interval_over_texts():
    """Of 100 pairs, 50 more are correct than in the baseline: 0.5 with standard error 0.05."""
    values = {"a": [0, 1] * 50, "b": [1] * 100}
    runs = pd.DataFrame(
        [record(row, seed, {"dev_accuracy": values[row]}) for seed in (1, 2) for row in values]
    )
    experiment = make_experiment("a", ["b"], {"dev_accuracy": 0.01})
    [difference] = compare(experiment, runs).to_dict("records")
    low, high = map(float, difference["95 % CI over texts"].split(" to "))
    assert (difference["difference"], difference["verdict"]) == ("+0.500", "higher")
    assert difference["95 % CI over seeds"] == "+0.500 to +0.500"
    assert (0.5 - low, high - 0.5) == pytest.approx((0.098, 0.098), abs=0.02)
    assert difference["pairs classified differently"] == "50 of 100"
    assert compare(experiment, runs[:2])["verdict"].tolist() == ["undecided"]


def test_a_difference_of_few_texts_is_undecided():
    """Seeds agree that a loss is 0.1 higher, but only because of one text of ten."""
    texts = {"a": [4.0] * 10, "b": [5.0, *[4.0] * 9]}
    runs = pd.DataFrame(
        [record(row, seed, {"test_loss": texts[row]}) for seed in (1, 2, 3) for row in texts]
    )
    [difference] = compare(make_experiment("a", ["b"], {"test_loss": 0}), runs).to_dict("records")
    assert difference["95 % CI over seeds"] == "+0.100 to +0.100"
    assert difference["95 % CI over texts"].startswith("+0.000 to ")
    assert difference["verdict"] == "undecided"


def test_a_row_has_several_baselines():
    """Generalized pooling is compared with the last token and with the mean."""
    comparisons = EXPERIMENTS["poolings"].comparisons
    for name in ("joint", "separate", "separate --use_lora"):
        baselines = [b for b, rows in comparisons.items() if f"{name}: generalized" in rows]
        assert baselines == [f"{name}: last", f"{name}: mean"]


@pytest.mark.parametrize("script", ["sonnet_generation", "paraphrase_detection"])
def test_the_means_of_a_run_s_texts_are_its_metrics(folder, tmp_path, script):
    """per_text.csv has every dev and test text with its id; the test texts differ in length."""
    options = [f"--model_size={folder}", "--device=cpu", "--epochs=0", f"--out_dir={tmp_path}"]
    if script == "sonnet_generation":
        text = "".join(f"{number}\n\na\nb\nc\n{'d ' * number}\n\n" for number in (2, 5, 9))
        names = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
        options += ["--max_new_tokens=1", f"--sonnet_out={tmp_path / 'out.txt'}"]
    else:
        text = "id\tsentence1\tsentence2\tis_duplicate\n"
        text += "".join(f"{name}\t{'a ' * name}\tb\t{name % 2}\n" for name in (2, 5, 9))
        names = ("para_train", "para_dev", "para_test")
        options += [f"--para_{split}_out={tmp_path / split}.csv" for split in ("dev", "test")]
    (tmp_path / "data.txt").write_text(text)
    options += [f"--{name}={tmp_path / 'data.txt'}" for name in names]
    module = importlib.import_module(script)
    module.main(module.parse_options(options))
    per_text = pd.read_csv(tmp_path / "per_text.csv")
    for split in ("dev", "test"):
        assert per_text[per_text["split"] == split]["id"].tolist() == [2, 5, 9]
    summary = json.loads((tmp_path / "summary.json").read_text())
    values = values_by_text(per_text)
    assert {"test_loss"} < set(values)
    for metric, numbers in values.items():
        assert sum(numbers) / 3 == pytest.approx(summary[metric], abs=1e-4), metric


def test_values_by_text_by_hand():
    """Means over texts are the metrics: a text of 30 tokens counts three times one of 10."""
    columns = {"id": [9, 4], "loss": [2.0, 4.0], "num_targets": [30, 10]}
    sonnets = pd.DataFrame({"split": "test", **columns})
    # In the order of ids; the mean is (4 * 10 + 2 * 30) / 40.
    assert values_by_text(sonnets) == {"test_loss": [2.0, 3.0]}
    columns = {
        "id": list("abcd"),
        "loss": [0.12346, 1, 2, 3],
        "predicted": [0, 1, 1, 0],
        "label": [0, 1, 0, 0],
    }
    pairs = pd.DataFrame({"split": ["test", "test", "dev", "dev"], **columns})
    expected = {"dev_accuracy": [0, 1], "test_accuracy": [1, 1], "test_loss": [0.1235, 1]}
    assert values_by_text(pairs) == expected


def test_a_table_is_made_again_from_stored_runs(task, tmp_path, monkeypatch):
    """Run folders are not committed: without them, and elsewhere, nothing is executed."""
    rows = {"one": "", "two": {"a": "--lr 2", "b": "--lr 1.5"}}
    add_experiment(monkeypatch, rows, cross_validation=True)
    assert call_main(monkeypatch, "--seeds", "2") == 0
    assert len(task()) == 11 * 2 * 3
    names = ("fake.md", "fake.csv", "fake.png")
    before = [(tmp_path / "results" / name).read_bytes() for name in names]
    for name in names:
        (tmp_path / "results" / name).unlink()
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "elsewhere")
    assert call_main(monkeypatch, "--seeds", "2") == 0
    assert task() == []
    assert [(tmp_path / "results" / name).read_bytes() for name in names] == before
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "results" / "runs").iterdir()
    )


def test_a_finished_run_is_stored_after_a_kill(task, tmp_path):
    """A table that was killed before it stored a finished run does not repeat it."""
    before = collect()
    task()
    for path in (tmp_path / "results" / "runs").iterdir():
        path.unlink()
    pd.testing.assert_frame_equal(collect(), before)
    assert task() == []


def test_times_are_those_of_single_runs(task):
    """Two runs at a time disturb each other."""
    assert collect(jobs=2)["seconds_per_epoch"].isna().all()
    assert collect(seeds=2)["seconds_per_epoch"].fillna(0).tolist() == [0, 0, 1, 1]


def test_a_candidate_is_chosen_on_dev(task, monkeypatch):
    """Two seeds of each candidate, then all seeds of the best; one that failed is not chosen."""
    rows = {"one": "", "two": {"a": "--lr 2", "b": "--lr 1.5", "c": "--lr 3"}}
    add_experiment(monkeypatch, rows)
    runs = collect(seeds=3)
    assert runs[runs["row"] == "two"]["chosen"].tolist() == ["b"] * 3
    assert sorted(task()) == sorted(
        [f"{lr} {seed}" for lr in ("2", "1.5", "3") for seed in (11711, 11712)]
        + ["1.5 11713"]
        + [f"1 {seed}" for seed in (11711, 11712, 11713)]
    )


def test_folds_partition_the_sonnets(task):
    """Each sonnet is a test and a dev text once, and none of them is trained on in that fold."""
    splits = [
        [read_sonnets(option.partition("=")[2])["id"].tolist() for option in fold]
        for fold in write_folds()
    ]
    tests, devs, _ = zip(*splits, strict=True)
    for ids in (tests, devs):
        assert sorted(chain(*ids)) == list(range(1, 155))
    for test, dev, train in splits:
        assert (len(test), len(dev)) == (14, 14)
        assert sorted(test + dev + train) == list(range(1, 155))
    assert devs == tests[1:] + tests[:1]
    assert sorted(tests[0])[:5] == [6, 8, 13, 31, 33]  # the same on every machine


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
    """Its options exist and differ, and comparisons and shown columns are of its rows."""
    experiment = EXPERIMENTS[name]
    runs = set()
    for row, choices in experiment.rows.items():
        choices = choices.values() if isinstance(choices, dict) else [choices]
        names = {run_name(experiment.script, options.split()) for options in choices}
        assert len(names) == len(choices), row
        assert frozenset(names) not in runs
        runs.add(frozenset(names))
    for baseline, rows in experiment.comparisons.items():
        assert {baseline, *rows} <= set(experiment.rows)
    assert any(set(rows) - {baseline} for baseline, rows in experiment.comparisons.items())
