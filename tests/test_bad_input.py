"""A table of bad inputs through the real commands: one line that names value, file and way out, exit code 2."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_everywhere import SCRIPTS, make_data, make_model, options
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from config import LoRAConfig, exit_cleanly
from lora import apply_lora, save_adapter
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT

ROOT = Path(__file__).resolve().parent.parent
SONNET = "1\n\na b\nc d\ne f\ng h\n"
HEADER = "id\tsentence1\tsentence2\tis_duplicate\n"
PAIR = "a\tx y\tz\t1\n"


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A one-layer model, another of another width, data, and an adapter and a head of the first."""
    root = tmp_path_factory.mktemp("kit")
    make_model(root / "model")
    make_model(root / "wide", width=32)
    make_data(root)
    gpt = apply_lora(GPT2Model.from_pretrained(root / "model"), LoRAConfig(rank=2))
    save_adapter(gpt, root / "adapter")
    ParaphraseGPT(GPT2Model.from_pretrained(root / "model"), "generalized").save_pretrained(root / "judge")
    return root


@pytest.fixture
def refused(kit, tmp_path, capsys, monkeypatch):
    """Run a command as the script does, and return its one line; nothing may have been written."""
    monkeypatch.chdir(tmp_path)

    def run(task, *more, bare=False):
        given = list(more) if bare else options(kit, f"{task}-full", tmp_path / "run", *more)
        with pytest.raises(SystemExit) as stop, exit_cleanly():
            SCRIPTS[task].main(SCRIPTS[task].parse_options(given))
        error = capsys.readouterr().err
        assert stop.value.code == 2, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return error

    return run


SONNETS = {
    "missing": (None, "No such file", "check the path"),
    "empty": (b"", "holds no sonnet", "expected a number"),
    "no number": (b"From fairest creatures\n", "holds no sonnet", "expected a number"),
    "truncated": (b"1\n\na b\nc\n\n2\n", "sonnet 2 has 0 characters", "complete"),
    "UTF-16": (SONNET.encode("utf-16"), "not UTF-8", "save it as UTF-8"),
    "UTF-16 without a mark": (SONNET.encode("utf-16-le"), "NUL bytes", "save it as UTF-8"),
    "NUL": (b"1\n\na\0b\n", "NUL bytes", "save it as UTF-8"),
    "Latin-1": ("1\n\ncaf\xe9\n".encode("latin-1"), "not UTF-8", "save it as UTF-8"),
    "number twice": ((SONNET + SONNET).encode(), "sonnet 1 occurs twice", "remove one"),
    "a million tokens": (("1\n" + "a b\nc d\n" * 100_000).encode(), "characters", "shorten"),
    "too many tokens": (b"1\n\na b\n" + b"c d\n" * 300, "tokens; the model", ""),
    "a line of 10 MB": (b"1\n" + b"x" * 10_000_000, "characters", "shorten"),
    "a line of 10 MB of blanks": (b"1\n" + b" " * 10_000_000 + b"x\ny\nz\nw", "characters", "shorten"),
    "csv: wrong columns": (b"number,poem\n1,a\n", "no column id", "number, poem"),
    "csv: empty": (b"", "holds no sonnet", "expected"),
    "csv: header alone": (b"id,text\n", "holds no sonnet", "expected"),
    "csv: id": (b"id,text\none,a\n", "row 2: id 'one'", "is not a sonnet's number"),
    "csv: truncated": (b'id,text\n1,"a\nb\n', "not a CSV", "unexpected end"),
    "csv: more fields": (b"id,text\n1,a,b\n", "row 2", "put quotes"),
    "csv: a line of 10 MB": (b"id,text\n1," + b"x" * 10_000_000 + b"\n", "not a CSV", "field limit"),
}


@pytest.mark.parametrize("option", ["sonnet_path", "held_out_sonnet_path"])
@pytest.mark.parametrize("kind", SONNETS)
def test_files_of_sonnets(refused, tmp_path, kind, option):
    """To train on, and to continue: the second must be refused before training, too."""
    content, *named = SONNETS[kind]
    path = tmp_path / ("sonnets.csv" if kind.startswith("csv") else "sonnets.txt")
    if content is not None:
        path.write_bytes(content)
    start = time.perf_counter()
    error = refused("sonnets", f"--{option}={path}")
    assert all(word in error for word in named), error
    assert str(path) in error or "tokens; the model" in error
    assert time.perf_counter() - start < 20  # slow machines included


