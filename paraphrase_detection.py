"""Fine-tune GPT-2 to classify whether two texts mean the same, with a pooling of hidden states.

python paraphrase_detection.py --pooling generalized              # minutes: pairs of Bible verses
python paraphrase_detection.py --model_size gpt2 --dataset quora  # 124M weights, Quora's questions
"""

from pathlib import Path

import torch

import distributed
from cli import (
    Parser,
    add_common_options,
    check_outputs,
    exit_cleanly,
    parse,
    preset_name,
    reject_options,
)
from config import ROOT, InputError
from datasets import PAIR_POOL, PairsDataset, bucketed_batches, read_pairs
from evaluation import classification_metrics, classified_pairs, classify
from files import write_text
from lora import apply_lora, cast_frozen_weights
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ANSWERS, ParaphraseGPT
from pooling import POOLINGS
from runs import finish_run, metrics_table, start_run
from training import Task, Trainer, autocast, setup

DEFAULTS = {
    "epochs": 3,
    "batch_size": 16,
    "schedule": "linear",
    "warmup": 0.06,
    "max_grad_norm": 1.0,
}
REPORT = {
    "model_size": "gpt2",
    "pair_encoding": "joint",
    "epochs": 3,
    "patience": 3,
    "batch_size": 8,
}
REPORT |= {"schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}
SPLITS = ("train", "dev", "test")
DATASETS = {  # the files of train, dev and test, and the script that makes them
    "verses": ("verses-train.csv", "verses-dev.csv", "verses-test.csv", "data/build_verses.py"),
    "quora": (
        "quora-train.csv",
        "quora-dev.csv",
        "quora-test-student.csv",
        "data/download_quora.py",
    ),
}
PENALTIES = {"parameter_penalty": 0.01, "attention_penalty": 0.0, "vector_penalty": 0.0}
SHOWN_ERRORS = 10


def parse_options(arguments=None):
    parser = Parser(__doc__)
    add_common_options(parser, "paraphrases", **DEFAULTS)
    add = parser.add_argument_group("pairs").add_argument
    add("--pooling", default="last", choices=POOLINGS, help="how hidden states become one vector")
    text = "joint: one prompt with both texts (default except for tiny); separate: one text each"
    add("--pair_encoding", choices=("joint", "separate"), help=text)
    for name, default in PENALTIES.items():
        text = f"weight of this penalty of multihead pooling (default {default})"
        add(f"--{name}", type=float, metavar="N", help=text)
    text = "verses (default), or quora (default of --preset report), see data/download_quora.py"
    add("--dataset", choices=DATASETS, help=text)
    for split in SPLITS:
        add(f"--para_{split}", metavar="FILE", help=f"{split} pairs instead of those of --dataset")
    for split in SPLITS[1:]:
        path = f"predictions/para-{split}-output.csv"
        add(f"--para_{split}_out", default=path, metavar="FILE", help=f"predictions of {split}")
    add("--predict_only", action="store_true", help="no training; classify with --model")
    text = "best/ folder of a run for --predict_only; --model_size names the base of an adapter"
    add("--model", metavar="DIR", help=text)
    unused = ("seed", "pooling", "pair_encoding", "para_train", *PENALTIES)
    options = parse(parser, arguments, "paraphrases", REPORT, "predict_only", unused)
    if options.pair_encoding is None:  # tiny hardly learns to compare texts within a prompt
        tiny = preset_name(options.model_size) == "tiny"
        options.pair_encoding = "separate" if tiny else "joint"
    if options.predict_only and not options.model:
        raise InputError("--predict_only needs --model, the best/ folder of a run")
    if options.model and not options.predict_only:
        raise InputError("--model needs --predict_only; --model_size trains from a folder")
    if options.model and not (Path(options.model) / "adapter_config.json").is_file():
        reject_options(parser, options, ("model_size",), "with a --model that is not an adapter")
    if options.pooling != "multihead":
        reject_options(parser, options, PENALTIES, "without --pooling multihead")
    needed = [f"para_{split}" for split in (SPLITS[1:] if options.predict_only else SPLITS)]
    missing = [name for name in needed if not getattr(options, name)]
    if not missing:
        options.dataset = "files"
    elif not options.dataset:
        if missing != needed:
            raise InputError(f"--{', --'.join(missing)} is missing too; or add --dataset")
        options.dataset = "quora" if options.preset else "verses"
    for split, file in zip(SPLITS, DATASETS.get(options.dataset, ()), strict=False):
        if getattr(options, f"para_{split}") is None:
            setattr(options, f"para_{split}", str(ROOT / "data" / file))
    check_outputs(options, ("para_dev_out", "para_test_out"), needed)
    return options


def main(options):
    config, lora_config, device, dtype = setup(options)
    if options.predict_only:
        predict_only(options, device, dtype)
        return

    # Load
    gpt = GPT2Model.from_pretrained(options.model_size)
    penalties = {name: getattr(options, name) for name in PENALTIES}
    settings = {name: value for name, value in penalties.items() if value is not None}
    model = ParaphraseGPT(gpt, options.pooling, options.pair_encoding, **settings)
    if options.use_lora:
        apply_lora(model, lora_config)
    model.to(device)
    datasets = {split: load_dataset(options, split, model) for split in SPLITS}
    sizes = ", ".join(f"{len(dataset):,} {split}" for split, dataset in datasets.items())
    variant = (options.pooling, options.pair_encoding)
    data, paths = f"{options.dataset} ({sizes})", [getattr(options, f"para_{s}") for s in SPLITS]
    run = start_run("paraphrases", variant, data, paths, model, options, dtype)

    # Train
    if options.use_lora:
        cast_frozen_weights(model, dtype)
    lengths, step_size = datasets["train"].lengths, config.batch_size * config.grad_accumulation
    task = Task(
        batches=lambda epoch: bucketed_batches(lengths, step_size, config.seed, epoch, PAIR_POOL),
        collate=datasets["train"].collate,
        loss=lambda model, batch: model.loss(**batch),
        num_targets=lambda batch: len(batch["labels"]),
        evaluate=lambda model: evaluate(model, {"dev": datasets["dev"]}, device, dtype)[1],
        save=ParaphraseGPT.save_pretrained,
        metric="dev_accuracy",
        larger_is_better=True,
    )
    progress = Trainer(model, task, config, run, device, dtype).train()
    if progress.epochs:
        del model, task  # and the optimizer
        model = ParaphraseGPT.from_pretrained(run.best, options.model_size).to(device)

    # Evaluate and report
    del datasets["train"]
    logits, metrics = evaluate(model, datasets, device, dtype)
    errors = describe_errors(logits["dev"], datasets["dev"], read_pairs(options.para_dev))
    write_text(run.folder / "errors.md", errors)
    with autocast(device, dtype):
        draw_token_weights(run.folder / "attention.png", model, datasets["dev"], logits["dev"])
    chosen = {name: getattr(options, name) for name in ("dataset", "pooling", "pair_encoding")}
    outputs = format_predictions(options, datasets, logits)
    pairs = {
        split: classified_pairs(logits[split], dataset)
        for split, dataset in datasets.items()
        if dataset.labels is not None
    }
    finish_run(run, "paraphrases", options, progress, chosen | metrics, outputs, pairs)


def load_dataset(options, split, model):
    """The pairs of a split as tokens; prints which of them are skipped or truncated."""
    path, advice = getattr(options, f"para_{split}"), "check the path"
    if options.dataset in DATASETS and Path(path).parent == ROOT / "data":
        advice = f"python {DATASETS[options.dataset][3]} makes it"
    dataset = PairsDataset(read_pairs(path, advice), model.gpt, model.settings["pair_encoding"])
    if split != "test" and dataset.labels is None:
        raise InputError(f"{path} has no labels in is_duplicate; only test pairs may have none")
    for problem, lines in (
        ("skipped, because a text or the label is missing", dataset.skipped_lines),
        ("truncated", dataset.truncated_lines),
    ):
        if lines:
            shown = ", ".join(map(str, lines[:10]))
            print(f"{path}: {len(lines)} pairs are {problem} (first lines: {shown})")
    return dataset


def evaluate(model, datasets, device, dtype):
    """The logits of each split and the metrics of those that have labels."""
    logits, metrics = {}, {}
    for split, dataset in datasets.items():
        with autocast(device, dtype):
            logits[split] = classify(model, dataset)
        if dataset.labels is not None:
            results = classification_metrics(logits[split], dataset.labels)
            metrics |= {f"{split}_{name}": value for name, value in results.items()}
    return logits, metrics


def predict_only(options, device, dtype):
    """Classify dev and test pairs with a saved model."""
    distributed.shutdown()  # one process is enough
    model = ParaphraseGPT.from_pretrained(options.model, options.model_size).to(device)
    datasets = {split: load_dataset(options, split, model) for split in SPLITS[1:]}
    logits, metrics = evaluate(model, datasets, device, dtype)
    for path, text in format_predictions(options, datasets, logits).values():
        write_text(Path(path), text)
        print(f"predictions: {path}")
    print(metrics_table(metrics))


def format_predictions(options, datasets, logits):
    """The course's format for dev and test: every id of the file and 1 for a paraphrase.

    A skipped pair gets the majority class of the dev pairs.
    """
    majority = int(datasets["dev"].labels.float().mean() > 0.5)
    outputs = {}
    for split in SPLITS[1:]:
        dataset = datasets[split]
        answers = dict(zip(dataset.ids, logits[split].argmax(1).tolist(), strict=True))
        lines = [f"{name}, {answers.get(name, majority)} \n" for name in dataset.all_ids]
        if dataset.skipped_lines:
            print(f"{split}: the prediction of skipped pairs is {ANSWERS[majority]}")
        text = "id \t Predicted_Is_Paraphrase \n" + "".join(lines)
        outputs[f"para-{split}-output.csv"] = getattr(options, f"para_{split}_out"), text
    return outputs


def describe_errors(logits, dataset, pairs):
    """Markdown with the misclassified dev pairs of the highest confidence."""
    confidence, predicted = logits.softmax(1).max(1)
    pairs = pairs.set_index("id").loc[dataset.ids].reset_index()
    order = confidence.argsort(descending=True).tolist()
    wrong = [index for index in order if predicted[index] != dataset.labels[index]]
    blocks = [f"# {len(wrong)} of {len(dataset)} dev pairs are misclassified\n"]
    for index in wrong[:SHOWN_ERRORS]:
        pair = pairs.loc[index]
        answer, gold = ANSWERS[predicted[index]], ANSWERS[dataset.labels[index]]
        blocks.append(
            f"**predicted {answer} ({confidence[index]:.1%}), label {gold}** "
            f"(id {pair.id}, line {pair.line})\n\n1. {pair.sentence1}\n2. {pair.sentence2}\n"
        )
    return "\n".join(blocks)


@torch.no_grad()
def draw_token_weights(path, model, dataset, logits):
    """Plot a learned pooling's token weights for one dev pair per cell of the confusion matrix."""
    examples = []
    device = next(model.parameters()).device
    cells = (2 * dataset.labels + logits.argmax(1)).tolist()
    for cell in sorted(set(cells)):
        index = cells.index(cell)
        batch = dataset.collate([index])
        weights = model.token_weights(
            batch["input_ids"].to(device), batch["attention_mask"].to(device)
        )
        if weights is None:
            return
        tokens, relative = [], []
        for text, row in zip(dataset.texts(index), weights.flatten(0, -2).tolist(), strict=True):
            tokens += [model.gpt.tokenizer.decode([token]) for token in text.tolist()]
            relative += [weight * len(text) for weight in row[: len(text)]]
        heading = f"{dataset.ids[index]}: label {ANSWERS[cell // 2]}, predicted {ANSWERS[cell % 2]}"
        examples.append((heading, tokens, relative))
    from plots import draw_attention  # matplotlib is slow to import

    draw_attention(path, examples, f"token weights of {model.settings['pooling']} pooling")


if __name__ == "__main__":
    with exit_cleanly():
        main(parse_options())
