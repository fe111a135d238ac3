"""Both commands: what they leave, the course's formats, and that results can be made again."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_runs import HEADER, KINDS, SCRIPTS, arguments, command, make_files, run

from config import ROOT, InputError, TrainConfig
from datasets import read_pairs, read_sonnets
from evaluation.metrics import classification_metrics
from evaluation.sonnet_form import chrf
from models.adapters import load_model
from training.options import from_options

SUMMARY = """
    task model method seed trainable_parameters total_parameters epochs best_epoch first_train_loss
    final_train_loss best_dev_loss train_seconds seconds_per_epoch tokens_per_second peak_memory_gb
    dev_loss test_loss
""".split()
OF_SONNETS = "base_dev_loss dev_perplexity test_chrf gold_dev_rhymes random_test_lines".split()
OF_PAIRS = "dataset pooling pair_encoding dev_accuracy test_macro_f1".split()
FILES = {"config.json", "metrics.csv", "steps.csv", "summary.json", "per_text.csv", "curves.png"}
FILES |= {"state.pt", "best/README.md"}
FAST = ["--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def trained(files):
    """A run of each kind, with plots."""
    for kind in KINDS:
        command(kind.split("-")[0], arguments(files, kind, files / kind))
    return {kind: files / kind for kind in KINDS}


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read(path):
    return path.read_text(encoding="utf-8")


def summary_of(folder):
    return json.loads(read(folder / "summary.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_its_files(trained, kind):
    folder, (task, method) = trained[kind], kind.split("-")
    weights = {"full": "best/model.safetensors", "lora": "best/adapter_model.safetensors"}
    expected = FILES | {weights[method]}
    if task == "paraphrases":
        expected |= {"best/head.safetensors"}
    assert names(folder) >= expected
    assert not names(folder) & set(weights.values()) - expected
    summary = summary_of(folder)
    assert summary.keys() >= {*SUMMARY, *(OF_SONNETS if task == "sonnets" else OF_PAIRS)}
    assert (summary["method"], summary["epochs"], summary["seed"]) == (method, 2, 11711)
    best = pd.read_csv(folder / "metrics.csv").loc[summary["best_epoch"] - 1]
    assert best["dev_loss"] == pytest.approx(summary["dev_loss"], rel=1e-5)
    card = read(folder / "best" / "README.md")
    mode = {"sonnets": "--generate", "paraphrases": "--predict"}[task]
    assert f"    python {SCRIPTS[task].__name__}.py {mode} {folder}/best" in card
    assert re.search(rf"\| dev_loss +\| {summary['dev_loss']} ", card)


@pytest.mark.parametrize("kind", ["sonnets-full", "sonnets-lora"])
def test_sonnets_have_the_format_of_the_course(trained, files, tmp_path, kind):
    """Byte by byte; the copy in the run's folder is the same, and best/ makes both again."""
    copies = trained[kind] / "predictions"
    text = read(files / f"{kind}-out" / "generated_sonnets.txt")
    sonnet = "\n{0}\n\nFrom fairest\ncreatures\nwe {0}\n[^\0]*?\n"
    blocks = "".join(sonnet.format(number) for number in range(1, 6))
    assert re.fullmatch(f"--Generated Sonnets--\n\n{blocks}", text)
    assert read(copies / "generated_sonnets.txt") == text
    given = [f"--generate={trained[kind] / 'best'}", *FAST, "--max_new_tokens=4"]
    given += [f"--held_out_sonnet_path={files / 'sonnets.txt'}", f"--sonnet_out={tmp_path / 'out'}"]
    command("sonnets", given)
    assert read(tmp_path / "out") == text


@pytest.mark.parametrize("kind", ["paraphrases-full", "paraphrases-lora"])
def test_predictions_have_the_format_of_the_course(trained, files, tmp_path, capsys, kind):
    """The same; --pair answers as well."""
    best, copies = f"--predict={trained[kind] / 'best'}", trained[kind] / "predictions"
    given = [f"--para_{split}={files / 'pairs.csv'}" for split in ("dev", "test")]
    given += [f"--para_{split}_out={tmp_path / split}" for split in ("dev", "test")]
    command("paraphrases", [best, *given, *FAST])
    for split in ("dev", "test"):
        text = read(files / f"{kind}-out" / f"para-{split}-output.csv")
        lines = "".join(f"p{number}, [01] \n" for number in range(7))
        assert re.fullmatch(f"id \t Predicted_Is_Paraphrase \n{lines}", text)
        assert text == read(copies / f"para-{split}-output.csv") == read(tmp_path / split)
    pairs = read_pairs(files / "pairs.csv")[["sentence1", "sentence2"]].values.tolist()
    capsys.readouterr()
    command("paraphrases", [best, *FAST, *(w for pair in pairs for w in ("--pair", *pair))])
    lines = capsys.readouterr().out.splitlines()
    for line, pair, answer in zip(lines, pairs, re.findall(", ([01])", text), strict=True):
        word = ("no", "yes")[int(answer)]
        assert re.fullmatch(
            rf"{word} \(probability of yes [01]\.\d+\): {re.escape(' | '.join(pair))}", line
        )