PAIRS = {
    "missing": (None, "No such file", "check the path"),
    "empty": (b"", "lacks the column id", "header"),
    "header alone": (HEADER.encode(), "holds no complete pair", "check the path"),
    "wrong columns": (b"id\tquestion1\tquestion2\n", "lacks the column sentence1", "header"),
    "commas": (HEADER.replace("\t", ",").encode(), "lacks the column", "tab-separated"),
    "UTF-16": ((HEADER + PAIR).encode("utf-16"), "not UTF-8", "save it so"),
    "UTF-16 without a mark": ((HEADER + PAIR).encode("utf-16-le"), "lacks the column", "header"),
    "NUL": (HEADER.encode() + b"a\tx\0\ty\t1\n", "NUL", "line 2"),
    "a line of 10 MB": (HEADER.encode() + b"a\t" + b"x" * 10_000_000 + b"\ty\t1\n", "field larger", "line 2"),
    "a line of 10 MB of tabs": (HEADER.encode() + b"\t" * 10_000_000 + b"\n", "10000001 fields", "line 2"),
    "truncated in a quote": (HEADER.encode() + b'a\tx\t"y z', "quote", "line 3"),
    "id twice": ((HEADER + PAIR + PAIR).encode(), "the id a occurs 2 times", "an id of its own"),
    **{f"label {label}": ((HEADER + PAIR.replace("1", label)).encode(), f"is_duplicate is '{label}'", "write 0 or 1")
       for label in ("2", "nan", "yes", "-1", "1e0", "True")},
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_files_of_pairs(refused, tmp_path, kind):
    """The same of pairs, as train and as test."""
    content, *named = PAIRS[kind]
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content)
    for split in ("train", "test"):
        error = refused("paraphrases", f"--para_{split}={path}")
        assert str(path) in error
        assert all(word in error for word in named), error


@pytest.mark.parametrize("change", [
    lambda text: text, lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n"),
], ids=["as is", "BOM", "CRLF"])  # fmt: skip
def test_what_editors_do_is_read(kit, tmp_path, change):
    """A byte-order mark and Windows line ends are no fault."""
    path = tmp_path / "data"
    path.write_bytes(change(SONNET).encode())
    from datasets import PairsDataset, read_sonnets

    assert read_sonnets(path)[0].text == "a b\nc d\ne f\ng h"
    path.write_bytes(change(HEADER + PAIR).encode())
    assert PairsDataset(path, GPT2Model.from_pretrained(kit / "model")).ids == ["a"]


NUMBERS = [
    (("--epochs=-1",), "--epochs"), (("--epochs=1.5",), "1.5"), (("--epochs=" + "9" * 5000,), "--epochs"),
    (("--batch_size=0",), "--batch_size"), (("--lr=-0.1",), "--lr"), (("--lr=nan",), "nan"), (("--lr=inf",), "inf"),
    (("--lr=0",), "--lr"), (("--lr=many",), "many"), (("--warmup=1",), "--warmup"), (("--warmup=-0.1",), "--warmup"),
    (("--seed=-1",), "--seed"), (("--seed=9223372036854775808",), "--seed"), (("--patience=-1",), "--patience"),
    (("--weight_decay=nan",), "--weight_decay"), (("--max_grad_norm=-1",), "--max_grad_norm"),
    (("--checkpoint_every=-1",), "--checkpoint_every"), (("--schedule=none",), "none"), (("--dtype=int8",), "int8"),
    (("--dtype=float16",), "needs CUDA"), (("--device=tpu",), "tpu"), (("--device=cuda:99",), "cuda:99"),
    (("--device=cuda:x",), "cuda:x"), (("--use_gpu",), "--device cpu"), (("--mystery=1",), "--mystery"),
    (("--model_size=gpt3",), "gpt3"), (("--model_size=",), "neither"), (("--model_size=" + "x" * 5000,), "neither"),
    (("--use_lora", "--lora_rank=0"), "rank"), (("--use_lora", "--lora_rank=10000"), "rank 10000"),
    (("--use_lora", "--lora_alpha=0"), "alpha"), (("--use_lora", "--lora_alpha=inf"), "alpha"),
    (("--use_lora", "--lora_dropout=1"), "dropout"), (("--use_lora", "--lora_dropout=nan"), "dropout"),
    (("--use_lora", "--lora_targets", "c_attn"), "c_attn"), (("--lora_rank=8",), "without --use_lora"),
    (("--lora_alpha=8",), "without --use_lora"), (("--lora_targets", "q_proj"), "without --use_lora"),
]  # fmt: skip


