"""Bad input through the real commands: one line with value and way out, exit code 2, no file."""

import errno
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import HEADER, SCRIPTS, arguments, command, make_files, run

from training.options import exit_cleanly
from training.runs import Run

BOTH = ("sonnets", "paraphrases")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, data, and an adapter and a classifier as runs leave them."""
    root = make_files(tmp_path_factory.mktemp("files"))
    for kind in ("sonnets-lora", "paraphrases-full"):
        shutil.copytree(run(root, kind, root / "run", "--epochs=1") / "best", root / kind)
        shutil.rmtree(root / "run")
    (root / "file").touch()
    (root / "prompts.txt").write_text("1\na\nb\nc\n")
    (root / "nolabels.csv").write_text("id\tsentence1\tsentence2\na\tx\ty\n")
    (root / "nopairs.csv").write_text(HEADER)
    (root / "notexts.csv").write_text(HEADER + "a\t\ty\t1\n")
    (root / "badlabel.csv").write_text(HEADER + "a\tx\ty\t2\n")
    (root / "long.txt").write_text("1\n" + "word by word\n" * 99)
    (root / "empty").write_text("")
    (root / "latin").write_bytes(b"1\ncaf\xe9\n")
    (root / "predictions.csv").write_text("id\np0, maybe\n")
    (root / "few.csv").write_text("id\np0, 1\n")
    return root


def stop(task, given, capsys):
    """The exit code and the one line on the screen of a command that fails."""
    with pytest.raises(SystemExit) as caught, exit_cleanly():
        command(task, given)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return caught.value.code, error


OPTIONS = [
    (BOTH, "--epochs=-1", "epochs must be a whole number of at least 0"),
    (BOTH, "--epochs=1.5", "argument --epochs: invalid int value: '1.5'"),
    (BOTH, "--batch_size=0", "batch_size must be .* not 0"),
    (BOTH, "--grad_accumulation=0", "grad_accumulation must"),
    (BOTH, "--lr=nan", "lr must be a number of at least 1e-12 and below 1000, not nan"),
    (BOTH, "--lr=0", "lr must"),
    (BOTH, "--lr=many", "'many'"),
    (BOTH, "--warmup=1", "warmup must be a number of at least 0 and below 1, not 1.0"),
    (BOTH, "--seed=9223372036854775808", "seed must"),
    (BOTH, "--patience=-1", "patience must"),
    (BOTH, "--weight_decay=inf", "weight_decay must"),
    (BOTH, "--max_grad_norm=-1", "max_grad_norm must"),
    (BOTH, "--checkpoint_every=-1", "checkpoint_every must"),
    (BOTH, "--dropout=1", "dropout must be a number of at least 0 and below 1, not 1.0"),
    (BOTH, "--schedule=none", "invalid choice: 'none'"),
    (BOTH, "--dtype=float16", "--dtype float16 needs CUDA; use auto"),
    (BOTH, "--device=tpu", "--device tpu is not possible here; use auto, cpu, or cuda"),
    (BOTH, "--device=cuda:99", "there is no device cuda:99 here"),
    (BOTH, "--use_gpu", "--device cpu is not possible here"),
    (BOTH, "--batchsize=1", r"--batchsize=1; did you mean --batch_size\?"),
    (BOTH, "--mystery", "unrecognized arguments: --mystery; --help lists all options"),
    (BOTH, "--model_size=gpt3", "gpt3 is neither one of tiny, gpt2, .* nor a folder"),
    (BOTH, "--model_size={}/file", "file is neither"),
    (BOTH, "--use_lora --lora_rank=0", "rank must be a whole number of at least 1"),
    (BOTH, "--use_lora --lora_rank=17", "lora_rank 17 does not fit a 16 x 16 weight: reduce it"),
    (BOTH, "--use_lora --lora_alpha=0", "alpha must"),
    (BOTH, "--use_lora --lora_dropout=1", "dropout must"),
    (BOTH, "--use_lora --lora_targets c_attn", "invalid choice: 'c_attn'"),
    (BOTH, "--out_dir={}/file", "file is a file, or inside of one; name a folder"),
    (BOTH, "--out_dir={}/file/below", "below is a file, or inside of one; name a folder"),
    ("sonnets", "--temperature=-1", "temperature must"),
    ("sonnets", "--top_p=2", "top_p must"),
    ("sonnets", "--top_k=-1", "top_k must"),
    ("sonnets", "--repetition_penalty=0", "repetition_penalty must"),
    ("sonnets", "--max_lines=-1", "max_lines must"),
    ("sonnets", "--max_new_tokens=-1", "max_new_tokens must"),
    ("sonnets", "--sonnet_path=absent.csv", "absent.csv cannot be read .* check the path"),
    ("sonnets", "--sonnet_path={}/empty", "empty contains no sonnet: expected a number"),
    ("sonnets", "--sonnet_path={}/latin", "latin is not UTF-8 .byte 5.; save it as UTF-8"),
    ("sonnets", "--held_out_sonnet_path={}/empty", "empty contains no sonnet"),
    ("sonnets", "--sonnet_path={}/long.txt", "sonnet 1 has .* tokens; the model reads 64"),
    ("sonnets", "--dev_sonnet_path={}/prompts.txt", "dev sonnet 1 has no lines after the prompt"),
    ("sonnets", "--sonnet_out={}/sonnets.txt", "sonnets.txt is an input"),
    ("sonnets", "--sonnet_out={}/model", "--sonnet_out .*model is an input.*a folder"),
    ("sonnets", "--sonnet_out={}/file/out.txt", "inside of a file"),
    ("sonnets", "--score={}/empty", "empty contains no sonnet"),
    ("sonnets", "--score={}/prompts.txt", "prompts.txt lacks the sonnets 2, 3, 4, 5; add them"),
    ("sonnets", "--generate=absent", "absent is neither"),
    ("sonnets", "--generate={}/model --prompt=", "--prompt '' is empty; give a text"),
    ("sonnets", "--generate={}/model --prompt=a --num_samples=0", "num_samples must"),
    ("paraphrases", "--pooling=median", "invalid choice: 'median'"),
    ("paraphrases", "--pair_encoding=both", "invalid choice: 'both'"),
    ("paraphrases", "--dataset=snli", "invalid choice: 'snli'"),
    ("paraphrases", "--attention_penalty=1", "--attention_penalty needs --pooling multihead, not generalized"),
    ("paraphrases", "--pooling=multihead --vector_penalty=-1", "a penalty must"),
    ("paraphrases", "--pooling=multihead --vector_penalty=nan", "a penalty must"),
    ("paraphrases", "--use_lora --freeze_gpt", "--use_lora trains GPT-2 and --freeze_gpt does not"),
    ("paraphrases", "--para_train=absent.csv", "absent.csv does not exist; check the path"),
    ("paraphrases", "--para_test={}/empty", "empty has no column id, sentence1, sentence2"),
    ("paraphrases", "--para_train={}/badlabel.csv", "badlabel.csv, line 2: label is '2'; write 0"),
    ("paraphrases", "--para_test={}/badlabel.csv", "badlabel.csv, line 2: label is '2'; write 0"),
    ("paraphrases", "--para_train={}/nopairs.csv", "nopairs.csv has no labels"),
    ("paraphrases", "--para_dev={}/nolabels.csv", "nolabels.csv has no labels in is_duplicate"),
    ("paraphrases", "--para_test={}/nopairs.csv", "the test pairs: no pair has two texts"),
    ("paraphrases", "--para_train={}/notexts.csv", "the train pairs: no pair has two texts"),
    ("paraphrases", "--para_test_out={}/pairs.csv", "pairs.csv is an input"),
    ("paraphrases", "--para_dev_out={}/x --para_test_out={}/x", "--para_test_out .*another output"),
    ("paraphrases", "--predict={}/model", "head.safetensors not found; name the best/ folder"),
    ("paraphrases", "--predict={}/paraphrases-full --pair a ", "has an empty text; give two texts"),
    ("paraphrases", "--score={}/predictions.csv", "'p0, maybe' is not an id, a comma, and 0 or 1"),
    ("paraphrases", "--score={}/few.csv", "few.csv lacks 6 ids, among them p1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        (task, given, message)
        for tasks, given, message in OPTIONS
        for task in ([tasks] if isinstance(tasks, str) else tasks)
    ],
)
def test_bad_options_and_files(files, tmp_path, monkeypatch, capsys, task, given, message):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    more = given.replace("{}", str(files)).split(" ")
    code, error = stop(task, arguments(files, f"{task}-full", tmp_path / "run", *more), capsys)
    assert re.match(f"error: .*{message}", error), error
    assert code == 2
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--dataset=quora", r"quora-train.csv does not exist; .* data/README.md for the script"),
        ("--para_train=x", "--para_dev, --para_test is missing too; or name a --dataset"),
        ("--predict=x --para_test=y", "--para_dev is missing too"),
    ],
)
def test_incomplete_data_sets(tmp_path, monkeypatch, capsys, given, message):
    """A set is not completed with the files of another."""
    monkeypatch.setattr(SCRIPTS["paraphrases"], "ROOT", tmp_path)
    assert re.match(f"error: .*{message}", stop("paraphrases", given.split(), capsys)[1])


def spoil(folder, kind):
    """Make a model folder or classifier wrong in one way."""
    path = folder / "model.safetensors"
    tensors, config = load_file(path), json.loads((folder / "config.json").read_text())
    if kind == "missing tensor":
        del tensors["transformer.ln_f.weight"]
    elif kind == "NaN":
        tensors["transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    if kind.startswith("{"):
        (folder / "config.json").write_text(json.dumps(config | json.loads(kind)))
    elif kind == "half of the weights":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "no tokenizer":
        for name in folder.glob("tokenizer*"):
            name.unlink()
    elif kind == "no JSON":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing tensor", "ln_f.weight is missing"),
        ("NaN", "ln_f.weight is not finite"),
        ("half of the weights", "the weights cannot be read; copy them again"),
        ("no tokenizer", "has no tokenizer"),
        ("no JSON", "config.json is not the configuration of a GPT-2"),
        (
            '{"activation_function": "relu"}',
            "activation_function to 'relu'; .* 'gelu_pytorch_tanh'",
        ),
        ('{"n_head": 3}', "n_embd 16 is not divisible by n_head 3"),
    ],
)
def test_spoiled_models(files, tmp_path, capsys, kind, message):
    shutil.copytree(files / "model", tmp_path / "model")
    spoil(tmp_path / "model", kind)
    given = [f"--generate={tmp_path / 'model'}", "--prompt=a", "--device=cpu"]
    code, error = stop("sonnets", given, capsys)
    assert (code, bool(re.match(f"error: .*{message}", error))) == (
        2,
        True,
    ), error


def test_an_adapter_of_another_base(files, tmp_path, capsys):
    """Another model with the same shape is not what the adapter was trained on."""
    shutil.copytree(files / "sonnets-lora", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for name, message in (("absent", "adapter of the base model 'absent': absent is neither"),
                          (str(tmp_path / "model"), "was trained on another base")):  # fmt: skip
        config["base_model_name_or_path"] = name
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        make_files(tmp_path)
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        tensors["transformer.ln_f.weight"] += 1
        save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        code, error = stop("sonnets", [f"--generate={tmp_path / 'adapter'}", "--prompt=a"], capsys)
        assert (code, message in error) == (2, True), error


FAULTS = [
    (KeyboardInterrupt(), 130, "stopped; repeat the command with --resume to continue"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory; use a smaller --batch_size"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 1, "out of memory; use a smaller --batch_size"),
    (FloatingPointError("loss nan; try a smaller --lr"), 1, "loss nan; try a smaller --lr; saved"),
    (MemoryError(), 1, "out of memory; use a smaller --batch_size"),
    (OSError(errno.ENOSPC, "No space left", "f"), 1, "f: No space left; saved files are intact"),
]


@pytest.mark.parametrize(
    ("fault", "code", "message"), FAULTS, ids=[type(f).__name__ for f, _, _ in FAULTS]
)
def test_faults_during_a_run(files, tmp_path, monkeypatch, capsys, fault, code, message):
    """One line without a traceback; --resume completes the run."""

    def fail(self, state):
        raise fault

    given = arguments(files, "sonnets-lora", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", fail)
        found, error = stop("sonnets", given, capsys)
    assert (found, error.removeprefix("error: ").startswith(message)) == (code, True), error
    run(files, "sonnets-lora", tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), exit_cleanly():
        raise RuntimeError("a bug")
