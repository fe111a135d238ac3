"""A third task, as README.md suggests: a script around Trainer, here a language model of verses."""

import pandas as pd
import pytest

from cli import Parser, add_common_options, parse
from config import ROOT
from datasets import SonnetsDataset, bucketed_batches, read_pairs
from evaluation import language_model_metrics
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from runs import start_run
from training import Task, Trainer, setup


def verses(arguments):
    """The script: options, data, a Task, and the training loop."""
    parser = Parser("Fine-tune GPT-2 on verses.")
    add_common_options(parser, "verses", epochs=2)
    options = parse(parser, arguments, "verses")
    config, lora_config, device, dtype = setup(options)

    path = ROOT / "data" / "verses-dev.csv"
    texts = read_pairs(path).rename(columns={"sentence1": "text"})
    model = SonnetGPT(GPT2Model.from_pretrained(options.model_size)).to(device)
    if options.use_lora:
        apply_lora(model, lora_config)
    train, dev = SonnetsDataset(texts[:32], model.gpt), SonnetsDataset(texts[32:40], model.gpt)
    run = start_run("verses", (), "40 verses", [path], model, options, dtype)
    task = Task(
        batches=lambda epoch: bucketed_batches(train.lengths, config.batch_size, 0, epoch),
        collate=train.collate,
        loss=lambda model, batch: model.loss(**batch),
        num_targets=train.num_targets,
        num_tokens=train.num_targets,
        evaluate=lambda model: {"dev_loss": language_model_metrics(model, dev)[0]["loss"]},
        save=lambda model, folder: None,
    )
    Trainer(model, task, config, run, device, dtype).train()


@pytest.mark.parametrize("method", [[], ["--use_lora"]], ids=["full", "lora"])
def test_a_third_task_trains(tmp_path, method):
    """Nothing outside of the script knows the names of the tasks; the dev loss goes down."""
    verses([f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--dtype=float32", *method])
    first, last = pd.read_csv(tmp_path / "run" / "metrics.csv")["dev_loss"]
    assert last < first
