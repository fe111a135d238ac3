"""Fine-tune GPT-2 on Shakespeare's sonnets and write new ones: all its weights, or LoRA's low-rank matrices only.

python sonnet_generation.py --use_lora            # minutes on a laptop, with the embedded base model
python sonnet_generation.py --model_size gpt2     # OpenAI's 124M weights, from the Hugging Face hub
"""

import argparse
from pathlib import Path

from config import ROOT, HelpFormatter, InputError, Parser, check_outputs, exit_cleanly, parse, refuse, shared_options

REPORT = {"model_size": "gpt2", "epochs": 10, "batch_size": 8, "patience": 3, "temperature": 1.2, "top_p": 0.9}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    what, files = shared_options(parser, "sonnets", patience=3)
    for name, split in (("sonnet_path", "train"), ("dev_sonnet_path", "dev"), ("held_out_sonnet_path", "test")):
        path = str(ROOT / "data" / f"Shakespeare_Sonnets_{split}.csv")
        about = f"{split} sonnets, .csv or numbered text, instead of the embedded ones"
        what.add_argument(f"--{name}", default=path, metavar="FILE", help=about)
    writing = parser.add_argument_group("writing")
    writing.add_argument("--temperature", type=float, default=0.9, metavar="N", help="0 takes the likeliest token")
    writing.add_argument("--top_p", type=float, default=0.9, metavar="N", help="mass of the nucleus sampled from")
    writing.add_argument("--top_k", type=int, default=0, metavar="N", help="sample from the k likeliest only; 0: all")
    writing.add_argument("--max_new_tokens", type=int, default=200, metavar="N", help="a sonnet's end at the latest")
    writing.add_argument("--generate_only", action="store_true", help="write with --adapter or --model; no training")
    writing.add_argument("--adapter", metavar="DIR", help="a LoRA adapter's folder, for --generate_only")
    writing.add_argument("--model", metavar="DIR", help="a model's folder, for --generate_only")
    files.add_argument("--sonnet_out", default="predictions/generated_sonnets.txt", metavar="FILE", help="new sonnets")
    options = parse(parser, arguments, "sonnets", REPORT, "generate_only", ("sonnet_path", "dev_sonnet_path"))
    if not options.generate_only:
        refuse(parser, options, ("adapter", "model"), "without --generate_only (--model_size trains from a folder)")
    if options.model:
        refuse(parser, options, ("model_size",), "beside --model")
    check_outputs(options, ("sonnet_out",), ("sonnet_path", "dev_sonnet_path", "held_out_sonnet_path"))
    return options


