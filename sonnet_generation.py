"""Fine-tune GPT-2 on Shakespeare's sonnets, fully or with LoRA, and continue held-out sonnets.

python sonnet_generation.py --use_lora         # minutes on a laptop, with the bundled model
python sonnet_generation.py --model_size gpt2  # OpenAI's 124M weights, from the Hugging Face hub
python sonnet_generation.py --generate runs/.../best --prompt "Shall I compare thee"
"""

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from config import ROOT, InputError, SamplingConfig, check_number
from datasets import (
    SonnetsDataset,
    continuation,
    note_repeated_texts,
    read_sonnets,
    sonnet_prompt,
)
from evaluation.metrics import language_model_metrics, metrics_table
from evaluation.sonnet_form import sonnet_metrics
from models.adapters import load_model, save_adapter
from models.generation import Continuation, first_lines
from models.sonnet_gpt import SonnetGPT
from speed.decoding import speed_up_decoding
from training import distributed
from training import options as opt
from training.loop import Task, Trainer
from training.runs import write_text
from training.setup import Results, check_outputs, finish_run, open_run, prepare

TINY_RATES = {"full": 1e-4, "lora": 1e-3}  # chosen on dev, see data/README.md
REPORT = {"model_size": "gpt2", "epochs": 10, "batch_size": 8, "patience": 3, "temperature": 1.2}
FILES = {"train": "sonnet_path", "dev": "dev_sonnet_path", "test": "held_out_sonnet_path"}


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = opt.task_parser(__doc__, patience=3)
    opt.add_options(parser, SamplingConfig, "generation")
    add = parser.add_argument_group("sonnets").add_argument
    for split, name in FILES.items():
        path = str(ROOT / "data" / f"Shakespeare_Sonnets_{split}.csv")
        text = f"{split} sonnets, .csv or numbered text (default: the bundled ones)"
        add(f"--{name}", default=path, metavar="FILE", help=text)
    output = "predictions/generated_sonnets.txt"
    add("--sonnet_out", default=output, metavar="FILE", help="the continued test sonnets")
    text = "no training: continue the test sonnets with a run's best/, or any model or adapter"
    add("--generate", metavar="DIR", help=text)
    text = "with --generate, a text to continue instead; can be repeated, - reads standard input"
    add("--prompt", action="append", metavar="TEXT", help=text)
    add("--num_samples", type=int, default=1, metavar="N", help="continuations of each --prompt")
    add("--score", metavar="FILE", help="no model: metrics of generated sonnets against test")
    options = opt.parse(parser, arguments, REPORT)
    check_number("num_samples", options.num_samples, (1, 2**31), int)
    opt.from_options(SamplingConfig, options)  # or bad values would be found after training
    check_outputs(options, "sonnet_out")
    return options


def main(options: Namespace) -> None:
    if options.score:
        print(metrics_table(score(options)))
        return
    config = opt.train_config(options, TINY_RATES)
    hardware = opt.choose_hardware(options)
    torch.manual_seed(config.seed)
    if options.generate:
        generate_only(options, hardware)
        return

    # Data, model and method
    sonnets = {split: read_sonnets(vars(options)[name]) for split, name in FILES.items()}
    note_repeated_texts({s: [[t] for t in frame["text"]] for s, frame in sonnets.items()})
    model = SonnetGPT(load_model(options.model_size))
    prepare(model, options, hardware)
    datasets = make_datasets(sonnets, model)
    held_out = {split: dataset for split, dataset in datasets.items() if split != "train"}
    run = open_run("sonnets", (), model, options, hardware)

    # Training
    base, _ = distributed.from_main(lambda: evaluate(model, held_out, hardware))
    task = Task(
        dataset=datasets["train"],
        evaluate=lambda: evaluate(model, {"dev": datasets["dev"]}, hardware)[0],
        save=partial(save_adapter, model) if options.use_lora else model.gpt.save_pretrained,
    )
    epochs = Trainer(model, task, config, run, hardware).train()

    # The best model: its losses, and sonnets that it continues
    if epochs:
        model = SonnetGPT(load_model(run.best)).to(hardware.device)
    metrics, losses = evaluate(model, held_out, hardware)
    metrics = {f"base_{name}": value for name, value in base.items()} | metrics
    texts = {}
    for split, frame in sonnets.items():
        if split != "train":
            prompts = frame["text"].map(sonnet_prompt).tolist()
            texts[split] = generate(model, prompts, vars(options) | {"max_lines": 0}, hardware)
        if split in held_out:
            metrics |= sonnet_metrics(split, texts[split], frame["text"], sonnets["train"]["text"])
    dev_out = Path(options.sonnet_out).with_name("generated_dev_sonnets.txt")
    test_text = format_sonnets(sonnets["test"], texts["test"], options.max_lines)
    dev_text = format_sonnets(sonnets["dev"], texts["dev"], options.max_lines)
    outputs = {"generated_sonnets.txt": (options.sonnet_out, test_text)}
    outputs["generated_dev_sonnets.txt"] = str(dev_out), dev_text
    print(f"\n{preview(sonnets['test'], texts['test'], options.max_lines)}")
    usage = f'python sonnet_generation.py --generate {run.shown}/best --prompt "Shall I"'
    finish_run(run, task, epochs, Results(metrics, losses, outputs, usage))


