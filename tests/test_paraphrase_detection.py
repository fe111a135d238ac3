"""The user's command for pairs: what a run leaves, predicts again and resumes to, and what is refused."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluation
import figures
import paraphrase_detection
from config import InputError, Interrupted
from datasets import PairsDataset
from models.gpt2 import GPT2Model
from models.hugging_face import read_config
from models.paraphrase_gpt import ParaphraseGPT
from paraphrase_detection import as_file, main, parse_options
from pooling import POOLINGS

ROOT = Path(__file__).resolve().parent.parent
TIMED = {"seconds", "tokens_per_second", "peak_memory_gb"}
HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"
FIGURES = {"loss", "accuracy", "macro_f1", "word_overlap_accuracy", "no_judged_no", "no_judged_yes", "yes_judged_no",
           "yes_judged_yes"}  # fmt: skip
SUMMARY = {
    "task", "model", "method", "seed", "dataset", "pooling", "pair_encoding", "trainable_parameters",
    "total_parameters", "epochs", "best_epoch", "first_train_loss", "final_train_loss", "best_dev_loss",
    "train_seconds", "seconds_per_epoch", "tokens_per_second", "peak_memory_gb",
}  # fmt: skip
LORA = pytest.mark.parametrize("method", [(), ("--use_lora",)], ids=["full", "lora"])


def table(split, rows, labelled=True):
    """Pairs of a split, every second one of texts that are alike."""
    lines = (f"{row}\t{split}-{row}\tthy {'brow ' * (row % 3)}{row}\t{'thy' if row % 2 else 'z'} {row}\t{row % 2}.0\n"
             for row in range(rows))  # fmt: skip
    text = HEADER + "".join(lines)
    return text if labelled else re.sub(r"\t[^\t]*\n", "\n", text)


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """The tiny folder with 128 positions instead of 64, which the prompt alone exceeds; its dropout is 0.1."""
    gpt = GPT2Model.from_pretrained(folder)
    gpt.config = dataclasses.replace(gpt.config, positions=128)
    torch.manual_seed(0)
    gpt.position_embedding = torch.nn.Embedding(128, gpt.config.width)
    path = tmp_path_factory.mktemp("long")
    gpt.save_pretrained(path)
    assert read_config(path).dropout == 0.1
    return path


@pytest.fixture
def files(tmp_path):
    """Options that name train, dev and test files of 10, 6 and 5 pairs, and where predictions go."""
    for split, rows in (("train", 10), ("dev", 6), ("test", 5)):
        (tmp_path / f"{split}.csv").write_text(table(split, rows))
    given = [f"--para_{split}={tmp_path / split}.csv" for split in ("train", "dev", "test")]
    return [*given, *(f"--para_{split}_out={tmp_path / split}-out.csv" for split in ("dev", "test"))]


@pytest.fixture
def command(model, files, tmp_path):
    """Run the script in this process on these; further options may override."""
    common = [f"--model_size={model}", "--batch_size=4", "--epochs=2", "--lr=0.005", "--device=cpu", "--dtype=float32"]

    def run(*options, out="run"):
        main(parse_options([*files, *common, f"--out_dir={tmp_path / out}", *options]))
        return tmp_path / out

    return run


@pytest.fixture
def undrawn(command, monkeypatch):
    """The same without its figures, which take longer than all the rest."""
    for name in ("draw_curves", "draw_attention"):
        monkeypatch.setattr(figures, name, lambda path, *what: None)
    return command


def written(path):
    return path.read_text(encoding="utf-8")


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


KINDS = [
    (), ("--pooling=generalized", "--use_lora"), ("--pooling=max", "--dtype=bfloat16"),
    ("--pooling=multihead", "--vector_penalty=0.1", "--pair_encoding=separate", "--use_lora", "--dtype=bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=" ".join)
def test_a_run_leaves_what_it_should(command, tmp_path, capsys, options):
    """Every file of the design; attention.png only where a pooling learns what to look at; figures for both splits."""
    run = command(*options)
    lora = "--use_lora" in options
    learned = any(option in ("--pooling=generalized", "--pooling=multihead") for option in options)
    expected = {"config.json", "metrics.csv", "summary.json", "errors.md", "curves.png", "resume/state.pt"}
    expected |= {f"predictions/para-{split}-output.csv" for split in ("dev", "test")} | {"best/head.safetensors"}
    expected |= {"attention.png"} if learned else set()
    assert names(run) >= expected
    assert (run / "attention.png").exists() == learned
    assert (run / "best" / "adapter_model.safetensors").exists() == lora
    assert (run / "best" / "model.safetensors").exists() != lora
    summary = json.loads(written(run / "summary.json"))
    assert summary.keys() == SUMMARY | {f"{split}_{name}" for split in ("dev", "test") for name in FIGURES}
    assert (summary["trainable_parameters"] < summary["total_parameters"]) == lora
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    if "--dtype=bfloat16" not in options:  # in which sums depend on how they are cut
        assert float(rows[summary["best_epoch"] - 1]["dev_accuracy"]) == summary["dev_accuracy"]
        assert float(rows[summary["best_epoch"] - 1]["dev_loss"]) == pytest.approx(summary["dev_loss"], rel=1e-5)
    assert len(json.loads(written(run / "config.json"))["data_sha256"]) == 3
    for split, count in (("dev", 6), ("test", 5)):
        text = written(tmp_path / f"{split}-out.csv")
        assert text == written(run / "predictions" / f"para-{split}-output.csv")
        head, *lines = text.split("\n")
        assert head == "id \t Predicted_Is_Paraphrase "
        assert [re.fullmatch(r"(\S+), [01] ", line)[1] for line in lines[:-1]] == [f"{split}-{n}" for n in range(count)]
        assert lines[-1] == ""
    screen = capsys.readouterr().out
    assert "(10 train, 6 dev, 5 test)" in screen
    assert "word overlap" in screen


def test_predictions_in_the_courses_format():
    """Byte for byte what its evaluation reads: spaces before the line ends, too."""
    text = as_file(["b", "a"], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert text == "id \t Predicted_Is_Paraphrase \nb, 1 \na, 0 \n"


def test_errors_are_the_pairs_judged_wrong(undrawn, tmp_path):
    """As many as the confusion counts say, with the texts, ids and lines of the file."""
    run = undrawn("--epochs=1")
    summary = json.loads(written(run / "summary.json"))
    wrong = summary["dev_no_judged_yes"] + summary["dev_yes_judged_no"]
    text = written(run / "errors.md")
    assert text.startswith(f"# {wrong} of 6 dev pairs judged wrong")
    judged = dict(re.findall(r"(\S+), ([01]) ", written(tmp_path / "dev-out.csv")))
    texts = [f"thy {'brow ' * (row % 3)}{row}" for row in range(6)]
    blocks = re.findall(r"says (no|yes) .*label (no|yes)\*\* \(id (\S+), line (\d)\)\n\n1\. (.*)\n", text)
    mistakes = {row for row in range(6) if int(judged[f"dev-{row}"]) != row % 2}
    assert {int(line) - 2 for *_, line, _ in blocks} == mistakes
    for said, gold, name, line, sentence in blocks:
        row = int(line) - 2
        assert (name, sentence) == (f"dev-{row}", texts[row])
        assert (said, gold) == (("yes", "no") if row % 2 == 0 else ("no", "yes"))


def test_errors_begin_with_those_of_the_most_confidence(tmp_path, gpt):
    """Ten at most; what was judged right is not among them."""
    (tmp_path / "dev.csv").write_text(table("dev", 14))
    data = PairsDataset(tmp_path / "dev.csv", gpt, "separate")
    margins = torch.tensor([9.0, 0.5, 1.5, 3.0, 0.1, 2.0, 0.3, 1.0, 0.7, 2.5, 0.2, 0.6, 0.4, 9.0])
    right = torch.tensor([1] + [-1] * 12 + [1])
    logits = torch.stack([torch.zeros(14), margins * right * (2 * data.labels - 1)], 1)
    text = paraphrase_detection.errors(logits, data)
    assert text.startswith("# 12 of 14 dev pairs judged wrong")
    expected = [3, 9, 5, 2, 7, 8, 11, 1, 12, 6]
    assert re.findall(r"\(id (\S+), line (\d+)\)", text) == [(f"dev-{row}", str(row + 2)) for row in expected]
    assert "**says no (95.3%), label yes** (id dev-3" in text  # 1 / (1 + e^-3)


def test_every_epoch_has_an_order_of_its_own(undrawn, monkeypatch):
    """All ten training pairs, an epoch, in an order that the next one does not repeat."""
    collate, made = PairsDataset.collate, []
    monkeypatch.setattr(PairsDataset, "collate", lambda self, rows: made.append(rows) or collate(self, rows))
    undrawn()
    first, second = ([row for batch in made[start : start + 3] for row in batch] for start in (0, 4))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_best_epoch_is_the_first_of_the_largest_dev_accuracy(undrawn, monkeypatch):
    """Not of the smallest, nor of the smallest loss; the figures then are those of best/."""
    right = iter([3, 5, 5, 4, 5, 5])  # of 6: four epochs, then dev and test with best/

    def classify(model, data):
        answers = data.labels.clone()
        answers[next(right) :] ^= 1
        return torch.nn.functional.one_hot(answers, 2).float()

    monkeypatch.setattr(evaluation, "classify", classify)
    summary = json.loads(written(undrawn("--epochs=4") / "summary.json"))
    assert (summary["best_epoch"], summary["dev_accuracy"]) == (2, 5 / 6)


def test_test_pairs_may_be_unlabelled(undrawn, tmp_path, capsys):
    """Predictions, and no figures that nobody can know; dev must be labelled."""
    (tmp_path / "test.csv").write_text(table("test", 5, labelled=False))
    summary = json.loads(written(undrawn("--epochs=1") / "summary.json"))
    assert not [name for name in summary if name.startswith("test")]
    assert written(tmp_path / "test-out.csv").count("\n") == 6
    assert re.search(r"\n +dev\n", capsys.readouterr().out)
    (tmp_path / "dev.csv").write_text(table("dev", 5, labelled=False))
    with pytest.raises(InputError, match=r"dev\.csv has no column is_duplicate"):
        undrawn(out="other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("method", "pair_encoding"), [((), "joint"), (("--use_lora",), "separate")], ids=["full", "lora"]
)
def test_the_best_model_predicts_the_same_again(undrawn, model, files, tmp_path, method, pair_encoding):
    """--predict_only with best/ alone: pooling and encoding are the model's, whatever the options' defaults are."""
    best = undrawn(*method, "--pooling=multihead", f"--pair_encoding={pair_encoding}") / "best"
    before = [written(tmp_path / f"{split}-out.csv") for split in ("dev", "test")]
    for split in ("dev", "test"):
        (tmp_path / f"{split}-out.csv").unlink()
    base = [f"--model_size={model}"] if method else []
    main(parse_options([*files[1:], "--predict_only", f"--model={best}", *base, "--device=cpu", "--dtype=float32"]))
    assert [written(tmp_path / f"{split}-out.csv") for split in ("dev", "test")] == before


def test_predicting_needs_no_training_pairs(files):
    """dev and test are all that --predict_only reads."""
    options = parse_options([*files[1:], "--predict_only", "--model=somewhere"])
    assert options.para_dev.endswith("dev.csv")


class Crash(Exception):  # noqa: N818 (stands for a kill, which is no error of the program's)
    """What a kill looks like from inside the loop."""


def crash():
    raise Crash


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def left_behind(run):
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]
    kept = [*sorted((run / "best").iterdir()), *sorted((run / "predictions").iterdir()), run / "errors.md"]
    return rows, {path.name: path.read_bytes() for path in kept}


@LORA
def test_cut_off_and_resumed_equals_uninterrupted(undrawn, monkeypatch, method):
    """In an epoch's second step, the next epoch, the last evaluation or by Ctrl-C: the same files, dropout on."""
    options = [*method, "--pooling=generalized", "--checkpoint_every=2"]
    whole = left_behind(undrawn(*options, out="whole"))
    collate = PairsDataset.collate
    for event, at in ((crash, 1), (crash, 6), (crash, 9), (interrupt, 5)):  # an epoch: 3 batches to train on, 1 of dev
        made = []

        def counting(self, rows, made=made, event=event, at=at):
            made.append(rows)
            if len(made) == at + 1:
                event()
            return collate(self, rows)

        monkeypatch.setattr(PairsDataset, "collate", counting)
        with pytest.raises((Crash, Interrupted)):
            undrawn(*options, out=f"cut-{at}")
        monkeypatch.setattr(PairsDataset, "collate", collate)
        assert len(made) == at + 1
        assert left_behind(undrawn(*options, "--resume", out=f"cut-{at}")) == whole


