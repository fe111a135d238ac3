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

import datasets as data
from config import ROOT, InputError, SamplingConfig, TrainConfig, check_number
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
from training.setup import check_outputs, evaluate, finish_run, open_run, prepare, summarize

TINY_RATES = {"full": 1e-4, "lora": 1e-3}  # chosen on dev, see data/README.md
REPORT = {"model_size": "gpt2", "epochs": 10, "batch_size": 8, "patience": 3, "temperature": 1.2}
OUTPUTS = {"dev": "generated_dev_sonnets.txt", "test": "generated_sonnets.txt"}
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
    add("--generate", metavar="DIR", help="continue test sonnets with a model, adapter or best/")
    add("--prompt", action="append", metavar="TEXT", help="continue this instead; - reads stdin")
    add("--num_samples", type=int, default=1, metavar="N", help="continuations of each --prompt")
    add("--score", metavar="FILE", help="no model: metrics of generated sonnets against test")
    options = opt.parse(parser, arguments, REPORT, TINY_RATES)
    check_number("num_samples", options.num_samples, (1, 2**31), int)
    opt.from_options(SamplingConfig, options)  # or bad values would be found after training
    check_outputs(options, "sonnet_out")
    return options


def main(options: Namespace) -> None:
    if options.score:
        print(metrics_table(score(options)))
        return
    config = opt.from_options(TrainConfig, options)
    hardware = opt.choose_hardware(options)
    torch.manual_seed(config.seed)
    if options.generate:
        generate_only(options, hardware)
        return

    # Data, model and method
    sonnets = {split: data.read_sonnets(vars(options)[name]) for split, name in FILES.items()}
    for number in prompts_only(sonnets["dev"]):
        raise InputError(f"dev sonnet {number} has no lines after the prompt; complete it")
    model = SonnetGPT(load_model(options.model_size))
    prepare(model, options, hardware)
    # Test sonnets may be prompts only, as the course's are
    splits = ("train", "dev") if prompts_only(sonnets["test"]) else FILES
    datasets = {split: data.SonnetsDataset(sonnets[split], model.gpt) for split in splits}
    run = open_run("sonnets", (), model, options, hardware)

    # Training
    measure = partial(evaluate, language_model_metrics, hardware)
    save = partial(save_adapter, model) if options.use_lora else model.gpt.save_pretrained
    dev = {"dev": datasets["dev"]}
    task = Task(datasets.pop("train"), lambda: measure(model, dev)[0], save)
    base, _ = distributed.from_main(lambda: measure(model, datasets))
    epochs = Trainer(model, task, config, run, hardware).train()
    run.summary |= summarize(epochs, task.metric)

    # The best model: its losses, and sonnets that it continues
    if epochs:
        model = SonnetGPT(load_model(run.best)).to(hardware.device)
    metrics, losses = measure(model, datasets)
    metrics = {f"base_{name}": value for name, value in base.items()} | metrics
    dev_out = str(Path(options.sonnet_out).with_name(OUTPUTS["dev"]))
    outputs, copies = {}, {"dev": dev_out, "test": options.sonnet_out}
    for split, name in OUTPUTS.items():
        frame = sonnets[split]
        texts = generate(model, prompts_of(frame), vars(options) | {"max_lines": 0}, hardware)
        outputs[name] = copies[split], format_sonnets(frame, texts, options.max_lines)
        if split in datasets:
            metrics |= sonnet_metrics(split, texts, frame["text"], sonnets["train"]["text"])
    print_preview(sonnets["test"], texts, options.max_lines)
    usage = f'python sonnet_generation.py --generate {run.shown}/best --prompt "Shall I"'
    finish_run(run, metrics, losses, outputs, usage)


def prompts_of(sonnets: pd.DataFrame) -> list[str]:
    """The given lines of each sonnet."""
    return sonnets["text"].map(data.sonnet_prompt).tolist()


def prompts_only(sonnets: pd.DataFrame) -> list[int]:
    """The numbers of the sonnets without lines after the prompt."""
    return sonnets["id"][sonnets["text"].map(data.continuation).eq("")].tolist()


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
    if not options.prompt:
        sonnets = data.read_sonnets(options.held_out_sonnet_path)
        texts = generate(model, prompts_of(sonnets), vars(options), hardware)
        write_text(options.sonnet_out, format_sonnets(sonnets, texts, options.max_lines))
        print_preview(sonnets, texts, options.max_lines)
        print(f"\nall {len(texts)} sonnets: {options.sonnet_out}")
        return
    given = map(read_prompt, options.prompt)
    prompts = [text for text in given for _ in range(options.num_samples)]
    texts = generate(model, prompts, vars(options), hardware)
    print("\n\n".join(text for text, _ in texts))
    unchanged = sum(text == prompt for (text, _), prompt in zip(texts, prompts, strict=True))
    if unchanged:
        hint = f"--max_lines {options.max_lines} counts the lines of the prompt (0: no limit)"
        print(f"note: {unchanged} texts got no new words: {hint}", file=sys.stderr)


def read_prompt(text: str) -> str:
    """The text of --prompt; - reads standard input. Raises InputError for an empty text."""
    if text == "-":
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
        text = sys.stdin.read()
    if not text.strip():
        raise InputError(f"--prompt {text!r} is empty; give a text")
    return text


def score(options: Namespace) -> dict[str, float]:
    """The metrics of a file of generated sonnets, without a model."""
    paths = (options.held_out_sonnet_path, options.sonnet_path, options.score)
    gold, train, generated = map(data.read_sonnets, paths)
    texts = generated.set_index("id")["text"]
    missing = [str(number) for number in gold["id"] if number not in texts]
    if missing:
        raise InputError(f"{options.score} lacks the sonnets {', '.join(missing)}; add them")
    if prompts_only(gold):
        raise InputError(f"{options.held_out_sonnet_path} has prompts only; name whole sonnets")
    continued = [Continuation(text, True) for text in texts[gold["id"]]]
    metrics = sonnet_metrics("test", continued, gold["text"], train["text"])
    del metrics["test_ended"]  # a file does not tell
    return metrics


def format_sonnets(sonnets: pd.DataFrame, texts: list[Continuation], max_lines: int) -> str:
    """The course's format: a header, then the number and the first lines of each sonnet."""
    numbered = zip(sonnets["id"], texts, strict=True)
    blocks = [f"\n{number}\n\n{first_lines(text, max_lines)}\n" for number, (text, _) in numbered]
    return "--Generated Sonnets--\n\n" + "".join(blocks)


def print_preview(sonnets: pd.DataFrame, texts: list[Continuation], max_lines: int) -> None:
    """Print the first two sonnets; a bar marks generated lines."""
    for sonnet, (text, _) in zip(sonnets.head(2).itertuples(), texts, strict=False):
        prompt = data.sonnet_prompt(sonnet.text)
        new = first_lines(text, max_lines).removeprefix(prompt).replace("\n", "\n| ")
        print(f"\nsonnet {sonnet.id}, continued\n{prompt}| {new}")


if __name__ == "__main__":
    with opt.exit_cleanly():
        main(parse_options())
