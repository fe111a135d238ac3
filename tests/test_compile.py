"""--compile trains as eager mode does; the backend "eager" traces the model without compiling."""

import functools

import pandas as pd
import pytest
import torch
from small_runs import make_files, run


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing", "--use_lora"]])
def test_compiled_steps_are_those_of_eager_mode(tmp_path, monkeypatch, more):
    """The tests on CUDA compile with the default backend, which takes minutes on a CPU."""
    compiled, original = [], torch.nn.Module.compile
    traced = functools.partial(original, backend="eager", fullgraph=True)
    compile_ = lambda self, **given: compiled.append(given) or traced(self, **given)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    files, steps = make_files(tmp_path, dropout=0.0), []
    for options in ([], ["--compile"]):
        out = tmp_path / f"run{len(options)}"
        given = ["--epochs=1", "--lora_dropout=0", *more, *options]
        steps.append(pd.read_csv(run(files, "sonnets-full", out, *given) / "steps.csv"))
    assert compiled == [{"dynamic": True}]
    pd.testing.assert_frame_equal(*steps, rtol=1e-4)