def test_own_prompts_are_continued(trained, capsys):
    """Nothing is written."""
    before = names(trained["sonnets-lora"].parent)

    def texts(*more):
        given = [f"--generate={trained['sonnets-lora'] / 'best'}", *FAST, "--max_new_tokens=9"]
        command("sonnets", [*given, *more])
        return capsys.readouterr().out.removesuffix("\n").split("\n\n")

    first, second = texts("--prompt=From", "--prompt=thy brow\n", "--top_k=1")
    assert (first[:4], second[:9], len(second) > 10) == ("From", "thy brow\n", True)
    samples = texts(*["--prompt=From"] * 3)
    assert len(set(samples)) == 3
    assert texts("--prompt=From") == samples[:1]  # the other samples do not change it
    assert texts("--prompt=" + "a\n" * 14, "--max_lines=0")[0].startswith("a\n" * 14)
    assert names(trained["sonnets-lora"].parent) == before


def test_files_are_scored(files, tmp_path, capsys):
    """chrf_with_prompt is chrF over whole sonnets; 3919 and 8505 are the tokens of no and yes."""
    dev, out = ROOT / "data" / "Shakespeare_Sonnets_dev.csv", tmp_path / "out.txt"
    gold = read_sonnets(dev)["text"].tolist()
    texts = [text.replace("thou", "you").replace("love", "hate") for text in gold]
    blocks = [f"\n{n}\n\n{text}\n" for n, text in zip(range(132, 144), texts, strict=True)]
    out.write_text("".join(reversed(blocks)))
    command("sonnets", [f"--score={out}", f"--held_out_sonnet_path={dev}"])
    assert re.search(rf"\nchrf_with_prompt +{chrf(texts, gold):.3f} ", capsys.readouterr().out)
    answers = [1, 0, 3919, 8505, 1, 0, 3919]
    out.write_text("id\n" + "".join(f"p{n}, {answer} \n" for n, answer in enumerate(answers)))
    command("paraphrases", [f"--score={out}", f"--para_dev={files / 'pairs.csv'}"])
    table = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:])
    predicted = torch.tensor([1, 0, 0, 1, 1, 0, 0])
    expected = classification_metrics(predicted, torch.arange(7) % 2)
    assert {name: float(table[name]) for name in table} == pytest.approx(expected, abs=6e-4)


def test_a_frozen_gpt_is_not_changed(files, tmp_path):
    """--freeze_gpt trains pooling and head."""
    folders = [
        run(files, "paraphrases-full", tmp_path / rate, "--freeze_gpt", f"--lr={rate}")
        for rate in ("1e-12", "0.1")
    ]
    models = [load_file(folder / "best" / "model.safetensors") for folder in folders]
    models.append(load_file(files / "model" / "model.safetensors"))
    assert all(torch.equal(model[name], models[0][name]) for model in models for name in model)
    one, other = (load_file(folder / "best" / "head.safetensors") for folder in folders)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert summary_of(folders[0])["method"] == "frozen"


@pytest.mark.parametrize("kind", KINDS)
def test_no_epochs_only_evaluate(files, tmp_path, kind):
    folder = run(files, kind, tmp_path / "run", "--epochs=0")
    summary = summary_of(folder)
    assert (summary["epochs"], summary["best_epoch"]) == (0, 0)
    assert summary.get("base_dev_loss", summary["dev_loss"]) == summary["dev_loss"]
    assert not {"metrics.csv", "curves.png", "best/README.md"} & names(folder)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_adapter_is_trained_further(trained, files, tmp_path, method):
    """--use_lora goes on where the adapter ended; without, it is merged into the model."""
    more = [f"--model_size={trained['sonnets-lora'] / 'best'}", "--epochs=1"]
    folder = run(files, f"sonnets-{method}", tmp_path / "run", *more)
    before = summary_of(trained["sonnets-lora"])["dev_loss"]
    assert summary_of(folder)["base_dev_loss"] == pytest.approx(before, rel=1e-5)
    if method == "lora":
        adapter = json.loads(read(folder / "best" / "adapter_config.json"))
        assert adapter["base_model_name_or_path"] == str(files / "model")
        more[0] = f"--model_size={folder / 'best'}"  # an adapter of the same base
        with pytest.raises(InputError, match="has another start_sha256"):
            run(files, "sonnets-lora", folder, *more, "--resume")


