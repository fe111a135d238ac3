"""Bad input through the real commands: one line with value, file and way out; exit code 2."""

import json
import shutil
import time

import pytest
import torch
from kill_everywhere import SCRIPTS, make_data, make_model, options
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import save_adapter
from cli import exit_cleanly
from config import LoRAConfig
from datasets import read_pairs, read_sonnets
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ParaphraseGPT

SONNET = "1\n\na b\nc d\ne f\ng h\n"
HEADER = "id\tsentence1\tsentence2\tis_duplicate\n"
PAIR = "a\tx y\tz\t1\n"
BOTH = pytest.mark.parametrize("task", SCRIPTS)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A one-layer model, another of another width, data, and an adapter and a classifier."""
    root = tmp_path_factory.mktemp("kit")
    make_model(root / "model")
    make_model(root / "wide", width=32)
    make_data(root)
    gpt = GPT2Model.from_pretrained(root / "model")
    ParaphraseGPT(gpt, "generalized").save_pretrained(root / "classifier")
    save_adapter(apply_lora(gpt, LoRAConfig(rank=2)), root / "adapter")
    return root


@pytest.fixture
def rejected(kit, tmp_path, capsys, monkeypatch):
    """Run a command as the script does, and return its line; nothing may have been written."""
    monkeypatch.chdir(tmp_path)

    def run(task, *more, bare=False):
        given = list(more)
        if not bare:
            given = options(kit, f"{task}-full", tmp_path / "run", *more)
        with pytest.raises(SystemExit) as stop, exit_cleanly():
            SCRIPTS[task].main(SCRIPTS[task].parse_options(given))
        error = capsys.readouterr().err
        assert stop.value.code == 2, error[:500]
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return error

    return run


SONNETS = {
    "missing": (None, "No such file", "check the path"),
    "empty": (b"", "contains no sonnet", "expected a number"),
    "no number": (b"From fairest creatures\n", "contains no sonnet", "expected a number"),
    "truncated": (b"1\n\na b\nc\n\n2\n", "sonnet 2 has 0 characters", "complete"),
    "UTF-16": (SONNET.encode("utf-16"), "not UTF-8", "save it as UTF-8"),
    "UTF-16 without a mark": (SONNET.encode("utf-16-le"), "NUL bytes", "save it as UTF-8"),
    "NUL": (b"1\n\na\0b\n", "NUL bytes", "save it as UTF-8"),
    "Latin-1": ("1\n\ncaf\xe9\n".encode("latin-1"), "not UTF-8", "save it as UTF-8"),
    "number twice": ((SONNET + SONNET).encode(), "id 1 occurs more than once", "rename one"),
    "a million tokens": (("1\n" + "a b\nc d\n" * 100_000).encode(), "characters", "shorten"),
    "too many tokens": (b"1\n\na b\n" + b"c d\n" * 300, "tokens; the model"),
    "a line of 10 MB": (b"1\n" + b"x" * 10_000_000, "characters", "shorten"),
    "10 MB of blanks": (b"1\n" + b" " * 10_000_000 + b"x\ny\nz\nw", "characters", "shorten"),
    "csv: wrong columns": (b"number,poem\n1,a\n", "no column id", "number, poem"),
    "csv: empty": (b"", "no column id"),
    "csv: header alone": (b"id,text\n", "contains no sonnet", "expected"),
    "csv: id": (b"id,text\none,a\n", "id 'one'", "is not the number of a sonnet"),
    "csv: truncated": (b'id,text\n1,"a\nb\n', "line 3", "unexpected end", "not closed"),
    "csv: more fields": (b"id,text\n1,a,b\n", "line 2", "3 fields", "quote missing"),
    "csv: a line of 10 MB": (b"id,text\n1," + b"x" * 10_000_000 + b"\n", "characters", "shorten"),
}


@pytest.mark.parametrize("option", ["sonnet_path", "held_out_sonnet_path"])
@pytest.mark.parametrize("kind", SONNETS)
def test_files_of_sonnets(rejected, tmp_path, kind, option):
    """To train on and to continue: the second is also rejected before training."""
    content, *named = SONNETS[kind]
    path = tmp_path / ("sonnets.csv" if kind.startswith("csv") else "sonnets.txt")
    if content is not None:
        path.write_bytes(content)
    started = time.perf_counter()
    error = rejected("sonnets", f"--{option}={path}")
    assert all(word in error for word in named), error
    assert str(path) in error or "tokens; the model" in error
    assert time.perf_counter() - started < 20  # slow machines included


LABELS = {
    f"label {label}": (
        (HEADER + PAIR.replace("1", label)).encode(),
        f"the label is '{label}'",
        "line 2",
        "write 0 or 1",
    )
    for label in ("2", "nan", "yes", "-1", "1e0", "True")
}
PAIRS = LABELS | {
    "missing": (None, "No such file", "check the path"),
    "empty": (b"", "no column id"),
    "header alone": (HEADER.encode(), "no pair"),
    "wrong columns": (b"id\tquestion1\tquestion2\n", "no column sentence1", "question1"),
    "commas": (HEADER.replace("\t", ",").encode(), "no column", "id,sentence1"),
    "UTF-16": ((HEADER + PAIR).encode("utf-16"), "not UTF-8", "save it as UTF-8"),
    "UTF-16 without a mark": ((HEADER + PAIR).encode("utf-16-le"), "NUL bytes", "save it"),
    "NUL": (HEADER.encode() + b"a\tx\0\ty\t1\n", "NUL bytes", "save it as UTF-8"),
    "a line of tabs": (HEADER.encode() + b"\t" * 10_000_000 + b"\n", "10000001 fields", "line 2"),
    "truncated in a quote": (HEADER.encode() + b'a\tx\t"y z', "line 2", "quote"),
    "id twice": ((HEADER + PAIR + PAIR).encode(), "id a occurs more than once", "rename one"),
    "id with a comma": ((HEADER + PAIR.replace("a", "a,b")).encode(), "'a,b'", "line 2"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_files_of_pairs(rejected, tmp_path, kind):
    """The same for pairs, as train and as test."""
    content, *named = PAIRS[kind]
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content)
    for split in ("train", "test"):
        error = rejected("paraphrases", f"--para_{split}={path}")
        assert str(path) in error
        assert all(word in error for word in named), error


def test_unlabeled_pairs_cannot_be_trained_on(rejected, tmp_path):
    """Only test pairs may lack the column."""
    path = tmp_path / "pairs.csv"
    path.write_text("id\tsentence1\tsentence2\na\tx\ty\n")
    for split in ("train", "dev"):
        error = rejected("paraphrases", f"--para_{split}={path}")
        assert f"{path} has no labels" in error


@pytest.mark.parametrize(
    "change",
    [str, lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")],
    ids=["as is", "BOM", "CRLF"],
)
def test_what_editors_do_is_read(tmp_path, change):
    """A byte-order mark and Windows line ends are not errors."""
    path = tmp_path / "data"
    path.write_bytes(change(SONNET).encode())
    assert read_sonnets(path)["text"].tolist() == ["a b\nc d\ne f\ng h"]
    path.write_bytes(change(HEADER + PAIR).encode())
    pairs = read_pairs(path)
    assert pairs[["id", "sentence1", "label"]].to_numpy().tolist() == [["a", "x y", 1.0]]


NUMBERS = [
    ("--epochs=-1", "--epochs"),
    ("--epochs=1.5", "1.5"),
    ("--epochs=" + "9" * 5000, "--epochs"),
    ("--batch_size=0", "--batch_size"),
    ("--lr=-0.1", "--lr"),
    ("--lr=nan", "nan"),
    ("--lr=inf", "inf"),
    ("--lr=0", "--lr"),
    ("--lr=many", "many"),
    ("--warmup=1", "--warmup"),
    ("--warmup=-0.1", "--warmup"),
    ("--seed=-1", "--seed"),
    ("--seed=9223372036854775808", "--seed"),
    ("--patience=-1", "--patience"),
    ("--grad_accumulation=0", "--grad_accumulation"),
    ("--weight_decay=nan", "--weight_decay"),
    ("--max_grad_norm=-1", "--max_grad_norm"),
    ("--checkpoint_every=-1", "--checkpoint_every"),
    ("--schedule=none", "none"),
    ("--dtype=int8", "int8"),
    ("--dtype=float16", "needs CUDA"),
    ("--device=tpu", "tpu"),
    ("--device=cuda:99", "cuda:99"),
    ("--device=cuda:x", "cuda:x"),
    ("--use_gpu", "--device cpu"),
    ("--mystery=1", "--mystery"),
    ("--model_size=gpt3", "gpt3"),
    ("--model_size=", "neither"),
    ("--model_size=" + "x" * 5000, "neither"),
    ("--use_lora --lora_rank=0", "lora_rank"),
    ("--use_lora --lora_rank=10000", "rank 10000"),
    ("--use_lora --lora_alpha=0", "lora_alpha"),
    ("--use_lora --lora_alpha=inf", "lora_alpha"),
    ("--use_lora --lora_dropout=1", "lora_dropout"),
    ("--use_lora --lora_dropout=nan", "lora_dropout"),
    ("--use_lora --lora_targets c_attn", "c_attn"),
    ("--lora_rank=8", "without --use_lora"),
    ("--lora_alpha=8", "without --use_lora"),
    ("--lora_targets q_proj", "without --use_lora"),
]


@BOTH
@pytest.mark.parametrize(("given", "named"), NUMBERS, ids=[given[:40] for given, _ in NUMBERS])
def test_options_of_both_tasks(rejected, task, given, named):
    """Out of range, not a number, unknown, or without the option that they belong to."""
    assert named in rejected(task, *given.split(" "))


OWN = [
    ("sonnets", "--temperature=-1", "temperature"),
    ("sonnets", "--temperature=nan", "temperature"),
    ("sonnets", "--top_p=0", "top_p"),
    ("sonnets", "--top_p=2", "top_p"),
    ("sonnets", "--top_k=-1", "top_k"),
    ("sonnets", "--max_new_tokens=0", "max_new_tokens"),
    ("sonnets", "--adapter=x", "without --generate_only"),
    ("sonnets", "--model=x", "without --generate_only"),
    ("paraphrases", "--pooling=median", "median"),
    ("paraphrases", "--attention_penalty=1", "multihead"),
    ("paraphrases", "--pooling=multihead --attention_penalty=-1", "attention_penalty"),
    ("paraphrases", "--pooling=multihead --vector_penalty=nan", "vector_penalty"),
    ("paraphrases", "--pair_encoding=both", "both"),
    ("paraphrases", "--dataset=snli", "snli"),
    ("paraphrases", "--model=x", "--predict_only"),
]


@pytest.mark.parametrize(("task", "given", "named"), OWN)
def test_options_of_one_task(rejected, task, given, named):
    """Values out of range, and options of another mode."""
    assert named in rejected(task, *given.split())


GENERATE = "sonnets --generate_only"
PREDICT = "paraphrases --predict_only --model=x"
TRAINING = "--use_lora --lr=0.1 --epochs=9 --patience=1 --resume --out_dir=x --lora_rank=2".split()
IGNORED = [(mode, option) for mode in (GENERATE, PREDICT) for option in TRAINING]
IGNORED += [
    (GENERATE, option)
    for option in (
        "--batch_size=2",
        "--schedule=linear",
        "--gradient_checkpointing",
        "--compile",
        "--sonnet_path=x",
        "--dev_sonnet_path=x",
    )
]
IGNORED += [(f"{GENERATE} --model=x", "--model_size=y")]
IGNORED += [
    (PREDICT, option)
    for option in (
        "--pooling=max",
        "--pair_encoding=joint",
        "--para_train=x",
        "--attention_penalty=1",
        "--seed=1",
        "--model_size=y",
    )
]


@pytest.mark.parametrize(("mode", "option"), IGNORED)
def test_an_option_that_a_mode_would_ignore_is_rejected(rejected, mode, option):
    """An option without effect is a misunderstanding: the result is not what its user thinks."""
    task, *given = mode.split()
    error = rejected(task, *given, option, bare=True)
    assert option.split("=")[0] in error
    assert "has no effect" in error


@BOTH
def test_the_report_preset_only_sets_defaults(task):
    """Only what stands on the command line can be without effect."""
    mode = ("--generate_only",) if task == "sonnets" else ("--predict_only", "--model=x")
    assert SCRIPTS[task].parse_options(["--preset=report", *mode]).model_size == "gpt2"


def test_an_output_that_would_replace_something_is_rejected(rejected, kit, tmp_path):
    """An input, another output, a folder, a path below a file: before training, nothing is lost."""
    (tmp_path / "file").write_text("kept")
    before = (kit / "sonnets.txt").read_bytes()
    (kit / "folder").mkdir(exist_ok=True)
    for path, named in (
        (kit / "sonnets.txt", "is also the file of --held_out_sonnet_path"),
        (kit / "folder", "is not a file"),
        (tmp_path / "file" / "out.txt", "is not a writable folder"),
        ("", "is not a file"),
        ("/", "is not a file"),
        ("/dev/null", "is not a file"),
    ):
        assert named in rejected("sonnets", f"--sonnet_out={path}")
    outputs = [f"--para_{split}_out={tmp_path / 'out.csv'}" for split in ("dev", "test")]
    assert "is also the file of --para_dev_out" in rejected("paraphrases", *outputs)
    error = rejected("paraphrases", f"--para_test_out={kit / 'pairs.csv'}")
    assert "is also the file of --para_test" in error
    assert (kit / "sonnets.txt").read_bytes() == before
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "--out_dir" in rejected("sonnets", f"--out_dir={place}")
    assert (tmp_path / "file").read_text() == "kept"


def spoil(folder, kind):
    """Make a model folder wrong in one way."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    config = json.loads((folder / "config.json").read_text())
    if kind == "weights of another size":
        tensors["transformer.wte.weight"] = torch.zeros(300, 8)
    elif kind == "extra tensor":
        tensors["transformer.h.7.ln_1.weight"] = torch.zeros(16)
    elif kind == "missing tensor":
        del tensors["transformer.ln_f.weight"]
    elif kind == "NaN":
        tensors["transformer.ln_f.weight"] = torch.full((16,), float("nan"))
    elif kind == "untied head":
        tensors["lm_head.weight"] = torch.ones(300, 16)
    elif kind.startswith("{"):
        config |= json.loads(kind)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "no weights":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif kind == "tokenizer cut short":
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_bytes(tokenizer.read_bytes()[:500])
    elif kind == "no config.json":
        (folder / "config.json").unlink()
    elif kind == "config.json cut short":
        (folder / "config.json").write_text(json.dumps(config)[:40])