def make_datasets(sonnets: dict[str, pd.DataFrame], model: SonnetGPT) -> dict[str, SonnetsDataset]:
    """A dataset per split; test sonnets may be prompts only, as the course's are, and get none."""
    datasets = {}
    for split, frame in sonnets.items():
        complete = frame["text"].map(continuation).ne("")
        if split == "dev" and not complete.all():
            number = frame["id"][~complete].iloc[0]
            raise InputError(f"dev sonnet {number} has no lines after the prompt; complete it")
        if split != "test" or complete.all():
            datasets[split] = SonnetsDataset(frame, model.gpt)
    return datasets


def evaluate(
    model: SonnetGPT, datasets: dict[str, SonnetsDataset], hardware: opt.Hardware
) -> tuple[dict[str, float], pd.DataFrame]:
    """The metrics of each split, and the loss of each text."""
    metrics, frames = {}, []
    for split, dataset in datasets.items():
        with hardware.autocast():
            results, texts = language_model_metrics(model, dataset)
        metrics |= {f"{split}_{name}": value for name, value in results.items()}
        frames.append(texts.assign(split=split))
    return metrics, pd.concat(frames)


def generate(
    model: SonnetGPT, prompts: list[str], options: dict[str, Any], hardware: opt.Hardware
) -> list[Continuation]:
    """Continue all prompts with the sampling options."""
    if not options["plain"]:
        model = speed_up_decoding(model, hardware.dtype, rows=len(prompts))
    sampling = {name: options[name] for name in vars(SamplingConfig())}
    with hardware.autocast():
        return model.continue_texts(prompts, options["seed"], **sampling)


def generate_only(options: Namespace, hardware: opt.Hardware) -> None:
    """Continue the prompts, or else the test sonnets, with a saved model or adapter."""
    distributed.shutdown()  # one process is enough
    model = SonnetGPT(load_model(options.generate)).to(hardware.device)
    if options.prompt is None:
        sonnets = read_sonnets(options.held_out_sonnet_path)
        prompts = sonnets["text"].map(sonnet_prompt).tolist()
        texts = generate(model, prompts, vars(options), hardware)
        write_text(options.sonnet_out, format_sonnets(sonnets, texts, options.max_lines))
        print(preview(sonnets, texts, options.max_lines))
        print(f"\nall {len(texts)} sonnets: {options.sonnet_out}")
        return
    prompts = [read_prompt(text) for text in options.prompt for _ in range(options.num_samples)]
    texts = generate(model, prompts, vars(options), hardware)
    print("\n\n".join(text for text, _ in texts))
    unchanged = sum(text == prompt for (text, _), prompt in zip(texts, prompts, strict=True))
    if unchanged:
        print(
            f"note: {unchanged} texts got no new words: --max_lines {options.max_lines} counts "
            "the lines of the prompt (0: no limit)",
            file=sys.stderr,
        )


def read_prompt(text: str) -> str:
    """The text of --prompt; - reads standard input. Raises InputError for an empty text."""
    if text == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig")
        text = sys.stdin.read()
    if not text.strip():
        raise InputError(f"--prompt {text!r} is empty; give a text")
    return text


def score(options: Namespace) -> dict[str, float]:
    """The metrics of a file of generated sonnets, without a model."""
    gold = read_sonnets(options.held_out_sonnet_path).set_index("id")["text"]
    texts = read_sonnets(options.score).set_index("id")["text"]
    missing = gold.index.difference(texts.index).astype(str)
    if len(missing):
        raise InputError(f"{options.score} lacks the sonnets {', '.join(missing)}; add them")
    if gold.map(continuation).eq("").any():
        raise InputError(f"{options.held_out_sonnet_path} has prompts only; name whole sonnets")
    continued = [Continuation(text, True) for text in texts[gold.index]]
    metrics = sonnet_metrics("test", continued, gold, read_sonnets(options.sonnet_path)["text"])
    del metrics["test_ended"]  # a file does not tell
    return metrics


def format_sonnets(sonnets: pd.DataFrame, texts: list[Continuation], max_lines: int) -> str:
    """The course's format: a header, then the number and the first lines of each sonnet."""
    numbered = zip(sonnets["id"], texts, strict=True)
    blocks = [f"\n{number}\n\n{first_lines(text, max_lines)}\n" for number, (text, _) in numbered]
    return "--Generated Sonnets--\n\n" + "".join(blocks)


def preview(sonnets: pd.DataFrame, texts: list[Continuation], max_lines: int) -> str:
    """The first two sonnets for the screen; a bar marks generated lines."""
    blocks = []
    for sonnet, (text, _) in zip(sonnets.head(2).itertuples(), texts, strict=False):
        prompt = sonnet_prompt(sonnet.text)
        new = first_lines(text, max_lines).removeprefix(prompt).replace("\n", "\n| ")
        blocks.append(f"sonnet {sonnet.id}, continued\n{prompt}| {new}")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    with opt.exit_cleanly():
        main(parse_options())
