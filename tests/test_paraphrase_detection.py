"""The user's command for pairs: what a run leaves, predicts again, resumes to and rejects."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import paraphrase_detection
import plots
import sonnet_generation
from config import InputError, Interrupted
from datasets import PairsDataset, read_pairs
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT
from paraphrase_detection import main, parse_options

ROOT = Path(__file__).resolve().parent.parent
TIMED = ["seconds", "tokens_per_second", "peak_memory_gb"]
HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"
METRICS = """
    loss accuracy accuracy_margin majority_class macro_f1
    no_predicted_no no_predicted_yes yes_predicted_no yes_predicted_yes
""".split()
SUMMARY = """
    task model method seed dataset pooling pair_encoding trainable_parameters total_parameters
    epochs best_epoch first_train_loss final_train_loss best_dev_loss train_seconds
    seconds_per_epoch tokens_per_second peak_memory_gb skipped_steps
""".split()
METHODS = pytest.mark.parametrize("method", [(), ("--use_lora",)], ids=["full", "lora"])


def table(split, count, labeled=True):
    """Pairs of a split; the texts of every second one are alike."""
    rows = []
    for index in range(count):
        first = f"thy {'brow ' * (index % 3)}{index}"
        second = f"{'thy' if index % 2 else 'z'} {index}"
        rows.append(f"{index}\t{split}-{index}\t{first}\t{second}\t{index % 2}.0\n")
    text = HEADER + "".join(rows)
    return text if labeled else re.sub(r"\t[^\t]*\n", "\n", text)


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """The tiny folder with 128 positions: the prompt alone has more than 64 tokens."""
    gpt = GPT2Model.from_pretrained(folder)
    gpt.config = dataclasses.replace(gpt.config, n_positions=128)
    gpt.raw_config |= {"n_positions": 128}
    torch.manual_seed(0)
    gpt.position_embedding = torch.nn.Embedding(128, gpt.config.n_embd)
    path = tmp_path_factory.mktemp("long")
    gpt.save_pretrained(path)
    saved = GPT2Model.from_pretrained(path).config
    assert (saved.n_positions, saved.resid_pdrop) == (128, 0.1)
    return path


@pytest.fixture
def files(tmp_path):
    """Options that name train, dev and test files of 10, 6 and 5 pairs, and the predictions."""
    for split, count in (("train", 10), ("dev", 6), ("test", 5)):
        (tmp_path / f"{split}.csv").write_text(table(split, count))
    given = [f"--para_{split}={tmp_path / split}.csv" for split in ("train", "dev", "test")]
    return given + [f"--para_{split}_out={tmp_path / split}-out.csv" for split in ("dev", "test")]


@pytest.fixture
def command(model, files, tmp_path):
    """Run the script in this process on these; further options may override."""
    given = [*files, f"--model_size={model}", "--batch_size=4", "--epochs=2", "--lr=0.005"]
    given += ["--device=cpu", "--dtype=float32", "--pair_encoding=joint"]

    def run(*options, out="run"):
        main(parse_options([*given, f"--out_dir={tmp_path / out}", *options]))
        return tmp_path / out

    return run


@pytest.fixture
def plotless(command, monkeypatch):
    """The same without plots, which take longer than all the rest."""
    for name in ("draw_curves", "draw_attention"):
        monkeypatch.setattr(plots, name, lambda *_: None)
    return command


def read(path):
    return path.read_text(encoding="utf-8")


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


KINDS = [
    "",
    "--pooling=generalized --use_lora",
    "--pooling=max --dtype=bfloat16",
    "--pooling=multihead --vector_penalty=0.1 --pair_encoding=separate --use_lora --dtype=bfloat16",
]


@pytest.mark.parametrize("options", KINDS)
def test_a_run_leaves_its_files(command, tmp_path, capsys, options):
    """Every file of the design; attention.png only for a pooling that learns token weights."""
    run = command(*options.split())
    lora = "--use_lora" in options
    learned = "generalized" in options or "multihead" in options
    expected = {"config.json", "metrics.csv", "steps.csv", "summary.json", "per_text.csv"}
    expected |= {"curves.png", "resume/state.pt", "best/head.safetensors"}
    expected |= {f"predictions/para-{split}-output.csv" for split in ("dev", "test")}
    assert names(run) >= expected
    assert {"attention.png", "attention.csv"} & names(run) == (
        {"attention.png", "attention.csv"} if learned else set()
    )
    assert (run / "best" / "adapter_model.safetensors").exists() == lora
    assert (run / "best" / "model.safetensors").exists() != lora
    summary = json.loads(read(run / "summary.json"))
    metrics = {f"{split}_{name}" for split in ("dev", "test") for name in METRICS}
    assert summary.keys() == set(SUMMARY) | metrics
    assert (summary["trainable_parameters"] < summary["total_parameters"]) == lora
    epochs = pd.read_csv(run / "metrics.csv")
    assert epochs["epoch"].tolist() == [1, 2]
    if "bfloat16" not in options:  # in which sums depend on how they are split
        best = epochs.loc[summary["best_epoch"] - 1]
        assert best["dev_accuracy"] == summary["dev_accuracy"]
        assert best["dev_loss"] == pytest.approx(summary["dev_loss"], rel=1e-5)
    assert len(json.loads(read(run / "config.json"))["data_sha256"]) == 3
    for split, count in (("dev", 6), ("test", 5)):
        text = read(tmp_path / f"{split}-out.csv")
        assert text == read(run / "predictions" / f"para-{split}-output.csv")
        head, *lines = text.split("\n")
        assert head == "id \t Predicted_Is_Paraphrase "
        ids = [re.fullmatch(r"(\S+), [01] ", line)[1] for line in lines[:-1]]
        assert ids == [f"{split}-{index}" for index in range(count)]
        assert lines[-1] == ""
    screen = capsys.readouterr().out
    assert "(10 train, 6 dev, 5 test)" in screen
    assert "majority_class" in screen


@METHODS
def test_the_model_card_runs(plotless, capsys, method):
    """The code of best/README.md classifies its pair as it is, in the repository's root."""
    run = plotless(*method, "--pooling=generalized", "--pair_encoding=separate", "--epochs=1")
    capsys.readouterr()
    exec(read(run / "best" / "README.md").split("```python\n")[1].split("```")[0], {})
    numbers = re.findall(r"0\.\d+", capsys.readouterr().out)
    assert sum(map(float, numbers)) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("method", [(), ("--use_lora",)], ids=["full", "lora"])
