"""data/build/pretrain.py trains, evaluates and saves on a small corpus."""

import importlib.util

import numpy as np
import pandas as pd

from config import ROOT
from models.gpt2 import GPT2Model


def test_pretrains_on_a_small_corpus(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("pretrain", ROOT / "data/build/pretrain.py")
    pretrain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pretrain)
    generator = np.random.default_rng(0)
    for name in ("shakespeare", "bible", "modern", "heldout_bible", "heldout_modern"):
        np.save(tmp_path / f"{name}.npy", generator.integers(0, 50, 3000).astype(np.uint16))
    monkeypatch.setattr(pretrain, "STEPS", 4)
    monkeypatch.setattr(pretrain, "BATCHES", ((4, 16), (2, 32)))
    arguments = ["--epochs", "2", "--corpus", str(tmp_path), "--out", str(tmp_path / "model")]
    pretrain.main(pretrain.parse_options([*arguments, "--out_dir", str(tmp_path / "run")]))
    epochs = pd.read_csv(tmp_path / "model" / "pretraining.csv")
    assert epochs["train_loss"][1] < epochs["train_loss"][0] < 9.1  # ln 8192 = 9.01
    assert "the best model is in" in capsys.readouterr().out
    assert GPT2Model.from_pretrained(tmp_path / "run" / "best").config == pretrain.TINY
    saved = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert saved < 2.1 * 5_387_776  # float16
