"""Fine-tune GPT-2 on Shakespeare's sonnets, fully or with LoRA, and continue held-out sonnets.

python sonnet_generation.py --use_lora         # minutes on a laptop, with the bundled model
python sonnet_generation.py --model_size gpt2  # OpenAI's 124M weights, from the Hugging Face hub
python sonnet_generation.py --generate_only --adapter runs/.../best --prompt "Shall I compare thee"
"""

import sys
from dataclasses import asdict
from pathlib import Path

import distributed
from adapters import load_adapter, save_adapter
from cli import (
    Parser,
    add_common_options,
    add_options,
    check_outputs,
    check_text,
    exit_cleanly,
    from_options,
    parse,
    reject_options,
)
from config import ROOT, InputError, SamplingConfig
from datasets import SonnetsDataset, bucketed_batches, continuation, read_sonnets, sonnet_prompt
from evaluation import language_model_metrics, sonnet_metrics
from files import write_text
from lora import apply_lora, cast_frozen_weights, merge_lora
from models.gpt2 import GPT2Model
from models.sonnet_gpt import SonnetGPT
from runs import finish_run, start_run
from training import Task, Trainer, autocast, prepare, setup

REPORT = {"model_size": "gpt2", "epochs": 10, "batch_size": 8, "patience": 3, "temperature": 1.2}
FILES = {"train": "sonnet_path", "dev": "dev_sonnet_path", "test": "held_out_sonnet_path"}


def parse_options(arguments=None):
    parser = Parser(__doc__)
    add_common_options(parser, "sonnets", patience=3)
    add_options(parser, SamplingConfig, "generation")
    add = parser.add_argument_group("sonnets").add_argument
    for split, name in FILES.items():
        path = str(ROOT / "data" / f"Shakespeare_Sonnets_{split}.csv")
        text = f"{split} sonnets, .csv or numbered text, instead of the bundled ones"
        add(f"--{name}", default=path, metavar="FILE", help=text)
    output = "predictions/generated_sonnets.txt"
    add("--sonnet_out", default=output, metavar="FILE", help="the continued test sonnets")
    add("--generate_only", action="store_true", help="no training; use --adapter or --model")
    add("--adapter", metavar="DIR", help="the LoRA adapter of --generate_only")
    add("--model", metavar="DIR", help="the model of --generate_only")
    text = "with --generate_only, a text to continue instead of the test sonnets; can be repeated, "
    add("--prompt", action="append", metavar="TEXT", help=f"{text}- reads standard input")
    unused = ("sonnet_path", "dev_sonnet_path")
    options = parse(parser, arguments, "sonnets", REPORT, "generate_only", unused)
    if not options.generate_only:
        where = "without --generate_only (--model_size trains from a folder)"
        reject_options(parser, options, ("adapter", "model", "prompt"), where)
    if options.model:
        reject_options(parser, options, ("model_size",), "with --model")
    if options.prompt:
        reject_options(parser, options, ("held_out_sonnet_path", "sonnet_out"), "with --prompt")
    check_outputs(options, ("sonnet_out",), tuple(FILES.values()))
    return options


def main(options):
    config, lora_config, device, dtype = setup(options)
    sampling = asdict(from_options(SamplingConfig, options)) | {"seed": config.seed}
    if options.generate_only:
        generate_only(options, sampling, device, dtype)
        return

    def evaluate(model, splits):
        results, texts = {}, {}
        for split in splits:
            with autocast(device, dtype):
                metrics, frame = language_model_metrics(model, datasets[split])
            results |= {f"{split}_{name}": value for name, value in metrics.items()}
            texts[split] = frame.set_index(sonnets[split]["id"])
        return results, texts

    # Load
    paths = [getattr(options, name) for name in FILES.values()]
    sonnets = dict(zip(FILES, map(read_sonnets, paths), strict=True))
    model = SonnetGPT(GPT2Model.from_pretrained(options.model_size))
    if options.use_lora:
        apply_lora(model, lora_config)
    model.to(device)
    model.encode(prompts(sonnets["test"]))  # raises now, not after training, if one is too long
    datasets = make_datasets(sonnets, model.gpt)
    sizes = ", ".join(f"{len(frame)} {split}" for split, frame in sonnets.items())
    held_out = [split for split in datasets if split != "train"]
    run = start_run("sonnets", (), sizes, paths, model, options, dtype)

    # Train
    base, _ = evaluate(model, held_out)
    prepare(model, options, dtype)
    lengths, step_size = datasets["train"].lengths, config.batch_size * config.grad_accumulation
    task = Task(
        batches=lambda epoch: bucketed_batches(lengths, step_size, config.seed, epoch),
        collate=datasets["train"].collate,
        loss=lambda model, batch: model.loss(batch["input_ids"], batch["labels"]),
        num_targets=datasets["train"].num_targets,
        num_tokens=datasets["train"].num_targets,
        evaluate=lambda model: evaluate(model, ["dev"])[0],
        save=save_adapter if options.use_lora else SonnetGPT.save_pretrained,
    )
    progress = Trainer(model, task, config, run, device, dtype).train()
    del model, task  # and the optimizer

    # Evaluate
    model = load_best(run, progress, options).to(device)
    tuned, losses = evaluate(model, held_out)
    merge_lora(model)
    texts = generate(model, prompts(sonnets["test"]), sampling, device, dtype)
    sampling["max_lines"] = None
    dev_texts = generate(model, prompts(sonnets["dev"]), sampling, device, dtype)
    references, train = (sonnets[split]["text"].tolist() for split in ("dev", "train"))
    form = sonnet_metrics(dev_texts, references, train)

    # Report
    metrics = {f"base_{name}": value for name, value in base.items()} | tuned | form
    text = format_sonnets(sonnets["test"], texts)
    outputs = {"generated_sonnets.txt": (options.sonnet_out, text)}
    print(f"\n{preview(sonnets['test'], texts)}")
    code = example_code(run.best_name, model.gpt.name, options.use_lora)
    finish_run(run, "sonnets", options, progress, metrics, outputs, losses, code, base["dev_loss"])