@pytest.mark.parametrize("pooling", ["last", "generalized"])
def test_own_pairs_are_answered(plotless, model, files, tmp_path, capsys, method, pooling):
    """--pair answers as --predict_only does for a file; a learned pooling shows its weights."""
    best = plotless(*method, f"--pooling={pooling}", "--pair_encoding=separate") / "best"
    predicted = re.findall(r", ([01]) ", read(tmp_path / "dev-out.csv"))
    pairs = read_pairs(tmp_path / "dev.csv")
    before = names(tmp_path)
    options = ["--predict_only", f"--model={best}", "--device=cpu", "--dtype=float32"]
    options += [f"--model_size={model}"] if method else []
    for pair in pairs[["sentence1", "sentence2"]].to_numpy().tolist():
        options += ["--pair", *pair]
    capsys.readouterr()
    main(parse_options(options))
    lines = capsys.readouterr().out.splitlines()
    answers = [line for line in lines if not line.startswith("largest")]
    assert len(lines) == len(answers) * (2 if pooling == "generalized" else 1)
    for line, answer, first in zip(answers, predicted, pairs["sentence1"], strict=True):
        word, probability, texts = re.fullmatch(r"(\w+) \(probability (.*)\): (.*)", line).groups()
        assert word == ("no", "yes")[int(answer)]
        assert 0.5 <= float(probability) <= 1
        assert texts.startswith(first)
    assert names(tmp_path) == before


