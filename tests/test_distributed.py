"""Two processes take the steps of one. Also in test_training.py: micro-batches equal one batch."""

import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_runs import arguments, make_files, run

from config import ROOT, InputError
from training import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STOP_AND_RESUME = """
import sys
from training.loop import Trainer
import sonnet_generation as script
end_epoch = Trainer.end_epoch
def end_and_stop(self):
    Trainer.end_epoch = end_epoch
    end_epoch(self)
    raise KeyboardInterrupt
Trainer.end_epoch = end_and_stop
try:
    script.main(script.parse_options(sys.argv[1:]))
except KeyboardInterrupt:
    script.main(script.parse_options([*sys.argv[1:], "--resume"]))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_resume_and_take_the_steps_of_one(tmp_path):
    """Batches of four and of one sonnet, in micro-batches: the second process has none of the last.

    Only the main process prints and writes. A key's bias is compared no closer: it moves all scores
    of a row alike, so its gradient is a rounding error, of which AdamW makes a step.
    """
    files = make_files(tmp_path, dropout=0.0)
    more = ["--grad_accumulation=2", "--lr=0.001"]
    (tmp_path / "script.py").write_text(STOP_AND_RESUME)
    command = [*TORCHRUN, "script.py", *arguments(files, "sonnets-full", tmp_path / "two", *more)]
    settings = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True}
    result = subprocess.run(command, timeout=300, **settings)
    assert result.returncode == 0, result.stderr
    for line in ("epoch  1/2", "epoch  2/2"):
        assert result.stdout.count(line) == 1

    run(files, "sonnets-full", tmp_path / "one", *more)
    tables = [pd.read_csv(tmp_path / name / "steps.csv") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5)
    weights = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("one", "two")]
    for state in weights:
        state.pop("transformer.h.0.attn.c_attn.bias")
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="has another processes"):
        run(files, "sonnets-full", tmp_path / "two", *more, "--resume")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_an_error_of_the_main_process_ends_all(tmp_path):
    """Here a folder that cannot be locked; the other process waits for its name."""
    files = make_files(tmp_path)
    command = [*TORCHRUN, str(ROOT / "sonnet_generation.py")]
    command += arguments(files, "sonnets-full", files / "sonnets.txt")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert result.returncode != 0
    assert re.search("error: .*sonnets.txt", result.stderr)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_micro_batches_are_a_partition(monkeypatch, processes, count):
    """All processes have the same number, because they wait for each other."""
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    for size in range(1, 12):
        shares = []
        for rank in range(processes):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(distributed.micro_batches(list(range(size)), count))
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) <= count
        indices = [index for share in shares for part in share for index in part]
        assert sorted(indices) == list(range(size))