@pytest.mark.parametrize("task", SCRIPTS)
@pytest.mark.parametrize(("given", "named"), NUMBERS, ids=[" ".join(given)[:40] for given, _ in NUMBERS])
def test_options_of_both_tasks(refused, task, given, named):
    """Out of range, not a number, unknown, or without what they belong to."""
    assert named in refused(task, *given)


OWN = [
    ("sonnets", ("--temperature=-1",), "temperature"), ("sonnets", ("--temperature=nan",), "temperature"),
    ("sonnets", ("--top_p=0",), "top_p"), ("sonnets", ("--top_p=2",), "top_p"), ("sonnets", ("--top_k=-1",), "top_k"),
    ("sonnets", ("--max_new_tokens=0",), "max_new_tokens"), ("sonnets", ("--adapter=x",), "without --generate_only"),
    ("sonnets", ("--model=x",), "without --generate_only"), ("paraphrases", ("--pooling=median",), "median"),
    ("paraphrases", ("--attention_penalty=1",), "multihead"), ("paraphrases", ("--pair_encoding=both",), "both"),
    ("paraphrases", ("--dataset=snli",), "snli"), ("paraphrases", ("--model=x",), "--predict_only"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "given", "named"), OWN, ids=lambda value: " ".join(value)[:40])
def test_options_of_one_task(refused, task, given, named):
    assert named in refused(task, *given)


IGNORED = [
    *((("sonnets", "--generate_only"), option) for option in (
        "--use_lora", "--lr=0.1", "--epochs=3", "--batch_size=2", "--schedule=linear", "--resume", "--out_dir=x",
        "--gradient_checkpointing", "--sonnet_path=x", "--dev_sonnet_path=x", "--lora_rank=2", "--patience=1")),
    (("sonnets", "--generate_only", "--model=x"), "--model_size=y"),
    *((("paraphrases", "--predict_only", "--model=x"), option) for option in (
        "--use_lora", "--lr=0.1", "--epochs=9", "--pooling=max", "--pair_encoding=joint", "--para_train=x",
        "--attention_penalty=1", "--seed=1", "--resume", "--out_dir=x", "--model_size=y", "--lora_rank=2")),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "option"), IGNORED, ids=lambda value: value if isinstance(value, str) else value[1])
def test_an_option_that_a_mode_would_ignore_is_refused(refused, mode, option):
    """What has no effect is a misunderstanding, and the result another one than its user thinks."""
    task, *given = mode
    error = refused(task, *given, option, bare=True)
    assert option.split("=")[0] in error
    assert "has no effect" in error


@pytest.mark.parametrize("task", SCRIPTS)
def test_the_reports_preset_is_no_option_that_was_given(task):
    """It sets defaults; only what stands on the command line can be ignored."""
    mode = ("--generate_only",) if task == "sonnets" else ("--predict_only", "--model=x")
    assert SCRIPTS[task].parse_options(["--preset=report", *mode]).model_size == "gpt2"