def test_config_records_the_settings_of_a_saved_model(trained, files, tmp_path):
    """Options that it does not follow are not recorded."""
    more = ["--pooling=last", "--lora_rank=7", "--epochs=0"]
    more.append(f"--model_size={trained['paraphrases-lora'] / 'best'}")
    config = json.loads(read(run(files, "paraphrases-lora", tmp_path, *more) / "config.json"))
    assert (config["pooling"], config["lora_rank"]) == ("generalized", 4)


@pytest.mark.parametrize("kind", ["paraphrases-full", "paraphrases-lora"])
def test_a_classifier_is_evaluated_and_trained_further(trained, files, tmp_path, kind):
    """Its pooling and head come with it: no head of random numbers is evaluated instead."""
    more = [f"--model_size={trained[kind] / 'best'}", "--pooling=last", "--epochs=0"]
    summary = summary_of(run(files, kind, tmp_path / "run", *more))
    assert summary["pooling"] == "generalized"
    assert summary["dev_loss"] == pytest.approx(summary_of(trained[kind])["dev_loss"], rel=1e-5)


def test_the_score_of_a_run_is_that_of_its_summary(trained, files, capsys):
    """chrF of the saved texts, with and without the given lines."""
    folder = trained["sonnets-full"]
    text, path = folder / "predictions" / "generated_sonnets.txt", files / "sonnets.txt"
    given = [f"--sonnet_path={path}", f"--held_out_sonnet_path={path}"]
    command("sonnets", [f"--score={text}", *given])
    table = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[-6:])
    for name in ("chrf", "chrf_with_prompt"):
        assert float(table[name]) == pytest.approx(summary_of(folder)[f"test_{name}"], abs=6e-4)


def test_a_single_file_is_classified(trained, files, tmp_path, capsys):
    """--predict with one file reads and writes only that one."""
    given = [f"--predict={trained['paraphrases-full'] / 'best'}", *FAST]
    given += [f"--para_test={files / 'pairs.csv'}", f"--para_test_out={tmp_path / 'one.csv'}"]
    command("paraphrases", given)
    assert names(tmp_path) == {"one.csv"}
    assert "dev" not in capsys.readouterr().out