@pytest.mark.parametrize("options", [
    (), ("--dtype=bfloat16",), ("--use_lora", "--pooling=mean"),
    ("--pooling=multihead",),
    ("--use_lora", "--dtype=bfloat16"),
], ids=" ".join)  # fmt: skip
def test_no_epochs_evaluate_only(undrawn, options):
    """--epochs 0: predictions and figures of the untrained head, no curves, nothing kept as the best."""
    run = undrawn(*options, "--epochs=0")
    summary = json.loads(written(run / "summary.json"))
    assert (summary["epochs"], summary["best_epoch"]) == (0, 0)
    assert 0 <= summary["dev_accuracy"] <= 1
    assert not names(run) & {"metrics.csv", "best/head.safetensors"}


@pytest.mark.parametrize("pooling", ["generalized", "multihead"])
@pytest.mark.parametrize("pair_encoding", ["joint", "separate"])
def test_what_a_pooling_attends_to(command, model, tmp_path, pooling, pair_encoding):
    """Every token of the text and no padding, its weight as a multiple of an even share: 1 on average a text."""
    torch.manual_seed(0)
    judge = ParaphraseGPT(GPT2Model.from_pretrained(model), pooling, pair_encoding).eval()
    data = PairsDataset(tmp_path / "dev.csv", judge.gpt, pair_encoding)
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 1, 1, 0]), 2)  # dev-4 and dev-5 are judged wrong
    examples = paraphrase_detection.attention(judge, data, logits)
    assert [heading for heading, _ in examples] == [
        "dev-1: judged yes, right", "dev-0: judged no, right", "dev-5: judged no, wrong", "dev-4: judged yes, wrong",
    ]  # fmt: skip
    for (_, tokens), row in zip(examples, (1, 0, 5, 4), strict=True):
        texts = data.texts(row)
        assert "".join(token for token, _ in tokens) == "".join(
            judge.gpt.tokenizer.decode(text.tolist(), skip_special_tokens=False) for text in texts
        )
        assert sum(weight for _, weight in tokens) == pytest.approx(sum(map(len, texts)), rel=1e-5)


