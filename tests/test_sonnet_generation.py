"""The user's command for sonnets: what a run leaves, and that it can be repeated and continued."""

import importlib
import io
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import load_adapter
from config import InputError
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from sonnet_generation import main, parse_options

ROOT = Path(__file__).resolve().parent.parent
LINES = "From fairest\ncreatures\nwe {0}\ndesire\n"
SONNETS = "".join(f"\n{number}\n\n{LINES.format(number)}" for number in range(1, 6))
SUMMARY = """
    task model method seed trainable_parameters total_parameters epochs best_epoch first_train_loss
    final_train_loss best_dev_loss train_seconds seconds_per_epoch tokens_per_second peak_memory_gb
    skipped_steps base_dev_loss dev_loss dev_perplexity dev_bits_per_character test_loss dev_chrf
    gold_dev_rhymes random_dev_rhymes dev_copied_5grams
""".split()
METHODS = pytest.mark.parametrize("method", [(), ("--use_lora",)], ids=["full", "lora"])


@pytest.fixture
def command(folder, tmp_path):
    """Run the script on the tiny model and five short sonnets; further options may override."""
    path = tmp_path / "sonnets.txt"
    path.write_text(SONNETS)
    names = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
    given = [f"--{name}={path}" for name in names] + [f"--sonnet_out={tmp_path / 'out.txt'}"]
    given += [f"--model_size={folder}", "--max_new_tokens=8", "--device=cpu", "--dtype=float32"]
    given += ["--epochs=2", "--lr=0.01"]

    def run(*options, out="run"):
        main(parse_options([*given, f"--out_dir={tmp_path / out}", *options]))
        return tmp_path / out

    return run


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "options", [(), ("--use_lora", "--dtype=bfloat16"), ("--dtype=bfloat16",)], ids=" ".join
)
def test_a_run_leaves_its_files(command, tmp_path, options):
    """Every file of the design, and both copies of the predictions with unchanged prompts."""
    run = command(*options)
    names = {"config.json", "metrics.csv", "steps.csv", "summary.json", "curves.png", "resume"}
    assert names <= {path.name for path in run.iterdir()}
    summary = json.loads(read(run / "summary.json"))
    assert summary.keys() >= set(SUMMARY)
    assert summary["epochs"] == 2
    assert summary["base_dev_loss"] > summary["dev_loss"] > 0
    assert pd.read_csv(run / "metrics.csv")["epoch"].tolist() == [1, 2]
    adapter = "--use_lora" in options
    assert (run / "best" / "adapter_model.safetensors").exists() == adapter
    assert (run / "best" / "model.safetensors").exists() != adapter
    card = read(run / "best" / "README.md")
    assert card.startswith(f"---\nlibrary_name: {'peft' if adapter else 'transformers'}\n")
    [value] = re.findall(r"\| dev_loss +\| +(\S+) +\|", card)
    assert float(value) == pytest.approx(summary["dev_loss"], rel=1e-5)
    texts = read(tmp_path / "out.txt")
    assert texts == read(run / "predictions" / "generated_sonnets.txt")
    assert all(f"\n\n{n}\n\nFrom fairest\ncreatures\nwe {n}\n" in texts for n in range(1, 6))


@METHODS
def test_the_best_model_generates_the_same_texts_again(command, folder, tmp_path, method):
    """--generate_only from best/: the same prompts, options and seed give the same file."""
    best = command(*method) / "best"
    texts = read(tmp_path / "out.txt")
    (tmp_path / "out.txt").unlink()
    given = [f"--adapter={best}", f"--model_size={folder}"] if method else [f"--model={best}"]
    given += [f"--held_out_sonnet_path={tmp_path / 'sonnets.txt'}", "--max_new_tokens=8"]
    given += [f"--sonnet_out={tmp_path / 'out.txt'}", "--device=cpu", "--dtype=float32"]
    main(parse_options(["--generate_only", *given]))
    assert read(tmp_path / "out.txt") == texts


@METHODS
@pytest.mark.parametrize("base", ["tiny", "folder"])
def test_the_model_card_runs(command, folder, capsys, method, base):
    """The code of best/README.md continues its line as it is, in the repository's root."""
    options = ["--epochs=1", "--model_size=tiny", "--batch_size=5"] if base == "tiny" else []
    card = read(command(*method, *options) / "best" / "README.md")
    capsys.readouterr()
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.startswith("Shall I compare thee to a summer's day?\n")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # from PEFT
@METHODS
def test_transformers_and_peft_load_the_best_model(command, ids, monkeypatch, method):
    """With the Auto class that the card names, the same logits as ours."""
    monkeypatch.chdir(ROOT)
    best = command(*method) / "best"
    library, loader = re.findall(r"`(\w+)\.(\w+)\.from_pretrained`", read(best / "README.md"))[0]
    theirs = getattr(importlib.import_module(library), loader).from_pretrained(best).eval()
    base = theirs.peft_config["default"].base_model_name_or_path if method else best
    gpt = GPT2Model.from_pretrained(base)
    if method:
        load_adapter(gpt, best)
    with torch.no_grad():
        torch.testing.assert_close(SonnetGPT(gpt)(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@METHODS
def test_own_prompts_are_continued(command, folder, tmp_path, capsys, monkeypatch, method):
    """--prompt, repeated and from standard input: each text is printed; nothing is written."""
    best = command(*method) / "best"
    given = [f"--adapter={best}", f"--model_size={folder}"] if method else [f"--model={best}"]
    files = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"thy brow\n")))
    capsys.readouterr()
    options = ["--generate_only", *given, "--prompt=From", "--prompt=-", "--max_new_tokens=9"]
    main(parse_options([*options, "--device=cpu"]))
    out = capsys.readouterr().out
    first, second = re.fullmatch(r"(From.+)\n\n(thy brow\n.*)\n", out, re.S).groups()
    assert len(first) > len("From")
    assert len(second) > len("thy brow\n")
    assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("text", ["", " \n", "\udcff", "-"], ids=ascii)