MODELS = {
    "no config.json": "config.json",
    "config.json cut short": "not the configuration",
    "no weights": "no weights",
    "weights of another size": "wte.weight has shape (300, 8)",
    "extra tensor": "unknown transformer.h.7.ln_1",
    "missing tensor": "lack transformer.ln_f.weight",
    "untied head": "lm_head.weight differs",
    "cut short": "weights",
    "empty": "weights",
    "NaN": "ln_f.weight is not finite",
    "no tokenizer": "has no tokenizer",
    "tokenizer cut short": "tokenizer",
    '{"n_layer": 1000000000}': "n_layer",
    '{"vocab_size": 1000000000000000000}': "vocab_size",
    '{"n_embd": "x"}': "n_embd",
    '{"n_head": 0}': "n_head",
    '{"n_head": 3}': "not divisible",
    '{"resid_pdrop": []}': "resid_pdrop",
    '{"layer_norm_epsilon": "x"}': "layer_norm_epsilon",
    '{"n_embd": null}': "n_embd",
    '{"n_positions": true}': "n_positions",
    '{"activation_function": "relu"}': "activation_function",
    '{"model_type": "llama"}': "model_type",
}


@pytest.mark.parametrize("kind", MODELS)
@BOTH
def test_model_folders(rejected, kit, tmp_path, task, kind):
    """Half copied, cut short, of another shape, or claiming sizes that no machine has."""
    copy = tmp_path / "copy"
    shutil.copytree(kit / "model", copy)
    spoil(copy, kind)
    error = rejected(task, f"--model_size={copy}")
    assert MODELS[kind] in error
    assert str(copy) in error
    assert "weights_only" not in error