def test_results_per_pair(plotless, tmp_path):
    """per_text.csv has every pair with its texts and line; the largest loss is first."""
    run = plotless("--epochs=1")
    summary = json.loads(read(run / "summary.json"))
    results = pd.read_csv(run / "per_text.csv")
    for split, count in (("dev", 6), ("test", 5)):
        frame = results[results["split"] == split]
        assert frame["loss"].is_monotonic_decreasing
        assert frame["loss"].mean() == pytest.approx(summary[f"{split}_loss"], rel=1e-5)
        accuracy = (frame["predicted"] == frame["label"]).mean()
        assert accuracy == pytest.approx(summary[f"{split}_accuracy"])
        predicted = dict(re.findall(r"(\S+), ([01]) ", read(tmp_path / f"{split}-out.csv")))
        assert dict(zip(frame["id"], frame["predicted"].astype(str), strict=True)) == predicted
        for index in range(count):
            [pair] = frame[frame["id"] == f"{split}-{index}"].itertuples()
            assert (pair.line, pair.label) == (index + 2, index % 2)
            assert pair.sentence1 == f"thy {'brow ' * (index % 3)}{index}"


def test_a_skipped_test_pair_gets_a_prediction(plotless, tmp_path, capsys):
    """Without a text, the majority class of the dev pairs; a line and a note say so."""
    for label, answer, name in ((1, "yes", "most"), (0, "no", "few")):
        dev = table("dev", 6).replace("\t0.0\n" if label else "\t1.0\n", f"\t{label}.0\n", 2)
        (tmp_path / "dev.csv").write_text(dev)
        rows = f"8\tempty\t\ty {label}\t{label}\n9\tblank\tx {label}\t  \t\n"
        (tmp_path / "test.csv").write_text(table("test", 3) + rows + "10\tlast\tx\ty\t1\n")
        plotless("--epochs=0", out=name)
        lines = read(tmp_path / "test-out.csv").splitlines()[1:]
        ids = [line.split(",")[0] for line in lines]
        assert ids == ["test-0", "test-1", "test-2", "empty", "blank", "last"]
        assert lines[3:5] == [f"empty, {label} ", f"blank, {label} "]
        assert f"test: the prediction of skipped pairs is {answer}" in capsys.readouterr().out


def test_every_epoch_has_its_own_order(plotless, monkeypatch):
    """All ten training pairs per epoch, in an order that the next one does not repeat."""
    collate, made = PairsDataset.collate, []

    def recorded(self, indices):
        made.append(indices)
        return collate(self, indices)

    monkeypatch.setattr(PairsDataset, "collate", recorded)
    plotless()
    epochs = (made[start : start + 3] for start in (0, 4))
    first, second = ([index for batch in batches for index in batch] for batches in epochs)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_best_epoch_is_the_first_with_the_highest_dev_accuracy(plotless, monkeypatch):
    """Not the lowest, nor the lowest loss; the metrics are then those of best/."""
    correct = iter([3, 5, 5, 4, 5, 5])  # of 6: four epochs, then dev and test with best/

    def classify(model, dataset):
        answers = dataset.labels.clone()
        answers[next(correct) :] ^= 1
        return torch.nn.functional.one_hot(answers, 2).float()

    monkeypatch.setattr(paraphrase_detection, "classify", classify)
    summary = json.loads(read(plotless("--epochs=4") / "summary.json"))
    assert (summary["best_epoch"], summary["dev_accuracy"]) == (2, 5 / 6)


def test_test_pairs_may_be_unlabeled(plotless, tmp_path):
    """Predictions, and no metrics that nobody can know; dev must be labeled."""
    (tmp_path / "test.csv").write_text(table("test", 5, labeled=False))
    summary = json.loads(read(plotless("--epochs=1") / "summary.json"))
    assert not [name for name in summary if name.startswith("test")]
    assert read(tmp_path / "test-out.csv").count("\n") == 6
    (tmp_path / "dev.csv").write_text(table("dev", 5, labeled=False))
    with pytest.raises(InputError, match=r"dev\.csv has no labels"):
        plotless(out="other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("method", "pair_encoding"),
    [((), "joint"), (("--use_lora",), "separate")],
    ids=["full", "lora"],
)
def test_the_best_model_predicts_the_same_again(
    plotless, model, files, tmp_path, method, pair_encoding
):
    """--predict_only with best/: pooling and encoding are the model's, not the defaults."""
    given = ("--pooling=multihead", f"--pair_encoding={pair_encoding}")
    best = plotless(*method, *given) / "best"
    outputs = [tmp_path / f"{split}-out.csv" for split in ("dev", "test")]
    before = [read(path) for path in outputs]
    for path in outputs:
        path.unlink()
    base = [f"--model_size={model}"] if method else []
    options = [*files[1:], "--predict_only", f"--model={best}", *base, "--device=cpu"]
    main(parse_options([*options, "--dtype=float32"]))
    assert [read(path) for path in outputs] == before


