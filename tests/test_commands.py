"""Both commands: what they leave, the course's formats, and that results can be made again."""

import io
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_runs import HEADER, KINDS, SCRIPTS, command, make_files, run

from config import ROOT
from datasets import read_pairs, read_sonnets
from evaluation.metrics import classification_metrics
from evaluation.sonnet_form import chrf
from training.options import train_config

SUMMARY = """
    task model method seed trainable_parameters total_parameters epochs best_epoch first_train_loss
    final_train_loss best_dev_loss train_seconds seconds_per_epoch tokens_per_second peak_memory_gb
    skipped_steps dev_loss test_loss
""".split()
OF_TASK = {
    "sonnets": "base_dev_loss dev_perplexity test_chrf gold_dev_rhymes random_test_lines".split(),
    "paraphrases": "dataset pooling pair_encoding dev_accuracy test_macro_f1".split(),
}
FILES = {"config.json", "metrics.csv", "steps.csv", "summary.json", "per_text.csv", "curves.png"}
FILES |= {"state.pt", ".lock", "best/README.md"}
FAST = ["--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def trained(files):
    """A run of each kind."""
    return {kind: run(files, kind, files / kind) for kind in KINDS}


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_its_files(trained, kind):
    folder, (task, method) = trained[kind], kind.split("-")
    expected = set(FILES)
    if task == "sonnets":
        expected |= {f"predictions/generated_{name}.txt" for name in ("sonnets", "dev_sonnets")}
    else:
        expected |= {f"predictions/para-{split}-output.csv" for split in ("dev", "test")}
        expected |= {"best/head.safetensors", "attention.csv", "attention.png"}
    assert names(folder) >= expected
    weights = "adapter_model" if method == "lora" else "model"
    assert (folder / "best" / f"{weights}.safetensors").exists()
    summary = json.loads(read(folder / "summary.json"))
    assert summary.keys() >= {*SUMMARY, *OF_TASK[task]}
    assert (summary["method"], summary["epochs"], summary["seed"]) == (method, 2, 11711)
    epochs = pd.read_csv(folder / "metrics.csv")
    best = epochs.loc[summary["best_epoch"] - 1]
    assert best["dev_loss"] == pytest.approx(summary["dev_loss"], rel=1e-5)
    card = read(folder / "best" / "README.md")
    mode = {"sonnets": "--generate", "paraphrases": "--predict"}[task]
    assert f"`python {SCRIPTS[task].__name__}.py {mode} {folder}/best" in card
    assert f"| dev_loss | {summary['dev_loss']} |" in card


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_have_the_format_of_the_course(trained, files, kind):
    """Byte by byte; the copies in the run's folder are the same."""
    out, copies = trained[kind], trained[kind] / "predictions"
    if kind.startswith("sonnets"):
        text = read(out.with_suffix(".txt"))
        pattern = "".join(
            rf"\n{n}\n\nFrom fairest\ncreatures\nwe {n}\n[^\n]*(?:\n[^\n]*)*?\n"
            for n in range(1, 6)
        )
        assert re.fullmatch(f"--Generated Sonnets--\n\n{pattern}", text)
        assert read(copies / "generated_sonnets.txt") == text
        assert len(read_sonnets(copies / "generated_dev_sonnets.txt")) == 5
        return
    for split in ("dev", "test"):
        text = read(out.with_name(f"{out.name}-{split}.csv"))
        pattern = "".join(rf"p{n}, [01] \n" for n in range(7))
        assert re.fullmatch(rf"id \t Predicted_Is_Paraphrase \n{pattern}", text)
        assert read(copies / f"para-{split}-output.csv") == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_makes_the_same_predictions_again(trained, files, tmp_path, kind):
    best, copies = trained[kind] / "best", trained[kind] / "predictions"
    if kind.startswith("sonnets"):
        for name, more in (
            ("generated_sonnets.txt", []),
            ("generated_dev_sonnets.txt", ["--max_lines=0"]),
        ):
            given = [f"--generate={best}", f"--held_out_sonnet_path={files / 'sonnets.txt'}"]
            command(
                "sonnets",
                [*given, *more, *FAST, "--max_new_tokens=4", f"--sonnet_out={tmp_path / 'out'}"],
            )
            assert read(tmp_path / "out") == read(copies / name)
        return
    given = [f"--predict={best}", *FAST]
    given += [f"--para_{split}={files / 'pairs.csv'}" for split in ("dev", "test")]
    command(
        "paraphrases",
        [*given, *(f"--para_{split}_out={tmp_path / split}" for split in ("dev", "test"))],
    )
    for split in ("dev", "test"):
        assert read(tmp_path / split) == read(copies / f"para-{split}-output.csv")


def test_own_prompts_are_continued(trained, monkeypatch, capsys):
    """Also from standard input, as an editor saved it; nothing is written."""
    before = names(trained["sonnets-lora"].parent)
    given = [f"--generate={trained['sonnets-lora'] / 'best'}", *FAST, "--max_new_tokens=5"]
    stdin = io.TextIOWrapper(io.BytesIO("\ufeffthy brow\r\n".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    command("sonnets", [*given, "--prompt=From", "--prompt=-", "--num_samples=1"])
    out = capsys.readouterr().out
    assert re.fullmatch(r"(?s)From.+\n\nthy brow\n.+\n", out)
    command("sonnets", [*given, "--prompt=From", "--num_samples=3"])
    texts = capsys.readouterr().out.strip("\n").split("\n\n")
    assert len(set(texts)) == 3
    assert out.startswith(texts[0])  # the first sample does not depend on the others
    command("sonnets", [*given, "--prompt=From", "--temperature=0", "--repetition_penalty=99"])
    command("sonnets", [*given, "--prompt=From", "--temperature=0"])
    assert len(set(capsys.readouterr().out.split("\n"))) >= 2
    assert names(trained["sonnets-lora"].parent) == before


def test_a_prompt_with_all_lines_is_noted(trained, capsys):
    given = [f"--generate={trained['sonnets-full'] / 'best'}", *FAST, "--max_new_tokens=3"]
    prompt = f"--prompt={'a' + chr(10)}" + "b\n" * 13
    command("sonnets", [*given, prompt])
    assert "note: 1 texts got no new words: --max_lines 14 counts" in capsys.readouterr().err
    command("sonnets", [*given, prompt, "--max_lines=0"])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("a\n" + "b\n" * 13)


def test_own_pairs_are_classified(trained, files, capsys):
    """As a file is; a learned pooling shows its largest weights."""
    pairs = read_pairs(files / "pairs.csv")[["sentence1", "sentence2"]].values.tolist()
    given = [f"--predict={trained['paraphrases-full'] / 'best'}", *FAST]
    command("paraphrases", [*given, *(word for pair in pairs for word in ("--pair", *pair))])
    lines = capsys.readouterr().out.splitlines()
    table = read(trained["paraphrases-full"] / "predictions" / "para-dev-output.csv")
    for line, (first, second), answer in zip(
        lines[::2], pairs, re.findall(", ([01])", table), strict=True
    ):
        word, probability, texts = re.fullmatch(r"(\w+) \(probability (.*)\): (.*)", line).groups()
        assert (word, texts) == (("no", "yes")[int(answer)], f"{first} | {second}")
        assert 0.5 <= float(probability) <= 1
    assert all(
        re.match(r"largest token weights \(1 is the mean\): '.+' \d\.\d\d, ", line)
        for line in lines[1::2]
    )


def test_generated_sonnets_are_scored(files, tmp_path, capsys):
    """chrf_with_prompt is sacrebleu's alone, over whole sonnets; ids may be in any order."""
    dev = ROOT / "data" / "Shakespeare_Sonnets_dev.csv"
    gold = read_sonnets(dev)["text"].tolist()
    texts = [text.replace("thou", "you").replace("love", "hate") for text in gold]
    blocks = [
        f"\n{number}\n\n{text}\n" for number, text in zip(range(132, 144), texts, strict=True)
    ]
    (tmp_path / "out.txt").write_text("".join(reversed(blocks)))
    command("sonnets", [f"--score={tmp_path / 'out.txt'}", f"--held_out_sonnet_path={dev}"])
    table = capsys.readouterr().out
    assert f" {chrf(texts, gold):.3f} " in re.search(r"chrf_with_prompt.*", table)[0] + " "
    assert re.search(r"\nlines +14.000 +14.000", table)


def test_predictions_are_scored(trained, files, tmp_path, capsys):
    """Also with the tokens of no and yes, 3919 and 8505, as the course's code may write."""
    (tmp_path / "out.csv").write_text(
        "id \t x \n" + "".join(f"p{n}, {[1, 0, 3919, 8505][n % 4]} \n" for n in range(7))
    )
    command("paraphrases", [f"--score={tmp_path / 'out.csv'}", f"--para_dev={files / 'pairs.csv'}"])
    table = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    predicted, labels = torch.tensor([1, 0, 0, 1, 1, 0, 0]), torch.arange(7) % 2
    expected = classification_metrics(predicted, labels)
    assert {name: float(value) for name, value in table.items()} == pytest.approx(
        expected, abs=6e-4
    )


@pytest.fixture
def plotless(monkeypatch):
    monkeypatch.setattr("training.setup.draw_curves", lambda *_: None)
    monkeypatch.setattr(SCRIPTS["paraphrases"], "draw_attention", lambda *_: None)


def test_a_frozen_gpt_is_not_changed(files, tmp_path, plotless):
    """--freeze_gpt trains pooling and head."""
    folder = run(files, "paraphrases-full", tmp_path / "run", "--freeze_gpt")
    saved, original = (
        load_file(path / "model.safetensors") for path in (folder / "best", files / "model")
    )
    assert all(torch.equal(saved[name], original[name]) for name in original)
    heads = [
        run(files, "paraphrases-full", tmp_path / n, "--freeze_gpt", f"--lr={n}")
        for n in ("1e-12", "0.1")
    ]
    one, other = (load_file(head / "best" / "head.safetensors") for head in heads)
    assert not any(
        torch.equal(one[name], other[name]) for name in one if name != "pooling.score.bias"
    )
    assert json.loads(read(folder / "summary.json"))["method"] == "frozen"


@pytest.mark.parametrize("kind", KINDS)
def test_no_epochs_only_evaluate(files, tmp_path, kind):
    folder = run(files, kind, tmp_path / "run", "--epochs=0")
    summary = json.loads(read(folder / "summary.json"))
    assert (summary["epochs"], summary["best_epoch"]) == (0, 0)
    if kind.startswith("sonnets"):
        assert summary["dev_loss"] == summary["base_dev_loss"]
    assert not {"metrics.csv", "curves.png", "best/README.md"} & names(folder)


def test_an_adapter_is_trained_further(trained, files, tmp_path, plotless):
    """--model_size ADAPTER --use_lora starts where the adapter ended; without, it is merged."""
    best = trained["sonnets-lora"] / "best"
    for more, method in (([], "lora"), (["--lr=1e-9"], "full")):
        kind = f"sonnets-{method}"
        folder = run(files, kind, tmp_path / method, f"--model_size={best}", "--epochs=1", *more)
        summary = json.loads(read(folder / "summary.json"))
        before = json.loads(read(trained["sonnets-lora"] / "summary.json"))
        assert summary["base_dev_loss"] == pytest.approx(before["dev_loss"], rel=1e-5)
    assert (tmp_path / "lora" / "best" / "adapter_model.safetensors").exists()
    assert json.loads(read(tmp_path / "lora" / "best" / "adapter_config.json"))[
        "base_model_name_or_path"
    ] == str(files / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_plain_equals_default(files, tmp_path, plotless, kind):
    """speed/ changes no result; also --dropout replaces the rates of the model's config.json."""
    given = ["--dropout=0", "--lora_dropout=0"]
    one = run(files, kind, tmp_path / "one", *given)
    other = run(files, kind, tmp_path / "other", *given, "--plain")
    steps = [pd.read_csv(folder / "steps.csv") for folder in (one, other)]
    pd.testing.assert_frame_equal(*steps, rtol=1e-5)
    dropped = run(files, kind, tmp_path / "dropped", *given[1:], "--dropout=0.5")
    assert (pd.read_csv(dropped / "steps.csv")["loss"] != steps[0]["loss"]).all()


def test_a_skipped_pair_gets_the_majority_of_dev(files, tmp_path, plotless, capsys):
    """The report dropped such pairs; every id of the file is predicted, and a note names lines."""
    (tmp_path / "dev.csv").write_text(HEADER + "a\tx\ty\t1\nb\tz\tw\t1\nc\tv\tu\t0\n")
    (tmp_path / "test.csv").write_text("id\tsentence1\tsentence2\na\tx\ty\nb\t\tw\nc\tv\tu \n")
    more = [f"--para_{split}={tmp_path / split}.csv" for split in ("dev", "test")]
    folder = run(files, "paraphrases-full", tmp_path / "run", *more, "--epochs=0")
    assert [
        line.split(",")[0] for line in read(tmp_path / "run-test.csv").splitlines()[1:]
    ] == list("abc")
    assert "b, 1 \n" in read(tmp_path / "run-test.csv")
    note = "note: 1 test pairs are skipped, because a text or the label is missing (first lines: 3)"
    assert note in capsys.readouterr().out
    assert not [
        name for name in json.loads(read(folder / "summary.json")) if name.startswith("test")
    ]


def test_any_text_can_be_drawn(files, tmp_path):
    """A dollar sign is no formula, and a character that the font lacks is no warning."""
    rows = [f"{n}\tb😀$x^\t$x^2$ \\frac{{1}} の\u202e\t{n % 2}\n" for n in range(4)]
    (tmp_path / "pairs.csv").write_text(HEADER + "".join(rows), encoding="utf-8")
    more = [f"--para_{split}={tmp_path / 'pairs.csv'}" for split in ("train", "dev", "test")]
    folder = run(files, "paraphrases-full", tmp_path / "run", "--epochs=1", *more)
    assert (folder / "attention.png").exists()


@pytest.mark.parametrize("task", SCRIPTS)
def test_the_options_of_the_course(task, tmp_path, monkeypatch):
    """And the preset's values: those of the report, which other options override."""
    parse = SCRIPTS[task].parse_options
    course = "--epochs 2 --use_gpu --seed 1 --batch_size 4 --lr 0.1 --model_size gpt2"
    course += " --sonnet_path a --held_out_sonnet_path b --sonnet_out c --temperature 1 --top_p 0.5"
    if task == "paraphrases":
        course = course[: course.index(" --sonnet_path")]
        course += " --para_train a --para_dev b --para_test c --para_dev_out d --para_test_out e"
    options = parse(course.split())
    assert (options.epochs, options.lr, options.seed, options.model_size) == (2, 0.1, 1, "gpt2")
    report = parse(["--preset=report", "--seed=5"])
    assert (report.model_size, report.batch_size, report.seed, report.patience) == ("gpt2", 8, 5, 3)
    assert (report.schedule, report.warmup, report.max_grad_norm) == ("constant", 0, 0)
    config = train_config(report, SCRIPTS[task].TINY_RATES)
    assert (config.epochs, config.lr) == ({"sonnets": 10, "paraphrases": 3}[task], 1e-5)
    lora = train_config(parse(["--preset=report", "--use_lora"]), SCRIPTS[task].TINY_RATES)
    assert lora.lr == 1e-4
    if task == "sonnets":
        assert (report.temperature, report.top_p) == (1.2, 0.9)
    else:
        assert (report.dataset, report.pair_encoding, report.pooling) == ("quora", "joint", "last")


def test_defaults_do_not_depend_on_how_the_model_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for task, rate, encoding in (("sonnets", 1e-3, None), ("paraphrases", 2e-3, "separate")):
        for name in ("tiny", "data/tiny-gpt2", str(ROOT / "data" / "tiny-gpt2")):
            options = SCRIPTS[task].parse_options(["--use_lora", f"--model_size={name}"])
            assert train_config(options, SCRIPTS[task].TINY_RATES).lr == rate
            assert vars(options).get("pair_encoding") == encoding
    options = SCRIPTS["paraphrases"].parse_options(
        ["--model_size=gpt2", "--dataset=quora", "--para_train=x"]
    )
    assert train_config(options, SCRIPTS["paraphrases"].TINY_RATES).lr == 5e-5
    assert (options.pair_encoding, options.para_train) == ("joint", "x")
    assert options.para_test == str(ROOT / "data" / "quora-test-student.csv")


def test_a_run_as_a_process_in_another_folder(tmp_path):
    """With the bundled model, warnings as errors, and a plotting backend that is not there."""
    sonnets = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_train.csv")[:4]
    sonnets.to_csv(tmp_path / "sonnets.csv", index=False)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import sonnet_generation as s\ns.main(s.parse_options(sys.argv[1:]))"
    )
    given = [f"--{name}=sonnets.csv" for name in SCRIPTS["sonnets"].FILES.values()]
    given += ["--epochs=1", "--use_lora", "--out_dir=run", "--max_new_tokens=9"]
    process = [sys.executable, "-W", "error", "-c", code, *given]
    environment = {
        "MPLBACKEND": "module://not_there",
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    summary = json.loads(read(tmp_path / "run" / "summary.json"))
    assert summary["trainable_parameters"] == 36864
    assert summary["dev_loss"] < summary["base_dev_loss"]
    assert {"curves.png", "best/adapter_model.safetensors"} <= names(tmp_path / "run")
    assert (tmp_path / "predictions" / "generated_sonnets.txt").exists()