@BOTH
def test_weights_that_are_not_finite_predict_nothing(rejected, kit, tmp_path, task):
    """NaN in a file is neither a traceback nor a text."""
    name = {"sonnets": "model", "paraphrases": "classifier"}[task]
    shutil.copytree(kit / name, tmp_path / "copy")
    spoil(tmp_path / "copy", "NaN")
    given = ["--generate_only", f"--held_out_sonnet_path={kit / 'sonnets.txt'}"]
    if task == "paraphrases":
        given = ["--predict_only", f"--para_dev={kit / 'pairs.csv'}"]
        given.append(f"--para_test={kit / 'pairs.csv'}")
    error = rejected(task, *given, f"--model={tmp_path / 'copy'}", bare=True)
    assert "not finite" in error


def test_a_text_with_a_token_that_the_model_lacks_is_rejected(rejected, kit, tmp_path):
    """The tokenizer of another model: the token is named, and the size of the vocabulary."""
    copy = tmp_path / "copy"
    shutil.copytree(kit / "model", copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:40].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    changes = {"vocab_size": 40, "eos_token_id": 0, "bos_token_id": 0}
    (copy / "config.json").write_text(json.dumps(config | changes))
    for task in SCRIPTS:
        error = rejected(task, f"--model_size={copy}")
        assert "a text contains" in error
        assert "40 tokens" in error


