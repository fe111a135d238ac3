"""A GPU computes what the CPU does. Skipped without CUDA."""

import pandas as pd
import pytest
import torch
from small_runs import KINDS, make_files, run

import sonnet_generation
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # relative, of a loss
DEVICES = [f"cuda:{index}" for index in range(min(2, torch.cuda.device_count()))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Without dropout, whose random numbers depend on the device."""
    return make_files(tmp_path_factory.mktemp("files"), dropout=0.0)


def train(files, kind, out, *more):
    folder = run(files, kind, out, "--lora_dropout=0", *more)
    return [pd.read_csv(folder / f"{table}.csv") for table in ("steps", "metrics")]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_training_in_every_precision(files, tmp_path, kind, dtype):
    """The first loss is that of the CPU, and in float32 so are all steps; the loss goes down."""
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU does not multiply bfloat16")
    expected, _ = train(files, kind, tmp_path / "cpu")
    for device in DEVICES:
        more = [f"--device={device}", f"--dtype={dtype}"]
        steps, metrics = train(files, kind, tmp_path / device, *more)
        assert steps["loss"][0] == pytest.approx(expected["loss"][0], rel=TOLERANCES[dtype])
        if dtype == "float32":
            pd.testing.assert_frame_equal(steps, expected, rtol=5e-3)
        assert metrics["train_loss"][1] < metrics["train_loss"][0]
        assert (metrics["peak_memory_gb"] > 0).all()


@pytest.mark.parametrize("more", [[], ["--compile"]], ids=["eager", "compiled"])
def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(tmp_path, monkeypatch, more):
    """With dropout; sums on a GPU may differ in their last bits."""
    files, more = make_files(tmp_path), ["--device=cuda", *more]
    whole = run(files, "sonnets-lora", tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        patch.setattr(sonnet_generation, "save_adapter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(files, "sonnets-lora", tmp_path / "cut", *more)
    cut = run(files, "sonnets-lora", tmp_path / "cut", *more, "--resume")
    steps = [pd.read_csv(folder / "steps.csv") for folder in (whole, cut)]
    pd.testing.assert_frame_equal(*steps, rtol=1e-4)


def test_text_in_float32(folder):
    """Random numbers are drawn on the CPU, so that a seed chooses the same tokens."""
    for settings in ({"temperature": 0}, {"temperature": 1.2, "seed": 3}):
        texts = [
            SonnetGPT(GPT2Model.from_pretrained(folder).to(device)).generate(
                ["From fairest", "We desire increase,\nThat"], max_new_tokens=12, **settings
            )
            for device in ("cpu", *DEVICES)
        ]
        assert all(text == texts[0] for text in texts)