def test_an_output_that_would_replace_something_is_refused(refused, kit, tmp_path):
    """An input, another output, a folder, a path below a file or without permission: before training, nothing lost."""
    (tmp_path / "file").write_text("kept")
    before = (kit / "sonnets.txt").read_bytes()
    (kit / "folder").mkdir(exist_ok=True)
    for path, named in (
        (kit / "sonnets.txt", "is the file of --held_out_sonnet_path too"), (kit / "folder", "is a folder"),
        (tmp_path / "file" / "out.txt", "is no folder"), ("", "is a folder"), ("/", "is a folder"),
        ("/dev/null", "is no regular file"),
    ):  # fmt: skip
        assert named in refused("sonnets", f"--sonnet_out={path}")
    out = tmp_path / "out.csv"
    assert "--para_dev_out too" in refused("paraphrases", f"--para_dev_out={out}", f"--para_test_out={out}")
    assert "--para_test too" in refused("paraphrases", f"--para_test_out={kit / 'pairs.csv'}")
    assert (kit / "sonnets.txt").read_bytes() == before
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "--out_dir" in refused("sonnets", f"--out_dir={place}")
    assert (tmp_path / "file").read_text() == "kept"


def spoil(folder, kind):
    """A model folder that is wrong in one way."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((folder / "config.json").read_text())
    if kind == "no weights":
        path.unlink()
    elif kind == "weights of another size":
        tensors["transformer.wte.weight"] = torch.zeros(300, 8)
    elif kind == "extra tensor":
        tensors["transformer.h.7.ln_1.weight"] = torch.zeros(16)
    elif kind == "missing tensor":
        del tensors["transformer.ln_f.weight"]
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "NaN":
        tensors["transformer.ln_f.weight"] = torch.full((16,), float("nan"))
    elif kind == "tokenizer of another model":
        config["vocab_size"], tensors["transformer.wte.weight"] = 100, torch.zeros(100, 16)
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "tokenizer cut short":
        (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:500])
    else:
        config |= json.loads(kind)
    if kind not in ("no weights", "cut short", "empty"):
        save_file(tensors, path)
    (folder / "config.json").write_text(json.dumps(config))


MODELS = {
    "no weights": "model.safetensors not found", "weights of another size": "wte.weight", "extra tensor": "h.7.ln_1",
    "missing tensor": "ln_f.weight", "cut short": "can't be read as safetensors", "empty": "can't be read",
    "tokenizer of another model": "it is another's", "no tokenizer": "no tokenizer", "tokenizer cut short": "tokenizer",
    '{"n_layer": 1000000000}': "layers", '{"vocab_size": 1000000000000000000}': "vocab_size",
    '{"n_embd": "x"}': "width", '{"n_head": 0}': "heads", '{"resid_pdrop": []}': "unhashable",
    '{"layer_norm_epsilon": "x"}': "layer_norm_eps",
    '{"n_embd": null}': "width", '{"n_positions": true, "n_ctx": 1}': "positions",
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("task", SCRIPTS)
def test_model_folders(refused, kit, tmp_path, task, kind):
    """Half copied, cut short, of another shape, or claiming sizes that no machine holds."""
    shutil.copytree(kit / "model", tmp_path / "copy")
    spoil(tmp_path / "copy", kind)
    error = refused(task, f"--model_size={tmp_path / 'copy'}")
    assert MODELS[kind] in error
    assert str(tmp_path / "copy") in error


def test_weights_that_are_not_finite_stop_a_run(kit, tmp_path, capsys):
    """NaN in a file is no traceback and no text, either: exit code 1."""
    shutil.copytree(kit / "model", tmp_path / "copy")
    spoil(tmp_path / "copy", "NaN")
    shutil.copytree(kit / "judge", tmp_path / "judge")
    spoil(tmp_path / "judge", "NaN")
    generate = ["--generate_only", f"--model={tmp_path / 'copy'}", f"--held_out_sonnet_path={kit / 'sonnets.txt'}"]
    predict = ["--predict_only", f"--model={tmp_path / 'judge'}", f"--para_dev={kit / 'pairs.csv'}",
               f"--para_test={kit / 'pairs.csv'}"]  # fmt: skip
    for task, given in (("sonnets", generate), ("paraphrases", predict)):
        with pytest.raises(SystemExit) as stop, exit_cleanly():
            SCRIPTS[task].main(SCRIPTS[task].parse_options(given))
        assert stop.value.code == 1
        assert "not finite" in capsys.readouterr().err


def test_adapters(refused, kit, tmp_path):
    """Of another base, another target, cut short, without a file, and no adapter at all."""
    write = ["--generate_only", f"--held_out_sonnet_path={kit / 'sonnets.txt'}"]
    assert "another base" in refused(
        "sonnets", *write, f"--adapter={kit / 'adapter'}", f"--model_size={kit / 'wide'}", bare=True
    )
    write += [f"--model_size={kit / 'model'}", f"--adapter={tmp_path / 'copy'}"]
    copy, path = tmp_path / "copy", tmp_path / "copy" / "adapter_model.safetensors"
    assert "not found" in refused("sonnets", *write, bare=True)
    shutil.copytree(kit / "adapter", copy)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        note = file.metadata()
    name = next(name for name in tensors if "c_attn.lora_A" in name)
    for changed, named in (
        ({name.replace("h.0.attn.c_attn", "lm_head"): torch.zeros(2, 16)}, "no place for"),
        ({name: torch.zeros(5, 5)}, "another model"), ({name: torch.zeros(())}, "no matrix"),
        ({name.replace("_A", "_B"): torch.zeros(0, 2)}, "another model"),
    ):  # fmt: skip
        save_file(tensors | changed, path, metadata=note)
        assert named in refused("sonnets", *write, bare=True)
    path.write_bytes(path.read_bytes()[:-50])
    assert "can be read" in refused("sonnets", *write, bare=True)


HEADS = [
    ({"pooling": "multihead", "pair_encoding": "joint", "heads": 10**12}, "heads"),
    ({"pooling": "multihead", "pair_encoding": "joint", "heads": 0}, "heads"),
    ({"pooling": "multihead", "pair_encoding": "joint", "heads": "many"}, "heads"),
    ({"pooling": "median", "pair_encoding": "joint"}, "median"), ({"pooling": ["max"]}, "unhashable"), ([], "head"),
    ({"pooling": "max", "pair_encoding": "both"}, "both"), ({"pooling": "mean", "surprise": 1}, "surprise"),
    ({"pooling": "last", "pair_encoding": "joint"}, "not the head"), (None, "settings"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "named"), HEADS, ids=str)
def test_heads(refused, kit, tmp_path, settings, named):
    """Its metadata is anyone's text: heads without end must not take memory without end."""
    shutil.copytree(kit / "judge", tmp_path / "copy")
    path = tmp_path / "copy" / "head.safetensors"
    metadata = None if settings is None else {"settings": json.dumps(settings)}
    save_file(load_file(path), path, metadata=metadata)
    files = [f"--para_dev={kit / 'pairs.csv'}", f"--para_test={kit / 'pairs.csv'}"]
    error = refused("paraphrases", "--predict_only", f"--model={tmp_path / 'copy'}", *files, bare=True)
    assert named in error
    assert str(path) in error