def test_adapters(rejected, kit, tmp_path):
    """Of another base, another target, cut short, without a file, and no adapter at all."""
    given = ["--generate_only", f"--held_out_sonnet_path={kit / 'sonnets.txt'}"]
    other = [f"--adapter={kit / 'adapter'}", f"--model_size={kit / 'wide'}"]
    assert "another base" in rejected("sonnets", *given, *other, bare=True)
    copy, path = tmp_path / "copy", tmp_path / "copy" / "adapter_model.safetensors"
    given += [f"--model_size={kit / 'model'}", f"--adapter={copy}"]
    assert "adapter_config.json" in rejected("sonnets", *given, bare=True)
    shutil.copytree(kit / "adapter", copy)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = next(name for name in tensors if "c_attn.lora_A" in name)
    for changed, named in (
        ({name.replace("h.0.attn.c_attn", "lm_head"): torch.zeros(2, 16)}, "another model"),
        ({name: torch.zeros(5, 5)}, "another model"),
        ({name: torch.zeros(())}, "another model"),
        ({name.replace("_A", "_B"): torch.zeros(0, 2)}, "another model"),
    ):
        save_file(tensors | changed, path, metadata=metadata)
        assert named in rejected("sonnets", *given, bare=True)
    path.write_bytes(path.read_bytes()[:-50])
    assert "not a readable LoRA adapter" in rejected("sonnets", *given, bare=True)