def prompts(sonnets):
    return sonnets["text"].map(sonnet_prompt).tolist()


def make_datasets(sonnets, gpt):
    """A dataset per split; test sonnets may be prompts only, as the course's are, and get none."""
    datasets = {}
    for split, frame in sonnets.items():
        seen = frame["text"].isin(sonnets["train"]["text"]).sum()
        if split != "train" and seen:
            print(f"note: {seen} {split} sonnets are also in the training file")
        complete = frame["text"].map(continuation).ne("") | (split == "train")
        if split == "dev" or complete.any():
            for number in frame["id"][~complete]:
                raise InputError(
                    f"{split} sonnet {number} has no lines after the prompt; complete it"
                )
            datasets[split] = SonnetsDataset(frame, gpt)
    return datasets


def load_best(run, progress, options):
    """The model of the best epoch, or the base model if there was no epoch."""
    is_folder = progress.epochs and not options.use_lora
    gpt = GPT2Model.from_pretrained(run.best if is_folder else options.model_size)
    if progress.epochs and options.use_lora:
        load_adapter(gpt, run.best)
    return SonnetGPT(gpt)


def generate(model, texts, sampling, device, dtype):
    """Continue all texts."""
    cast_frozen_weights(model.requires_grad_(False), dtype)
    with autocast(device, dtype):
        return model.generate(texts, **sampling)


def generate_only(options, sampling, device, dtype):
    """Continue the prompts, or else the test sonnets, with a saved model or adapter."""
    distributed.shutdown()  # one process is enough
    if options.prompt:
        texts = [standard_input() if text == "-" else text for text in options.prompt]
        for text in texts:
            check_text("prompt", text)
    else:
        sonnets = read_sonnets(options.held_out_sonnet_path)
        texts = prompts(sonnets)
    source = options.model or options.model_size
    model = SonnetGPT(GPT2Model.from_pretrained(source))
    if options.adapter:
        merge_lora(load_adapter(model, options.adapter))
        source = f"{source} with {options.adapter}"
    texts = generate(model.to(device), texts, sampling, device, dtype)
    if options.prompt:
        print("\n\n".join(texts))
        return
    print(f"{source} continues {len(sonnets)} sonnets of {options.held_out_sonnet_path}")
    write_text(Path(options.sonnet_out), format_sonnets(sonnets, texts))
    print(f"{preview(sonnets, texts)}\n\nall {len(texts)}: {options.sonnet_out}")


def standard_input():
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")


def format_sonnets(sonnets, texts):
    """The course's format: a header, then the number and text of each sonnet."""
    blocks = [f"\n{number}\n\n{text}\n" for number, text in zip(sonnets["id"], texts, strict=True)]
    return "--Generated Sonnets--\n\n" + "".join(blocks)


def example_code(best, base, use_lora):
    """Python code for the model card that continues a line with the best model."""
    imports = "from models.gpt2 import GPT2Model\nfrom models.sonnet_gpt import SonnetGPT"
    gpt = f"GPT2Model.from_pretrained({best!r})"
    if use_lora:
        imports = f"from adapters import load_adapter\n{imports}"
        gpt = f"load_adapter(GPT2Model.from_pretrained({base!r}), {best!r})"
    prompt = "Shall I compare thee to a summer's day?\n"
    return f"{imports}\n\nmodel = SonnetGPT({gpt})\nprint(model.generate([{prompt!r}])[0])"


def preview(sonnets, texts):
    """The first two sonnets for the screen; a bar marks generated lines."""
    blocks = []
    for number, prompt, text in zip(sonnets["id"][:2], prompts(sonnets), texts, strict=False):
        new = text.removeprefix(prompt).replace("\n", "\n| ")
        blocks.append(f"sonnet {number}, continued\n{prompt}| {new}")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    with exit_cleanly():
        main(parse_options())