def test_the_merged_model_of_the_readme(trained, tmp_path):
    """The README's code writes a folder that computes what base and adapter compute."""
    pattern = r"```python\n(from lora import merge_lora.*?)```"
    [code] = re.findall(pattern, read(ROOT / "README.md"), re.S)
    adapter = str(trained["sonnets-lora"] / "best")
    code = re.sub(r'load_model\(".*?"\)', f"load_model({adapter!r})", code)
    exec(code.replace('"merged"', repr(str(tmp_path / "merged"))), {})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (load_model(f)(ids) for f in (adapter, tmp_path / "merged"))
    torch.testing.assert_close(one["last_token"], other["last_token"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_equals_default(files, tmp_path, kind):
    """speed/ changes no result without dropout, whose rates --dropout replaces."""
    steps = []
    for more in (["--dropout=0"], ["--dropout=0", "--plain"], ["--dropout=0.5"]):
        folder = run(files, kind, tmp_path / str(len(steps)), "--lora_dropout=0", *more)
        steps.append(pd.read_csv(folder / "steps.csv"))
    pd.testing.assert_frame_equal(steps[0], steps[1], rtol=1e-5)
    assert (steps[0]["loss"] != steps[2]["loss"]).all()


def test_a_test_set_of_prompts_has_no_metrics(files, tmp_path, capsys):
    """As the course's. The sonnets are continued, and a note says that nothing is measured."""
    path = tmp_path / "prompts.txt"
    path.write_text("1\na\nb\nc\n")
    more = [f"--held_out_sonnet_path={path}", "--epochs=0"]
    summary = summary_of(run(files, "sonnets-full", tmp_path / "run", *more))
    assert "dev_chrf" in summary
    assert not [name for name in summary if "test" in name]
    assert f"note: {path} has bare prompts" in capsys.readouterr().out


def test_a_skipped_pair_gets_a_no(files, tmp_path, capsys):
    """The report dropped such pairs. Here test has no labels, and so no metrics."""
    (tmp_path / "dev.csv").write_text(HEADER + "a\tx\ty\t1\nb\tz\tw\t1\nc\tv\tu\t0\n")
    (tmp_path / "test.csv").write_text("id\tsentence1\tsentence2\na\tx\ty\nb\t\tw\nc\tv\tu \n")
    more = [f"--para_{split}={tmp_path / split}.csv" for split in ("dev", "test")]
    folder = run(files, "paraphrases-full", tmp_path / "run", *more, "--epochs=0")
    predictions, summary = tmp_path / "run-out" / "para-test-output.csv", summary_of(folder)
    assert re.search(r"\na, [01] \nb, 0 \nc, [01] \n$", read(predictions))
    assert "note: 1 test pairs are skipped: lines [3]" in capsys.readouterr().out
    assert not [name for name in summary if name.startswith("test")]
    assert summary["dataset"] is None


COURSE = "--epochs 2 --use_gpu --seed 1 --batch_size 4 --lr 0.1 --model_size gpt2"
OF_COURSE = {
    "sonnets": "--sonnet_path a --held_out_sonnet_path b --sonnet_out c --temperature 1 --top_p 1",
    "paraphrases": "--para_train a --para_dev b --para_test c --para_dev_out d --para_test_out e",
}


@pytest.mark.parametrize("task", SCRIPTS)
def test_the_options_of_the_course_and_of_the_report(task, monkeypatch):
    """Other options override the preset; defaults do not depend on how a model is spelled."""

    def parse(*given):
        options = SCRIPTS[task].parse_options([*given])
        return options, from_options(TrainConfig, options)

    options, config = parse(*COURSE.split(), *OF_COURSE[task].split())
    assert (options.model_size, config.epochs, config.lr, config.seed) == ("gpt2", 2, 0.1, 1)
    options, config = parse("--preset=report", "--seed=5")
    assert (options.model_size, config.batch_size, config.seed) == ("gpt2", 8, 5)
    assert (config.schedule, config.warmup, config.max_grad_norm) == ("constant", 0, 0)
    assert (config.epochs, config.lr, config.patience) == (10 if task == "sonnets" else 3, 1e-5, 3)
    assert parse("--preset=report", "--use_lora")[1].lr == 1e-4
    if task == "paraphrases":
        assert parse("--freeze_gpt")[1].lr == 1e-3
    if task == "sonnets":
        assert (options.temperature, options.top_p) == (1.2, 0.9)
    else:
        chosen = options.dataset, options.pair_encoding, options.pooling
        assert chosen == ("quora", "joint", "last")
    monkeypatch.chdir(ROOT)
    for model in ("tiny", "data/tiny-gpt2", str(ROOT / "data" / "tiny-gpt2")):
        options, config = parse("--use_lora", f"--model_size={model}")
        assert config.lr == {"sonnets": 1e-3, "paraphrases": 2e-3}[task]
        assert vars(options).get("pair_encoding", "separate") == "separate"
    assert parse("--model_size=gpt2")[1].lr == 5e-5


def test_a_run_as_a_process_in_another_folder(tmp_path):
    """With the bundled model, warnings as errors, and a plotting backend that is not there."""
    sonnets = read_sonnets(ROOT / "data" / "Shakespeare_Sonnets_train.csv")[:4]
    sonnets.to_csv(tmp_path / "sonnets.csv", index=False)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sonnet_generation as s; "
    code += "s.main(s.parse_options(sys.argv[1:]))"
    given = [f"--{name}=sonnets.csv" for name in SCRIPTS["sonnets"].FILES.values()]
    given += ["--epochs=1", "--use_lora", "--out_dir=run", "--max_new_tokens=9"]
    process = [sys.executable, "-W", "error", "-c", code, *given]
    environment = {"MPLBACKEND": "module://not_there", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(process, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    summary = summary_of(tmp_path / "run")
    assert summary["trainable_parameters"] == 36864
    assert summary["dev_loss"] < summary["base_dev_loss"]
    assert {"curves.png", "best/adapter_model.safetensors"} <= names(tmp_path / "run")
    assert (tmp_path / "predictions" / "generated_sonnets.txt").exists()