@pytest.mark.parametrize(("name", "text"), [
    ("b😀", "$x^2$ \\frac{1} 😀 の\u202e"),
    ("$x^$", "z"),
    ("の", "z"),
    ("a", "\x07"),
], ids=ascii)  # fmt: skip
def test_any_text_can_be_drawn(command, tmp_path, name, text):
    """A dollar sign is no formula and a rare character no warning: the run would end before its summary."""
    rows = "".join(f"{row}\t{name}{row}\t{text}\t{row}\t{row % 2}\n" for row in range(4))
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text(HEADER + rows, encoding="utf-8")
    run = command("--pooling=generalized", "--epochs=1")
    assert {"attention.png", "summary.json"} <= names(run)


def test_the_smallest_files(undrawn, tmp_path):
    """One pair in each, of one character: a batch of one, a class without a pair."""
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text(HEADER + "0\tz\ta\tb\t1\n")
    summary = json.loads(written(undrawn("--pooling=max") / "summary.json"))
    assert summary["dev_accuracy"] in (0, 1)
    assert summary["dev_word_overlap_accuracy"] == 1


def test_rows_left_out_and_shortened_are_said(command, tmp_path, capsys):
    """A bare except dropped them unseen: the screen counts them and names their lines."""
    rows = "8\ta\t\ty\t1\n" + f"9\tb\t{'z' * 200}\ty\t1\n"
    (tmp_path / "dev.csv").write_text(table("dev", 4) + rows)
    command("--epochs=0")
    out = capsys.readouterr().out
    assert "dev.csv: 1 of its pairs left out: no sentence or no label (line 6)" in out
    assert "dev.csv: 1 of its pairs shortened to fit (line 7)" in out