def test_predicting_needs_no_training_pairs(files):
    """--predict_only reads only dev and test."""
    options = parse_options([*files[1:], "--predict_only", "--model=somewhere"])
    assert options.para_dev.endswith("dev.csv")


class Crash(Exception):  # noqa: N818 (stands for a kill, which is not an error of the program)
    """What a kill looks like from inside the loop."""


def crash():
    raise Crash


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def outcome(run):
    metrics = pd.read_csv(run / "metrics.csv", dtype=str).drop(columns=TIMED)
    paths = [*(run / "best").iterdir(), *(run / "predictions").iterdir()]
    paths = [path for path in paths if path.name != "README.md"]  # it names the folder
    paths += [run / "per_text.csv", run / "steps.csv"]
    return metrics.to_dict("records"), {path.name: path.read_bytes() for path in paths}


@METHODS
def test_interrupted_and_resumed_equals_uninterrupted(plotless, monkeypatch, method):
    """In three steps and in an evaluation: the same files, with dropout."""
    options = [*method, "--pooling=generalized", "--checkpoint_every=2"]
    whole = outcome(plotless(*options, out="whole"))
    collate = PairsDataset.collate
    # An epoch has 3 batches to train on and 1 to evaluate.
    for event, at in ((crash, 1), (crash, 6), (crash, 9), (interrupt, 5)):
        made = []

        def counted(self, indices, made=made, event=event, at=at):
            made.append(indices)
            if len(made) == at + 1:
                event()
            return collate(self, indices)

        monkeypatch.setattr(PairsDataset, "collate", counted)
        with pytest.raises((Crash, Interrupted)):
            plotless(*options, out=f"cut-{at}")
        monkeypatch.setattr(PairsDataset, "collate", collate)
        assert len(made) == at + 1
        assert outcome(plotless(*options, "--resume", out=f"cut-{at}")) == whole


@pytest.mark.parametrize(
    "options", ["", "--dtype=bfloat16", "--use_lora --pooling=mean", "--use_lora --dtype=bfloat16"]
)
def test_no_epochs_only_evaluate(plotless, options):
    """--epochs 0: predictions and metrics of the untrained head, no curves, no best model."""
    run = plotless(*options.split(), "--epochs=0")
    summary = json.loads(read(run / "summary.json"))
    assert (summary["epochs"], summary["best_epoch"]) == (0, 0)
    assert 0 <= summary["dev_accuracy"] <= 1
    assert not names(run) & {"metrics.csv", "best/head.safetensors"}


