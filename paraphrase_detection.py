"""Fine-tune GPT-2 to classify whether two texts mean the same, with a pooling of hidden states.

python paraphrase_detection.py --pooling generalized              # minutes: pairs of Bible verses
python paraphrase_detection.py --model_size gpt2 --dataset quora  # 124M weights, Quora's questions
python paraphrase_detection.py --predict_only --model runs/.../best --pair "one text" "another"
"""

from itertools import chain
from pathlib import Path

import pandas as pd
import torch

import distributed
from cli import (
    Parser,
    add_common_options,
    check_outputs,
    check_text,
    exit_cleanly,
    parse,
    preset_name,
    reject_options,
)
from config import ROOT, InputError
from datasets import PAIR_POOL, PairsDataset, bucketed_batches, make_pairs, read_pairs
from evaluation import classification_metrics, classified_pairs, classify
from files import write_csv, write_text
from lora import apply_lora
from models.gpt2 import GPT2Model
from models.paraphrase_gpt import ANSWERS, ParaphraseGPT
from pooling import POOLINGS
from runs import finish_run, metrics_table, start_run
from training import Task, Trainer, autocast, prepare, setup

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
FILE_OPTIONS = ("para_train", "para_dev", "para_test")
OUTPUTS = ("para_dev_out", "para_test_out")
DATASETS = {  # the files of train, dev and test, and the script that makes them
    "verses": ("verses-train.csv", "verses-dev.csv", "verses-test.csv", "data/build/verses.py"),
    "quora": (
        "quora-train.csv",
        "quora-dev.csv",
        "quora-test-student.csv",
        "data/download_quora.py",
    ),
}
PENALTIES = {"parameter_penalty": 0.01, "attention_penalty": 0.0, "vector_penalty": 0.0}
SHOWN_TOKENS = 5


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
    for split, name in zip(SPLITS, FILE_OPTIONS, strict=True):
        add(f"--{name}", metavar="FILE", help=f"{split} pairs instead of those of --dataset")
    for split, name in zip(SPLITS[1:], OUTPUTS, strict=True):
        path = f"predictions/para-{split}-output.csv"
        add(f"--{name}", default=path, metavar="FILE", help=f"predictions of {split}")
    add("--predict_only", action="store_true", help="no training; classify with --model")
    text = "best/ folder of a run for --predict_only; --model_size names the base of an adapter"
    add("--model", metavar="DIR", help=text)
    text = "two texts for --predict_only instead of the pairs of files; can be repeated"
    add("--pair", nargs=2, action="append", metavar="TEXT", help=text)
    unused = ("seed", "pooling", "pair_encoding", "para_train", *PENALTIES)
    options = parse(parser, arguments, "paraphrases", REPORT, "predict_only", unused)
    if options.pair_encoding is None:  # tiny hardly learns to compare texts within a prompt
        tiny = preset_name(options.model_size) == "tiny"
        options.pair_encoding = "separate" if tiny else "joint"
    if options.predict_only and not options.model:
        raise InputError("--predict_only needs --model, the best/ folder of a run")
    if not options.predict_only:
        where = "without --predict_only (--model_size trains from a folder)"
        reject_options(parser, options, ("model", "pair"), where)
    if options.model and not (Path(options.model) / "adapter_config.json").is_file():
        reject_options(parser, options, ("model_size",), "with a --model that is not an adapter")
    if options.pooling != "multihead":
        reject_options(parser, options, PENALTIES, "without --pooling multihead")
    if options.pair:
        for text in chain(*options.pair):
            check_text("pair", text)
        names = ("dataset", *FILE_OPTIONS, *OUTPUTS)
        reject_options(parser, options, names, "with --pair")
    else:
        choose_files(options)
    return options


