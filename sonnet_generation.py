"""Fine-tune GPT-2 on Shakespeare's sonnets, fully or with LoRA, and continue held-out sonnets.

python sonnet_generation.py --use_lora         # minutes on a laptop, with the bundled model
python sonnet_generation.py --model_size gpt2  # OpenAI's 124M weights, from the Hugging Face hub
python sonnet_generation.py --generate runs/.../best --prompt "Shall I compare thee"
"""

from argparse import Namespace
from functools import partial

import pandas as pd
import torch

from config import ROOT, InputError, SamplingConfig
from datasets import GIVEN_LINES, SonnetsDataset, continuation, read_sonnets, sonnet_prompt
from evaluation.metrics import language_model_metrics, metrics_table
from evaluation.sonnet_form import sonnet_metrics
from models.adapters import load_model, save_adapter
from models.generation import Continuation, first_lines
from models.sonnet_gpt import SonnetGPT
from speed.decoding import speed_up_decoding
from training import options as opt
from training import setup
from training.loop import Task

TINY_RATES = {"full": 1e-4, "lora": 1e-3}  # chosen on dev, see data/README.md
REPORT = {"model_size": "gpt2", "epochs": 10, "batch_size": 8, "patience": 3, "temperature": 1.2}
FILES = {"train": "sonnet_path", "dev": "dev_sonnet_path", "test": "held_out_sonnet_path"}


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = opt.task_parser(__doc__, task="sonnets", patience=3)
    opt.add_options(parser, SamplingConfig, "generation")
    add = parser.add_argument_group("sonnets").add_argument
    for split, name in FILES.items():
        path = str(ROOT / "data" / f"Shakespeare_Sonnets_{split}.csv")
        add(f"--{name}", default=path, metavar="FILE", help=f"{split} sonnets, .csv or numbered")
    path = "predictions/generated_sonnets.txt"
    add("--sonnet_out", default=path, metavar="FILE", help="the continued test sonnets")
    add("--generate", metavar="DIR", help="continue test sonnets with a model, adapter or best/")
    add("--prompt", action="append", metavar="TEXT", help="with --generate: continue this instead")
    add("--score", metavar="FILE", help="no model: metrics of generated sonnets against test")
    options = opt.parse(parser, arguments, REPORT, TINY_RATES)
    opt.from_options(SamplingConfig, options)  # or bad values would be found after training
    opt.check_options(options)
    return options


def main(options: Namespace) -> None:
    if options.score is not None:
        print(metrics_table(score(options)))
        return
    hardware = opt.choose_hardware(options.device, options.dtype)
    torch.manual_seed(options.seed)
    if options.generate is not None:
        generate_only(options, hardware)
        return

    # Data, model and method; test sonnets may be prompts only, as the course's are
    sonnets = {split: read_sonnets(vars(options)[name]) for split, name in FILES.items()}
    if not is_complete(sonnets["dev"]):
        raise InputError(f"{options.dev_sonnet_path} has a sonnet without lines after the prompt")
    splits = list(FILES)
    if not is_complete(sonnets["test"]):
        print(f"note: {options.held_out_sonnet_path} has bare prompts: no test metrics")
        splits.remove("test")
    model = SonnetGPT(load_model(options.model_size))
    setup.prepare(model, options, hardware)
    datasets = {split: SonnetsDataset(sonnets[split], model.gpt) for split in splits}
    run = setup.make_folder((), model, options, hardware)

    # Training
    measure = partial(setup.evaluate, language_model_metrics, hardware)
    save = partial(save_adapter, model) if options.method == "lora" else model.gpt.save_pretrained
    train, dev = datasets.pop("train"), {"dev": datasets["dev"]}
    task = Task(train, lambda: measure(model, dev)[0], save)
    base, _ = measure(model, datasets)
    summary = setup.train(model, task, options, run, hardware)

    # The best model: its losses, and sonnets that it continues
    if options.epochs:
        model = SonnetGPT(load_model(run / "best")).to(hardware.device)
    metrics, losses = measure(model, datasets)
    metrics = {f"base_{name}": value for name, value in base.items()} | metrics
    for split in ("dev", "test"):  # afterwards, `texts` are those of test
        whole = sonnets[split]["text"]
        texts = generate(model, whole.map(sonnet_prompt).tolist(), options, hardware, max_lines=0)
        if split in datasets:
            metrics |= sonnet_metrics(split, texts, whole, sonnets["train"]["text"])
    example = first_lines(texts[0].text, options.max_lines)
    print(f"\na sonnet, whose first {GIVEN_LINES} lines are given\n{example}")
    outputs = {options.sonnet_out: format_sonnets(sonnets["test"], texts, options.max_lines)}
    usage = f'python sonnet_generation.py --generate {run}/best --prompt "Shall I"'
    setup.finish_run(run, summary, (metrics, losses), outputs, usage)


def is_complete(sonnets: pd.DataFrame) -> bool:
    """Whether all sonnets have lines after the prompt."""
    return sonnets["text"].map(continuation).ne("").all()


def generate(
    model: SonnetGPT, prompts: list[str], options: Namespace, hardware: opt.Hardware, max_lines: int
) -> list[Continuation]:
    """Continue all prompts with the sampling options."""
    sampling = vars(opt.from_options(SamplingConfig, options)) | {"max_lines": max_lines}
    if not options.plain:
        model = speed_up_decoding(model, hardware.dtype, rows=len(prompts))
    with hardware.autocast():
        return model.continue_texts(prompts, options.seed, **sampling)


def generate_only(options: Namespace, hardware: opt.Hardware) -> None:
    """Continue the prompts, or else the test sonnets, with a saved model or adapter."""
    model = SonnetGPT(load_model(options.generate)).to(hardware.device)
    sonnets = read_sonnets(options.held_out_sonnet_path)
    prompts = options.prompt or sonnets["text"].map(sonnet_prompt).tolist()
    texts = generate(model, prompts, options, hardware, options.max_lines)
    if options.prompt:
        print("\n\n".join(text for text, _ in texts))
    else:
        text = format_sonnets(sonnets, texts, options.max_lines)
        setup.write_outputs({options.sonnet_out: text})


def score(options: Namespace) -> dict[str, float]:
    """The metrics of a file of generated sonnets, without a model."""
    paths = (options.held_out_sonnet_path, options.sonnet_path, options.score)
    gold, train, generated = map(read_sonnets, paths)
    both = gold.merge(generated, on="id", suffixes=("", "_generated"))
    if len(both) < len(gold) or not is_complete(gold):
        raise InputError(f"{options.score} lacks sonnets of {paths[0]}, or these are only prompts")
    texts = [Continuation(text, True) for text in both["text_generated"]]
    metrics = sonnet_metrics("test", texts, gold["text"], train["text"])
    del metrics["test_ended"]  # a file does not tell
    return metrics


def format_sonnets(sonnets: pd.DataFrame, texts: list[Continuation], max_lines: int) -> str:
    """The course's format: a header, then the number and the first lines of each sonnet."""
    numbered = zip(sonnets["id"], texts, strict=True)
    blocks = [f"\n{number}\n\n{first_lines(text, max_lines)}\n" for number, (text, _) in numbered]
    return "--Generated Sonnets--\n\n" + "".join(blocks)


if __name__ == "__main__":
    with opt.exit_cleanly():
        main(parse_options())