def test_the_same_file_for_every_split(undrawn, tmp_path):
    """train, dev and test may be one file."""
    path = tmp_path / "train.csv"
    run = undrawn(f"--para_dev={path}", f"--para_test={path}", "--epochs=1")
    assert written(tmp_path / "dev-out.csv") == written(tmp_path / "test-out.csv")
    assert json.loads(written(run / "summary.json"))["dev_accuracy"] >= 0


@pytest.mark.parametrize(("options", "named"), [
    (["--para_train=x.csv"], "para_dev and --para_test"), (["--para_train=x", "--para_test=y"], "without --para_dev"),
    (["--predict_only"], "--model DIR"), (["--model=x"], "--predict_only"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_named(options, named):
    """No half of a data set is filled up with another's files."""
    with pytest.raises(InputError, match=named):
        parse_options(options)


@pytest.mark.parametrize(("option", "named"), [
    ("--epochs=-1", "epochs"), ("--lr=0", "lr"), ("--model_size=absent", "absent"), ("--device=tpu", "tpu"),
    ("--para_test=absent.csv", r"absent\.csv.*check the path"), ("--dtype=float16", "float16"),
    ("--attention_penalty=nan", "attention_penalty"),
    ("--parameter_penalty=-1", "parameter_penalty"),
])  # fmt: skip
def test_a_value_that_cannot_be_used_is_named(undrawn, tmp_path, option, named):
    """Before anything is trained or a folder made."""
    with pytest.raises(InputError, match=named):
        undrawn("--pooling=multihead", "--epochs=1", option)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("dataset", "maker"), [("quora", "data/download_quora.py"), ("verses", "data/build_verses.py")]
)
def test_a_data_set_that_is_not_there_names_what_makes_it(monkeypatch, model, tmp_path, dataset, maker):
    """In a fresh clone, before the files are made."""
    monkeypatch.setattr(paraphrase_detection, "ROOT", tmp_path)
    with pytest.raises(InputError, match=f"{dataset}-train.csv can't be read.*python {maker} makes it"):
        main(parse_options([f"--dataset={dataset}", f"--model_size={model}", "--device=cpu"]))


def test_a_file_of_the_users_is_made_by_no_script(undrawn):
    """A mistyped --para_test beside --dataset: check the path."""
    with pytest.raises(InputError, match=r"absent\.csv.*check the path"):
        undrawn("--dataset=verses", "--para_test=absent.csv")


def test_files_of_a_data_set_and_of_the_user():
    """The default is verses; files of one's own replace all three or, with --dataset, some."""
    options = parse_options([])
    assert (options.dataset, Path(options.para_dev).name) == ("verses", "verses-dev.csv")
    options = parse_options(["--preset=report"])
    assert (options.dataset, Path(options.para_test).name) == ("quora", "quora-test-student.csv")
    options = parse_options(["--dataset=quora", "--para_train=x.csv"])
    assert (options.para_train, Path(options.para_dev).name) == ("x.csv", "quora-dev.csv")
    options = parse_options(["--para_train=x", "--para_dev=y", "--para_test=z"])
    assert (options.dataset, options.para_train, options.para_dev, options.para_test) == ("files", "x", "y", "z")


def start(*options):
    command = [sys.executable, "paraphrase_detection.py", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_help_names_every_pooling_and_needs_no_torch():
    """--help must appear at once, so the script lists the poolings itself; the two lists must not part."""
    assert tuple(POOLINGS) == paraphrase_detection.POOLINGS
    code, out, err = start("--help")
    assert (code, err) == (0, "")
    assert all(word in out for word in (*POOLINGS, "--pair_encoding", "--para_train", "--predict_only", "--use_lora"))
    probe = "import sys, paraphrase_detection as p; p.parse_options([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(("options", "named"), [
    (["--pooling=median"], "median"), (["--para_train=x.csv"], "--para_dev"), (["--predict_only"], "--model"),
    (["--epochs=many"], "many"), (["--dataset=snli"], "snli"), (["--pooling=max", "--pool=max"], "--pool"),
])  # fmt: skip
def test_bad_options_end_with_a_line_and_2(options, named):
    """The message names the value; no traceback."""
    code, _, err = start(*options)
    assert code == 2
    assert named in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_run_as_a_process(undrawn, files, model, tmp_path):
    """The whole command on its own, with warnings as errors: nothing on stderr, and the same predictions as here."""
    undrawn("--pooling=generalized")
    before = written(tmp_path / "test-out.csv")
    options = [*files, f"--model_size={model}", "--batch_size=4", "--epochs=2", "--lr=0.005", "--device=cpu",
               "--dtype=float32", "--pooling=generalized", f"--out_dir={tmp_path / 'other'}"]  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "error", "paraphrase_detection.py", *options], cwd=ROOT, check=False,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert written(tmp_path / "test-out.csv") == before