def choose_files(options):
    """Set the files that --dataset names; raises InputError if some are missing."""
    needed = FILE_OPTIONS[1:] if options.predict_only else FILE_OPTIONS
    missing = [name for name in needed if not getattr(options, name)]
    if not missing:
        options.dataset = "files"
    elif not options.dataset:
        if len(missing) < len(needed):
            raise InputError(f"--{', --'.join(missing)} is missing too; or add --dataset")
        options.dataset = "quora" if options.preset else "verses"
    for name, file in zip(FILE_OPTIONS, DATASETS.get(options.dataset, ()), strict=False):
        if getattr(options, name) is None:
            setattr(options, name, str(ROOT / "data" / file))
    check_outputs(options, OUTPUTS, needed)


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
    data, paths = f"{options.dataset} ({sizes})", [getattr(options, name) for name in FILE_OPTIONS]
    run = start_run("paraphrases", variant, data, paths, model, options, dtype)

    # Train
    prepare(model, options, dtype)
    lengths, step_size = datasets["train"].lengths, config.batch_size * config.grad_accumulation
    task = Task(
        batches=lambda epoch: bucketed_batches(lengths, step_size, config.seed, epoch, PAIR_POOL),
        collate=datasets["train"].collate,
        loss=lambda model, batch: model.loss(**batch, right_padded=True),
        num_targets=len,
        num_tokens=datasets["train"].num_tokens,
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
    with autocast(device, dtype):
        weights = examples_of_weights(model, datasets["dev"], logits["dev"])
    if len(weights):
        from plots import draw_attention  # matplotlib is slow to import

        write_csv(run.folder / "attention.csv", weights)
        title = f"token weights of {options.pooling} pooling"
        draw_attention(run.folder / "attention.png", weights, title)
    chosen = {name: getattr(options, name) for name in ("dataset", "pooling", "pair_encoding")}
    outputs = format_predictions(options, datasets, logits)
    pairs = results_per_pair(options, datasets, logits)
    code = example_code(run.best_name, model.gpt.name, options.pair_encoding)
    finish_run(run, "paraphrases", options, progress, chosen | metrics, outputs, pairs, code)


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
    """Classify --pair, or else dev and test pairs, with a saved model."""
    distributed.shutdown()  # one process is enough
    model = ParaphraseGPT.from_pretrained(options.model, options.model_size).to(device)
    if options.pair:
        answer_pairs(options.pair, model, device, dtype)
        return
    datasets = {split: load_dataset(options, split, model) for split in SPLITS[1:]}
    logits, metrics = evaluate(model, datasets, device, dtype)
    for path, text in format_predictions(options, datasets, logits).values():
        write_text(Path(path), text)
        print(f"predictions: {path}")
    print(metrics_table(metrics))


def answer_pairs(pairs, model, device, dtype):
    """Print whether the texts of each pair mean the same, and how a learned pooling weighs them."""
    dataset = PairsDataset(make_pairs(pairs), model.gpt, model.settings["pair_encoding"])
    probabilities = evaluate(model, {"test": dataset}, device, dtype)[0]["test"].softmax(1)
    for index, (probability, answer) in enumerate(zip(*probabilities.max(1), strict=True)):
        print(f"{ANSWERS[answer]} (probability {probability:.3f}): {' | '.join(pairs[index])}")
        with autocast(device, dtype):
            weights = token_weights(model, dataset, index)
        if len(weights):
            heaviest = weights.nlargest(SHOWN_TOKENS, "weight").itertuples(index=False)
            shown = ", ".join(f"{token!r} {weight:.2f}" for token, weight in heaviest)
            print(f"largest token weights (1 is the mean): {shown}")


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


def example_code(best, base, pair_encoding):
    """Python code for the model card that classifies a pair with the best model."""
    texts = "The king died.", "Then the king was dead."
    return (
        "from datasets import PairsDataset, make_pairs\n"
        "from evaluation import classify\n"
        "from models.paraphrase_gpt import ParaphraseGPT\n\n"
        f"model = ParaphraseGPT.from_pretrained({best!r}, {base!r})\n"
        f"pairs = make_pairs([{texts}])\n"
        f"dataset = PairsDataset(pairs, model.gpt, {pair_encoding!r})\n"
        "print(classify(model, dataset).softmax(1))  # probabilities of no and yes"
    )


def results_per_pair(options, datasets, logits):
    """For each split with labels, the results of its pairs and their texts, largest loss first."""
    results = {}
    for split, dataset in datasets.items():
        if dataset.labels is not None:
            pairs = read_pairs(getattr(options, f"para_{split}")).set_index("id")
            frame = classified_pairs(logits[split], dataset)
            frame = frame.join(pairs[["line", "sentence1", "sentence2"]])
            results[split] = frame.sort_values("loss", ascending=False)
    return results


@torch.no_grad()
def token_weights(model, dataset, index):
    """The tokens of a pair and their weights by a learned pooling, as multiples of the mean."""
    batch = dataset.collate([index])
    device = next(model.parameters()).device
    ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    weights = model.token_weights(ids, mask)
    records = []
    if weights is not None:
        for text, row in zip(dataset.texts(index), weights.flatten(0, -2).tolist(), strict=True):
            for token, weight in zip(text.tolist(), row, strict=False):  # the rest is padding
                records.append((model.gpt.tokenizer.decode([token]), weight * len(text)))
    return pd.DataFrame(records, columns=["token", "weight"])


def examples_of_weights(model, dataset, logits):
    """The token weights of one dev pair per cell of the confusion matrix."""
    cells = (2 * dataset.labels + logits.argmax(1)).tolist()
    frames = []
    for cell in sorted(set(cells)):
        index = cells.index(cell)
        pair = f"{dataset.ids[index]}: label {ANSWERS[cell // 2]}, predicted {ANSWERS[cell % 2]}"
        frames.append(token_weights(model, dataset, index).assign(pair=pair))
    return pd.concat(frames)


if __name__ == "__main__":
    with exit_cleanly():
        main(parse_options())
