"""A GPU computes what the CPU does. Skipped without CUDA; run by benchmarks/machine.py."""

import functools

import pandas as pd
import pytest
import torch
from helpers import interrupt_after_an_epoch
from kill_everywhere import KINDS, SCRIPTS, make_data, make_model, options
from torch.testing import assert_close

from config import LoRAConfig
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # relative, of a loss
PROMPTS = ["From fairest creatures", "We desire increase,\nThat"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_logits_and_gradients_in_float32(folder, ids, lora):
    """Also with LoRA, and of a left-padded batch."""
    mask = torch.ones(3, 20)
    mask[1, :7] = 0
    results = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        model = SonnetGPT(GPT2Model.from_pretrained(folder))
        if lora:
            apply_lora(model, LoRAConfig())
        model.to(device)
        inputs = ids.to(device)
        loss = model.loss(inputs[:, :-1], inputs[:, 1:])
        loss.backward()
        grads = [p.grad.cpu() for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            logits = [model(inputs).cpu(), model(inputs, mask.to(device)).cpu()[mask.bool()]]
        results.append([loss.detach().cpu(), *logits, *grads])
    assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_greedy_and_sampled_text_in_float32(folder):
    """Random numbers are drawn on the CPU, so that a seed chooses the same tokens."""
    for settings in ({"temperature": 0}, {"temperature": 1.2, "top_p": 0.9, "seed": 3}):
        texts = [
            SonnetGPT(GPT2Model.from_pretrained(folder).to(device)).generate(
                PROMPTS, max_new_tokens=12, max_lines=None, **settings
            )
            for device in ("cpu", DEVICE)
        ]
        assert texts[0] == texts[1]


@pytest.fixture
def run(tmp_path):
    """Run a script on a random model; returns steps.csv and metrics.csv."""
    make_data(tmp_path)
    config = make_model(tmp_path / "model") / "config.json"
    text = config.read_text(encoding="utf-8")

    def run(kind, name, *more, dropout=0.0):
        config.write_text(text.replace('pdrop": 0.1', f'pdrop": {dropout}'), encoding="utf-8")
        script = SCRIPTS[kind.split("-")[0]]
        if kind.endswith("lora"):
            more = [f"--lora_dropout={dropout}", *more]
        script.main(script.parse_options(options(tmp_path, kind, tmp_path / name, *more)))
        return [pd.read_csv(tmp_path / name / f"{table}.csv") for table in ("steps", "metrics")]

    return run


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_runs_in_every_precision(run, kind, dtype):
    """The first loss is the CPU's, and in float32 so are all steps; training lowers the loss."""
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU does not multiply bfloat16")
    expected, _ = run(kind, "cpu")
    steps, metrics = run(kind, "cuda", f"--device={DEVICE}", f"--dtype={dtype}")
    assert steps["loss"][0] == pytest.approx(expected["loss"][0], rel=TOLERANCES[dtype])
    if dtype == "float32":
        for name in ("loss", "gradient_norm"):
            assert steps[name].tolist() == pytest.approx(expected[name].tolist(), rel=5e-3)
    assert metrics["train_loss"][1] < metrics["train_loss"][0]
    assert (metrics["peak_memory_gb"] > 0).all()


def test_a_resumed_run_has_the_dropout_of_an_uninterrupted_one(run, monkeypatch):
    """The random state of the GPU is restored; sums on a GPU may differ in their last bits."""
    start = functools.partial(run, "sonnets-lora", dropout=0.3)
    whole, _ = start("whole", f"--device={DEVICE}")
    interrupt_after_an_epoch(monkeypatch, functools.partial(start, "cut", f"--device={DEVICE}"))
    resumed, _ = start("cut", f"--device={DEVICE}", "--resume")
    for name in ("loss", "gradient_norm"):
        assert resumed[name].tolist() == pytest.approx(whole[name].tolist(), rel=1e-4)


def test_compiled_steps_are_those_of_eager_mode(run):
    """With torch's default backend, in float32 and without dropout."""
    given = [f"--device={DEVICE}"]
    eager, _ = run("paraphrases-lora", "eager", *given)
    compiled, _ = run("paraphrases-lora", "compiled", *given, "--compile")
    for name in ("loss", "gradient_norm"):
        assert compiled[name].tolist() == pytest.approx(eager[name].tolist(), rel=5e-3)