@pytest.mark.parametrize(("settings", "named"), [
    (dict.fromkeys(("temperature", "top_p"), 1e-320), None), ({"top_k": 10**30, "max_new_tokens": 10**30}, None),
], ids=str)  # fmt: skip
def test_extreme_values_that_are_allowed_work(kit, tmp_path, settings, named):
    """float32 takes 1e-320 for 0, which left no token to choose."""
    given = [f"--{name}={value}" for name, value in settings.items()]
    script = SCRIPTS["sonnets"]
    script.main(script.parse_options(["--generate_only", f"--model={kit / 'model'}", "--device=cpu", *given,
        f"--held_out_sonnet_path={kit / 'sonnets.txt'}", f"--sonnet_out={tmp_path / 'out.txt'}"]))  # fmt: skip
    assert "From fairest" in (tmp_path / "out.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("script", "given", "named"), [
    ("sonnet_generation.py", ["--sonnet_path=absent.csv"], "absent.csv"),
    ("sonnet_generation.py", ["--lora_rank=8"], "without --use_lora"),
    ("paraphrase_detection.py", ["--para_dev_out=a", "--para_test_out=a"], "--para_dev_out too"),
])  # fmt: skip
def test_as_processes(script, given, named):
    """One line on stderr and exit code 2, nothing on stdout."""
    done = subprocess.run([sys.executable, script, *given], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert named in done.stderr
