"""benchmarks/machine.py: a part that fails is a row, and the other parts still run."""

import sys
import time
import types
from pathlib import Path

import pytest
import torch

from config import BUNDLED_MODEL

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def machine(monkeypatch):
    """The module; benchmarks import each other as scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import machine

    return machine


def test_every_part_is_a_row(machine, capsys):
    """A part that fails in any way does not stop the others."""

    def fail(folder, seconds):
        raise ZeroDivisionError("a | b\nc")

    def measure(folder, seconds):
        assert folder.is_dir()
        return "done", "| its | table |\n"

    parts = [
        machine.Part("broken", fail),
        machine.Part("many GPUs", None),
        machine.Part("speed", measure),
    ]
    outcomes, tables, failed = machine.run_parts(parts, 60)
    assert outcomes.splitlines()[2:] == [
        "| broken | failed: a / b c | 0 |",
        "| many GPUs | not on this machine | 0 |",
        "| speed | done | 0 |",
    ]
    assert tables == ["## speed\n\n| its | table |\n"]
    assert failed
    assert "many GPUs: not on this machine" in capsys.readouterr().out
    assert not machine.run_parts(parts[1:], 60)[2]


def test_the_output_is_one_table_per_part(machine, tmp_path, monkeypatch, capsys):
    """Machine, outcomes and the parts' own tables, in the file and on the screen; exit code 1."""

    def fail(folder, seconds):
        raise RuntimeError("out of memory")

    parts = [machine.Part("one", lambda folder, seconds: ("done", "ITS TABLE\n"))]
    monkeypatch.setattr(machine, "make_parts", lambda *arguments: parts)
    out = tmp_path / "machine.md"
    assert machine.main(["--quick", f"--out={out}"]) == 0
    text = out.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    assert "| one | done | 0 |" in text
    assert text.endswith("## one\n\nITS TABLE\n")
    parts.append(machine.Part("two", fail))
    assert machine.main(["--quick", f"--out={out}"]) == 1
    assert "| two | failed: out of memory | 0 |" in out.read_text(encoding="utf-8")


def test_parts_that_need_a_gpu_are_not_on_a_cpu(machine):
    """And float16 is in none of them."""
    parts = machine.make_parts("model", True, torch.device("cpu"))
    missing = [part.name for part in parts if part.work is None]
    assert missing == ["tests on CUDA", "torchrun"]
    assert not any("float16" in part.name.replace("bfloat16", "") for part in parts)
    assert {"parity", "sonnets, float32", "paraphrases, float32", "generation, float32"} <= {
        part.name for part in parts
    }


def test_a_command_fails_with_its_last_line_and_ends_in_time(machine):
    """Also processes that it has started end."""
    assert machine.call(["-c", "print('a'); print('b')"], 60) == "b"
    with pytest.raises(RuntimeError, match="no GPU"):
        machine.call(["-c", "import sys; print('x'); sys.exit('no GPU')"], 60)
    start = time.monotonic()
    child = "import subprocess; subprocess.run(['sleep', '60'])"
    with pytest.raises(RuntimeError, match="not finished after 1 s"):
        machine.call(["-c", child], 1)
    assert time.monotonic() - start < 20
    with pytest.raises(RuntimeError, match="no time is left"):
        machine.call(["-c", "1"], 0)


def test_a_compiled_case_is_measured(machine, monkeypatch):
    """One step of the bundled model in this process; the eager backend compiles nothing."""
    sonnets = sys.modules["sonnets"]
    monkeypatch.setattr(sonnets, "matmul_tflops", lambda device, dtype: 1.0)  # takes seconds
    options = types.SimpleNamespace(model=BUNDLED_MODEL, steps=1, backend="eager")
    case = sonnets.LORA_COMPILED
    metrics = sonnets.measure(options, case, torch.device("cpu"), torch.float32)
    assert metrics.keys() >= {"step_s", "first_step_s", "peak_gb", "limit_s", "tokens_per_step"}
    assert metrics["first_step_s"] > metrics["step_s"] > 0