def test_a_prompt_that_is_no_text_is_named(monkeypatch, text):
    """Nothing, white space, bytes that are not UTF-8, and an empty standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(InputError, match=r"--prompt .* (is empty|is not UTF-8)"):
        main(parse_options(["--generate_only", f"--prompt={text}"]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt=a"], "--prompt .* without --generate_only"),
        (["--generate_only", "--prompt=a", "--sonnet_out=b"], "--sonnet_out b .* with --prompt"),
        (["--generate_only", "--prompt=a", "--held_out_sonnet_path=b"], "--held_out_sonnet_path"),
    ],
)
def test_options_that_a_prompt_excludes(options, named):
    """They would have no effect."""
    with pytest.raises(InputError, match=named):
        parse_options(options)


@METHODS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_epochs_evaluate_and_generate_with_the_base(command, method, dtype):
    """--epochs 0: the metrics before and after are the same, and no best model is saved."""
    run = command(*method, f"--dtype={dtype}", "--epochs=0")
    summary = json.loads(read(run / "summary.json"))
    assert summary["dev_loss"] == summary["base_dev_loss"]
    assert (summary["epochs"], summary["best_epoch"]) == (0, 0)
    assert not (run / "best").exists()
    assert not (run / "metrics.csv").exists()


def test_a_finished_run_is_not_overwritten(command):
    """Neither by running again nor by --resume: the folder holds a result."""
    before = read(command() / "summary.json")
    for again in ((), ("--resume",)):
        with pytest.raises(InputError, match="already holds a run"):
            command(*again)
    run = command(out="other")
    assert len(pd.read_csv(run / "metrics.csv")) == 2
    assert read(run.with_name("run") / "summary.json") == before


def test_a_changed_base_model_is_not_resumed(command, folder, tmp_path):
    """Its name is the same, but the SHA-256 of its weights is not."""
    shutil.copytree(folder, tmp_path / "base")
    run = command(f"--model_size={tmp_path / 'base'}")
    (run / "summary.json").unlink()
    path = tmp_path / "base" / "model.safetensors"
    original = path.read_bytes()
    tensors = load_file(path)
    tensors["transformer.wpe.weight"][0, 0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run"):
        command(f"--model_size={tmp_path / 'base'}", "--resume")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    path.write_bytes(original)
    assert (command(f"--model_size={tmp_path / 'base'}", "--resume") / "summary.json").exists()


def test_changed_data_is_not_resumed(command, tmp_path):
    """The options are the same, but the SHA-256 of the file is not."""
    run = command("--epochs=1")
    (run / "summary.json").unlink()
    (tmp_path / "sonnets.txt").write_text(SONNETS + "\n9\n\na\nb\nc\nd\n")
    with pytest.raises(InputError, match="already holds a run"):
        command("--epochs=1", "--resume")


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--temperature=-1", "temperature"),
        ("--adapter=somewhere", "generate_only"),
        ("--sonnet_path=absent.csv", r"absent\.csv"),
        ("--model_size=absent", "absent"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(command, tmp_path, option, named):
    """Before anything is trained or a folder made."""
    with pytest.raises(InputError, match=named):
        command(option)
    assert not (tmp_path / "run").exists()


def test_dev_sonnets_that_are_only_prompts_are_rejected(command, tmp_path):
    """There would be nothing to compare with; test sonnets may be prompts, without metrics."""
    path = tmp_path / "prompts.txt"
    path.write_text("1\n\na\nb\nc\n")
    with pytest.raises(InputError, match="dev sonnet 1 has no lines after the prompt"):
        command(f"--dev_sonnet_path={path}")
    summary = json.loads(read(command(f"--held_out_sonnet_path={path}") / "summary.json"))
    assert "dev_loss" in summary
    assert "test_loss" not in summary


def test_sonnets_in_both_files_are_noted(command, capsys):
    """A leak from training to evaluation is shown."""
    command("--epochs=0")
    out = capsys.readouterr().out
    assert all(
        f"5 {split} sonnets are also in the training file" in out for split in ("dev", "test")
    )