@pytest.mark.parametrize("pooling", ["generalized", "multihead"])
@pytest.mark.parametrize("pair_encoding", ["joint", "separate"])
def test_the_token_weights_of_a_pooling(command, model, tmp_path, pooling, pair_encoding):
    """Every token of the text and no padding; relative to uniform weights, 1 on average."""
    torch.manual_seed(0)
    classifier = ParaphraseGPT(GPT2Model.from_pretrained(model), pooling, pair_encoding).eval()
    pairs = read_pairs(tmp_path / "dev.csv")
    dataset = PairsDataset(pairs, classifier.gpt, pair_encoding)
    predicted = torch.tensor([0, 1, 0, 1, 1, 0])  # dev-4 and dev-5 are misclassified
    logits = torch.nn.functional.one_hot(predicted, 2)
    weights = paraphrase_detection.examples_of_weights(classifier, dataset, logits)
    by_pair = dict(list(weights.groupby("pair", sort=False)))
    assert list(by_pair) == [
        "dev-0: label no, predicted no",
        "dev-4: label no, predicted yes",
        "dev-5: label yes, predicted no",
        "dev-1: label yes, predicted yes",
    ]
    for tokens, index in zip(by_pair.values(), (0, 4, 5, 1), strict=True):
        texts = dataset.texts(index)
        decode = classifier.gpt.tokenizer.decode
        assert "".join(tokens["token"]) == "".join(decode(text.tolist()) for text in texts)
        assert tokens["weight"].sum() == pytest.approx(sum(map(len, texts)), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "text"),
    [("b😀", "$x^2$ \\frac{1} 😀 の\u202e"), ("$x^$", "z"), ("の", "z"), ("a", "\x07")],
    ids=ascii,
)
def test_any_text_can_be_drawn(command, tmp_path, name, text):
    """A dollar sign is not a formula and a rare character not a warning: the run completes."""
    rows = [f"{index}\t{name}{index}\t{text}\t{index}\t{index % 2}\n" for index in range(4)]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text(HEADER + "".join(rows), encoding="utf-8")
    run = command("--pooling=generalized", "--epochs=1")
    assert {"attention.png", "summary.json"} <= names(run)


def test_the_smallest_files(plotless, tmp_path):
    """One pair in each, of one character: a batch of one, a class without a pair."""
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text(HEADER + "0\tz\ta\tb\t1\n")
    summary = json.loads(read(plotless("--pooling=max") / "summary.json"))
    assert summary["dev_accuracy"] in (0, 1)
    assert summary["dev_majority_class"] == 1


def test_skipped_and_truncated_pairs_are_noted(plotless, tmp_path, capsys):
    """The report dropped them silently: the screen counts them and names their lines."""
    rows = "8\ta\t\ty\t1\n" + f"9\tb\t{'z' * 200}\ty\t1\n"
    (tmp_path / "dev.csv").write_text(table("dev", 4) + rows)
    plotless("--epochs=0")
    out = capsys.readouterr().out
    assert re.search(r"dev\.csv: 1 pairs are skipped.* \(first lines: 6\)", out)
    assert re.search(r"dev\.csv: 1 pairs are truncated \(first lines: 7\)", out)


def test_one_file_for_every_split(plotless, tmp_path):
    """train, dev and test may be the same file."""
    path = tmp_path / "train.csv"
    run = plotless(f"--para_dev={path}", f"--para_test={path}", "--epochs=1")
    assert read(tmp_path / "dev-out.csv") == read(tmp_path / "test-out.csv")
    assert json.loads(read(run / "summary.json"))["dev_accuracy"] >= 0


def test_two_predictions_with_the_same_file_name(plotless, tmp_path):
    """In different folders: the run keeps both."""
    given = [f"--para_{split}_out={tmp_path / split}/out.csv" for split in ("dev", "test")]
    run = plotless(*given, "--epochs=0")
    for split in ("dev", "test"):
        kept = [read(path) for path in (run / "predictions").iterdir()]
        assert read(tmp_path / split / "out.csv") in kept


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--para_train=x.csv", "--para_dev.*--para_test.*--dataset"),
        ("--para_train=x --para_test=y", "--para_dev"),
        ("--predict_only", "--model"),
        ("--model=x", "--predict_only"),
        ("--pair a b", "--pair .* without --predict_only"),
        ("--predict_only --model=x --pair a b --dataset=verses", "--dataset verses .* --pair"),
        ("--predict_only --model=x --pair a b --para_test_out=y", "--para_test_out y .* --pair"),
        ("--predict_only --model=x --pair a \udcff", "--pair .* is not UTF-8"),
        ("--predict_only --model=x --pair a", "--pair: expected 2"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, named):
    """Half of a data set is not completed with another's files."""
    with pytest.raises(InputError, match=named):
        parse_options(options.split())


