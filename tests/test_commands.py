"""The user's command as a process: help, exit codes, a real kill, a signal, and --resume."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from sonnet_generation import main, parse_options

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("sonnet_generation", "paraphrase_detection", "experiments")
TIMED = ["seconds", "tokens_per_second", "peak_memory_gb"]
LINES = "From fairest\ncreatures\nwe {0}\ndesire\n"


def start(script, *options, code=""):
    command = [sys.executable, *(["-c", code] if code else [f"{script}.py"]), *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(autouse=True)
def one_thread():
    """Runs are compared bit by bit, and sums of several threads may differ in their last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture
def command(folder, tmp_path):
    """The options of a run with the tiny model and eight short sonnets, without its --out_dir."""
    path = tmp_path / "sonnets.txt"
    path.write_text("".join(f"\n{number}\n\n{LINES.format(number)}" for number in range(1, 9)))
    names = ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")
    files = [f"--{name}={path}" for name in names] + [f"--sonnet_out={tmp_path / 'out.txt'}"]
    sizes = ["--max_new_tokens=4", "--batch_size=2", "--patience=0", "--checkpoint_every=3"]
    model = [f"--model_size={folder}", "--lr=0.001", "--device=cpu", "--dtype=float32"]
    return [*files, *sizes, *model, "--epochs=10"]


def outcome(run):
    metrics = pd.read_csv(run / "metrics.csv", dtype=str).drop(columns=TIMED)
    files = {path.name: path.read_bytes() for path in (run / "best").iterdir()}
    card = files["README.md"].decode().replace(str(run), "RUN")
    files |= {"README.md": card, "steps.csv": (run / "steps.csv").read_bytes()}
    return metrics.to_dict("records"), files


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("sonnet_generation", "--use_lora --lora_rank --lr --resume --generate_only --top_p"),
        ("paraphrase_detection", "generalized multihead --para_train --predict_only --use_lora"),
        ("experiments", "sonnets poolings --seeds --jobs --rows --accept_other_code --no_new_runs"),
    ],
)
def test_help_names_the_options(script, words):
    """As a process, with nothing on stderr."""
    code, out, err = finish(start(script, "--help"))
    assert (code, err) == (0, "")
    assert all(word in out for word in words.split())


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_options_are_parsed_without_slow_imports(script):
    """--help and a mistyped option need neither transformers nor matplotlib, only torch."""
    code = (
        "import importlib, sys\n"
        "importlib.import_module(sys.argv[1]).parse_options([])\n"
        "print(sorted({'transformers', 'matplotlib', 'peft'} & set(sys.modules)))\n"
    )
    assert finish(start(None, script, code=code)) == (0, "[]\n", "")


@pytest.mark.parametrize(
    ("script", "given", "named"),
    [
        ("sonnet_generation", ["--sonnet_path=absent.csv"], "absent.csv"),
        ("paraphrase_detection", ["--para_dev_out=a", "--para_test_out=a"], "--para_dev_out"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_2(script, given, named):
    """The message names the value; nothing is on stdout."""
    code, out, err = finish(start(script, *given))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert named in err


@pytest.mark.parametrize(
    ("method", "number"),
    [([], signal.SIGKILL), (["--use_lora"], signal.SIGTERM)],
    ids=["full-kill", "lora-term"],
)
def test_killed_and_resumed_equals_uninterrupted(command, tmp_path, capsys, method, number):
    """In the middle of an epoch, with dropout: best/, steps.csv and metrics.csv are the same."""
    options = [*command, *method]
    main(parse_options([*options, f"--out_dir={tmp_path / 'whole'}"]))
    run = tmp_path / "cut"
    process = start("sonnet_generation", *options, f"--out_dir={run}")
    while not (run / "resume" / "state.pt").exists():  # saved at the third of four steps
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 143), err
    assert ("--resume" in err) == (number == signal.SIGTERM)
    assert not (run / "summary.json").exists()
    main(parse_options([*options, f"--out_dir={run}", "--resume"]))
    assert f"--resume continues {run}" in capsys.readouterr().out
    assert outcome(run) == outcome(tmp_path / "whole")