def main(options: argparse.Namespace) -> None:
    # imported here, so that --help and a mistyped option are answered at once
    import processes
    from datasets import SonnetsDataset, bucketed_batches, read_sonnets
    from evaluation import language_model_figures, sonnet_figures
    from lora import apply_lora, hold_frozen, load_adapter, merge_lora, save_adapter
    from models.gpt2 import GPT2Model
    from models.sonnet_gpt import SonnetGPT, check_sampling
    from runs import parameter_counts, summary, write_text
    from training import Task, precision, settings, start, train

    config, lora_config, device, dtype = settings(options)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
    check_sampling(**sampling)
    sampling["seed"] = config.seed
    held_out = read_sonnets(options.held_out_sonnet_path)
    prompts = [sonnet.prompt for sonnet in held_out]

    def generate(model: SonnetGPT, prompts: list[str], **settings) -> list[str]:
        hold_frozen(model.requires_grad_(False), dtype)
        with precision(device, dtype):
            return model.generate(prompts, **sampling, **settings)

    if options.generate_only:
        processes.leave()  # one is enough
        model = SonnetGPT(GPT2Model.from_pretrained(options.model or options.model_size))
        if options.adapter:
            merge_lora(load_adapter(model, options.adapter))
        source = " + ".join(filter(None, (options.model or options.model_size, options.adapter)))
        print(f"sonnets: {source} continues the {len(held_out)} sonnets of {options.held_out_sonnet_path}")
        texts = generate(model.to(device), prompts)
        write_text(Path(options.sonnet_out), as_file(held_out, texts))
        print(f"{preview(held_out, texts)}\n\nall {len(texts)} are in {options.sonnet_out}")
        return

    sonnets, dev = read_sonnets(options.sonnet_path), read_sonnets(options.dev_sonnet_path)
    if not all(sonnet.continuation for sonnet in dev):
        raise InputError(f"{options.dev_sonnet_path}: a dev sonnet ends within the given lines; name whole ones")
    model = SonnetGPT(GPT2Model.from_pretrained(options.model_size))
    if options.use_lora:
        apply_lora(model, lora_config)
    model.to(device)
    model.encode(prompts)  # one too long to continue ends the run now, not after training
    train_set, dev_set = SonnetsDataset(sonnets, model.gpt), SonnetsDataset(dev, model.gpt)
    whole = all(sonnet.continuation for sonnet in held_out)  # the course's file has three lines of each: no loss then
    test_set = SonnetsDataset(held_out, model.gpt) if whole else None
    files = [options.sonnet_path, options.dev_sonnet_path, options.held_out_sonnet_path]
    data = f"{len(sonnets)} train, {len(dev)} dev, {len(held_out)} test"
    run, title = start("sonnets", (), data, files, model, options, device, dtype)
    known = {sonnet.text for sonnet in sonnets}
    if seen := sum(sonnet.text in known for sonnet in [*dev, *held_out]):
        print(f"note: {seen} dev or test sonnets are in the training file too: their losses say nothing about new text")

    def figures(model: SonnetGPT, dataset: SonnetsDataset | None, split: str) -> dict[str, float]:
        if dataset is None:
            return {}
        with precision(device, dtype):
            found = language_model_figures(model, dataset.in_order(config.batch_size))
        return {f"{split}_{name}": value for name, value in found.items()}

    base = figures(model, dev_set, "dev") | figures(model, test_set, "test")
    if options.use_lora:
        hold_frozen(model, dtype)
    step_size = config.batch_size * config.grad_accumulation
    task = Task(
        batches=lambda epoch: bucketed_batches(train_set.lengths, step_size, config.seed, epoch),
        collate=train_set.collate,
        loss=lambda model, batch: model.loss(batch["input_ids"], batch["labels"]),
        items=train_set.targets,
        evaluate=lambda model: figures(model, dev_set, "dev"),
        save=lambda model, folder: (save_adapter if options.use_lora else GPT2Model.save_pretrained)(model.gpt, folder),
    )
    progress = train(model, task, config, run, device, dtype)

    # the best epoch's weights, or LoRA's base in float32 with its best adapter
    counts = parameter_counts(model)
    del model  # and its gradients
    trained = options.model_size if options.use_lora or not progress.rows else run.best
    model = SonnetGPT(GPT2Model.from_pretrained(trained)).to(device)
    if options.use_lora and progress.rows:
        load_adapter(model, run.best)
    tuned = figures(model, dev_set, "dev") | figures(model, test_set, "test")
    merge_lora(model)
    texts = generate(model, prompts)
    form = sonnet_figures(generate(model, [sonnet.prompt for sonnet in dev], max_lines=None), dev, sonnets)

    for path in (run.folder / "predictions" / "generated_sonnets.txt", Path(options.sonnet_out)):
        write_text(path, as_file(held_out, texts))
    if progress.rows:
        from figures import draw_curves  # matplotlib takes a moment

        draw_curves(run.folder / "curves.png", progress.rows, title, base["dev_loss"])
    before = {f"base_{name}": value for name, value in base.items()}
    run.finish(title, summary("sonnets", options, counts, progress) | before | tuned | form)
    print(f"\n{preview(held_out, texts)}\n\n{comparison(base, tuned, form)}\n")
    print(f"sonnets: {options.sonnet_out}\ncurves, metrics, best model, summary: {run.folder}")


def as_file(sonnets: list, texts: list[str]) -> str:
    """The course's format: a header, then each sonnet's number and text."""
    return "--Generated Sonnets--\n\n" + "".join(f"\n{s.number}\n\n{t}\n" for s, t in zip(sonnets, texts, strict=True))


def preview(sonnets: list, texts: list[str], count: int = 2) -> str:
    """The first sonnets written, for the screen: what was given, then a bar before each line that is new."""
    blocks = []
    for sonnet, text in list(zip(sonnets, texts, strict=True))[:count]:
        new = text.removeprefix(sonnet.prompt).split("\n")
        blocks.append(
            "\n".join([f"sonnet {sonnet.number}, continued", sonnet.prompt.rstrip("\n"), *(f"| {n}" for n in new)])
        )
    return "\n\n".join(blocks)


def comparison(base: dict, tuned: dict, form: dict) -> str:
    """What training changed, a line a figure."""
    lines = ["                              base -> tuned"]
    for name, value in tuned.items():
        label = name.replace("_", " ").replace("loss", "loss, nats a token")
        lines.append(f"{label:<26}{base[name]:>8.3f} -> {value:.3f}  ({100 * (value / base[name] - 1):+.1f} %)")
    lines.append(f"dev chrF of what is new     {form['dev_chrf']:.1f}  (lines of random training sonnets: "
                 f"{form['dev_chrf_floor']:.1f}, sd {form['dev_chrf_floor_sd']:.1f})")  # fmt: skip
    lines.append("form of dev sonnets            model  Shakespeare  his lines shuffled")
    for name in [name.removeprefix("gold_dev_") for name in form if name.startswith("gold_dev_")]:
        figures = [form[f"{who}_{name}"] for who in ("dev", "gold_dev", "shuffled_dev")]
        lines.append(f"{name.replace('_', ' '):<26}{figures[0]:>10.2f}{figures[1]:>13.2f}{figures[2]:>20.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_cleanly():
        main(parse_options())