def test_an_empty_text_of_a_pair_is_named():
    """Before the model is loaded."""
    with pytest.raises(InputError, match="--pair ' ' is empty"):
        parse_options(["--predict_only", "--model=x", "--pair", "a", " "])


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--epochs=-1", "epochs"),
        ("--lr=0", "lr"),
        ("--model_size=absent", "absent"),
        ("--para_test=absent.csv", r"absent\.csv.*check the path"),
        ("--attention_penalty=nan", "attention_penalty"),
        ("--parameter_penalty=-1", "parameter_penalty"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(plotless, tmp_path, option, named):
    """Before anything is trained or a folder made."""
    with pytest.raises(InputError, match=named):
        plotless("--pooling=multihead", "--epochs=1", option)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("dataset", "script"),
    [("quora", "data/download_quora.py"), ("verses", "data/build/verses.py")],
)
def test_a_missing_data_set_names_the_script_that_makes_it(
    monkeypatch, model, tmp_path, dataset, script
):
    """In a fresh clone, before the files are made."""
    monkeypatch.setattr(paraphrase_detection, "ROOT", tmp_path)
    named = f"{dataset}-train.csv cannot be read.*python {script} makes it"
    with pytest.raises(InputError, match=named):
        main(parse_options([f"--dataset={dataset}", f"--model_size={model}", "--device=cpu"]))


def test_a_file_of_the_user_is_made_by_no_script(plotless):
    """A mistyped --para_test beside --dataset: check the path."""
    with pytest.raises(InputError, match=r"absent\.csv.*check the path"):
        plotless("--dataset=verses", "--para_test=absent.csv")


def test_files_of_a_data_set_and_of_the_user():
    """The default is verses; the user's files replace all three or, with --dataset, some."""

    def chosen(*options):
        options = parse_options([*options])
        paths = (options.para_train, options.para_dev, options.para_test)
        return options.dataset, *(Path(path).name for path in paths)

    assert chosen() == ("verses", "verses-train.csv", "verses-dev.csv", "verses-test.csv")
    report = chosen("--preset=report")
    assert report == ("quora", "quora-train.csv", "quora-dev.csv", "quora-test-student.csv")
    some = chosen("--dataset=quora", "--para_train=x.csv")
    assert some == ("quora", "x.csv", "quora-dev.csv", "quora-test-student.csv")
    assert chosen("--para_train=x", "--para_dev=y", "--para_test=z") == ("files", "x", "y", "z")


@pytest.mark.parametrize("task", ["sonnets", "paraphrases"])
@METHODS
def test_a_default_does_not_depend_on_how_the_model_is_spelled(tmp_path, monkeypatch, task, method):
    """tiny, the path of its folder and a copy of the folder get the same learning rate."""
    bundled = ROOT / "data" / "tiny-gpt2"
    shutil.copytree(bundled, tmp_path / "mine")
    monkeypatch.chdir(ROOT)
    module = {"sonnets": sonnet_generation, "paraphrases": paraphrase_detection}[task]
    defaults = set()
    for name in ("tiny", "data/tiny-gpt2", str(bundled), str(tmp_path / "mine")):
        options = module.parse_options([*method, f"--model_size={name}"])
        defaults.add((options.lr, getattr(options, "pair_encoding", None)))
    expected = {
        "sonnets": ({(): 1e-4, ("--use_lora",): 1e-3}[method], None),
        "paraphrases": ({(): 5e-4, ("--use_lora",): 2e-3}[method], "separate"),
    }
    assert defaults == {expected[task]}
    other = module.parse_options([*method, "--model_size=gpt2"])
    assert other.lr == (2e-4 if method else 5e-5)
    assert getattr(other, "pair_encoding", "joint") == "joint"


def test_a_run_as_a_process(plotless, files, model, tmp_path):
    """With warnings as errors: nothing on stderr, and the same predictions as in this process."""
    plotless("--pooling=generalized")
    before = read(tmp_path / "test-out.csv")
    options = [*files, f"--model_size={model}", "--batch_size=4", "--epochs=2", "--lr=0.005"]
    options += ["--device=cpu", "--dtype=float32", "--pair_encoding=joint", "--pooling=generalized"]
    command = [sys.executable, "-W", "error", "paraphrase_detection.py", *options]
    command += [f"--out_dir={tmp_path / 'other'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert read(tmp_path / "test-out.csv") == before