MULTIHEAD = {"pooling": "multihead", "pair_encoding": "joint"}
HEADS = [
    (MULTIHEAD | {"heads": 10**12}, "heads"),
    (MULTIHEAD | {"heads": 0}, "heads"),
    (MULTIHEAD | {"heads": "many"}, "heads"),
    ({"pooling": "median", "pair_encoding": "joint"}, "median"),
    ({"pooling": ["max"]}, "unhashable"),
    ([], "head"),
    ({"pooling": "max", "pair_encoding": "both"}, "both"),
    ({"pooling": "mean", "surprise": 1}, "surprise"),
    ({"pooling": "last", "pair_encoding": "joint"}, "not the head"),
    (None, "not the head"),
]


@pytest.mark.parametrize(("settings", "named"), HEADS, ids=str)
def test_heads(rejected, kit, tmp_path, settings, named):
    """The metadata is anyone's text: any number of heads must not take any amount of memory."""
    shutil.copytree(kit / "classifier", tmp_path / "copy")
    path = tmp_path / "copy" / "head.safetensors"
    metadata = None if settings is None else {"settings": json.dumps(settings)}
    save_file(load_file(path), path, metadata=metadata)
    files = [f"--para_{split}={kit / 'pairs.csv'}" for split in ("dev", "test")]
    given = ["--predict_only", f"--model={tmp_path / 'copy'}", *files]
    error = rejected("paraphrases", *given, bare=True)
    assert named in error
    assert str(path) in error


@pytest.mark.parametrize(
    "settings",
    ["--temperature=1e-320 --top_p=1e-12", f"--top_k={10**30} --max_new_tokens={10**30}"],
)
def test_extreme_values_that_are_allowed_work(kit, tmp_path, settings):
    """float32 rounds 1e-320 to 0, which left no token to sample."""
    script, path = SCRIPTS["sonnets"], tmp_path / "out.txt"
    given = ["--generate_only", f"--model={kit / 'model'}", "--device=cpu", *settings.split()]
    given += [f"--held_out_sonnet_path={kit / 'sonnets.txt'}", f"--sonnet_out={path}"]
    script.main(script.parse_options(given))
    assert "From fairest" in path.read_text(encoding="utf-8")
