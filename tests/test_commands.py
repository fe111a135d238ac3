"""The user's command as a process: help, exit codes, errors without a traceback, a real kill and --resume."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMED = {"seconds", "tokens_per_second", "peak_memory_gb"}
SONNETS = "".join(f"\n{number}\n\nFrom fairest\ncreatures\nwe {number}\ndesire\n" for number in range(1, 9))


def start(*options):
    command = [sys.executable, "sonnet_generation.py", *map(str, options)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def command(folder, tmp_path):
    """The options of a run on the tiny model and eight short sonnets, without its --out_dir."""
    path = tmp_path / "sonnets.txt"
    path.write_text(SONNETS, encoding="utf-8")
    files = [f"--{name}={path}" for name in ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path")]
    sizes = ["--max_new_tokens=4", "--batch_size=2", "--patience=0", "--checkpoint_every=3", "--device=cpu"]
    return [*files, *sizes, f"--model_size={folder}", f"--sonnet_out={tmp_path / 'out.txt'}", "--lr=0.001"]


def left_behind(run):
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]
    return rows, {path.name: path.read_bytes() for path in sorted((run / "best").iterdir())}


def test_help_names_every_option_and_needs_no_torch():
    """--help must appear at once: torch is imported only once there is something to do."""
    code, out, err = finish(start("--help"))
    assert (code, err) == (0, "")
    assert all(option in out for option in ("--use_lora", "--lora_rank", "--lr", "--resume", "--generate_only"))
    probe = "import sys, sonnet_generation; sonnet_generation.parse_options([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(("options", "named"), [
    (["--sonnet_path=absent.csv"], "absent.csv"), (["--epochs=-1"], "--epochs"), (["--lr=many"], "many"),
    (["--model_size=absent"], "absent"), (["--top_p=2"], "top_p"), (["--use_gru"], "--use_gru"),
    (["--lora_targets", "q_proj", "c_attn"], "c_attn"),
])  # fmt: skip
def test_bad_input_ends_with_a_line_and_2(options, named):
    """The message names the value; no traceback."""
    code, _, err = finish(start(*options))
    assert code == 2
    assert named in err.splitlines()[-1]
    assert "Traceback" not in err


def test_the_hub_out_of_reach_names_the_ways_out(tmp_path, monkeypatch):
    """gpt2 with an empty cache and no network: one line, and what works without."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = finish(start("--model_size=gpt2", f"--out_dir={tmp_path / 'run'}"))
    assert code == 2
    assert "tiny" in err
    assert "HF_HOME" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("method", "number"),
    [([], signal.SIGKILL), (["--use_lora"], signal.SIGKILL), (["--use_lora"], signal.SIGTERM)],
    ids=["full-kill", "lora-kill", "lora-term"],
)
def test_killed_and_resumed_equals_uninterrupted(command, tmp_path, method, number):
    """SIGKILL or SIGTERM in the middle of an epoch, then --resume: best/ and metrics.csv are the same, dropout on."""
    options = [*command, *method, "--epochs=30"]
    code, _, err = finish(start(*options, f"--out_dir={tmp_path / 'whole'}"))
    assert code == 0, err
    run = tmp_path / "cut"
    process = start(*options, f"--out_dir={run}")
    while not (run / "resume" / "state.pt").exists():  # saved at the third of an epoch's four steps
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == (-9 if number == signal.SIGKILL else 143), err
    assert ("--resume" in err) == (number == signal.SIGTERM)
    assert not (run / "summary.json").exists()
    code, out, err = finish(start(*options, f"--out_dir={run}", "--resume"))
    assert code == 0, err
    assert "goes on with" in out
    assert left_behind(run) == left_behind(tmp_path / "whole")
