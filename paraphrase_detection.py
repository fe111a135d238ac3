"""Fine-tune GPT-2 to classify whether two texts mean the same, with a pooling of hidden states.

python paraphrase_detection.py --pooling generalized              # minutes: pairs of Bible verses
python paraphrase_detection.py --model_size gpt2 --dataset quora  # 124M weights, Quora's questions
python paraphrase_detection.py --predict runs/.../best --pair "one text" "another"
"""

import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from config import ROOT, InputError
from datasets import PairsDataset, check_unique, make_pairs, read_pairs, read_text
from evaluation.metrics import classification_metrics, metrics_table, pair_metrics
from models.adapters import load_model
from models.paraphrase_gpt import ANSWERS, HEAD_FILE, ParaphraseGPT
from pooling import POOLINGS
from training import options as opt
from training import setup
from training.loop import Task

TINY_RATES = {"full": 2e-4, "lora": 2e-3, "frozen": 1e-3}  # chosen on dev, see RESULTS.md
DEFAULTS = {"epochs": 3, "batch_size": 16, "schedule": "linear", "warmup": 0.06}
DEFAULTS |= {"max_grad_norm": 1.0, "task": "paraphrases"}
REPORT = {"model_size": "gpt2", "pair_encoding": "joint", "dataset": "quora", "patience": 3}
REPORT |= {"batch_size": 8, "schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}
DATASETS = {
    "verses": {split: f"verses-{split}.csv" for split in ("train", "dev", "test")},
    "quora": {"train": "quora-train.csv", "dev": "quora-dev.csv", "test": "quora-test-student.csv"},
}


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = opt.task_parser(__doc__, **DEFAULTS)
    add = parser.add_argument_group("pairs").add_argument
    add("--pooling", default="last", choices=POOLINGS, help="how hidden states become one vector")
    add("--pair_encoding", choices=("joint", "separate"), help="one prompt, or each text alone")
    text = "train only pooling and head, GPT-2 in eval mode"
    add("--freeze_gpt", action="append_const", dest="methods", const="frozen", help=text)
    add("--dataset", default="verses", choices=DATASETS, help="quora: see data/download_quora.py")
    for split in ("train", "dev", "test"):
        add(f"--para_{split}", metavar="FILE", help=f"{split} pairs, instead of all of --dataset")
    for split in ("dev", "test"):
        path = f"predictions/para-{split}-output.csv"
        add(f"--para_{split}_out", default=path, metavar="FILE", help=f"predictions of {split}")
    add("--predict", metavar="DIR", help="classify dev and test, or given files, with best/")
    add("--pair", nargs=2, action="append", metavar="TEXT", help="texts for --predict, not files")
    add("--score", metavar="FILE", help="no model: metrics of predictions for --para_dev")
    options = opt.parse(parser, arguments, REPORT, TINY_RATES)
    if options.pair_encoding is None:  # tiny is less accurate with one prompt
        options.pair_encoding = "separate" if opt.is_tiny(options.model_size) else "joint"
    if options.para_train or options.para_dev or options.para_test:
        options.dataset = None
    for split, name in DATASETS.get(options.dataset, {}).items():
        vars(options)[f"para_{split}"] = str(ROOT / "data" / name)
    opt.check_options(options)
    return options


def main(options: Namespace) -> None:
    if options.score is not None:
        print(metrics_table(score(options)))
        return
    hardware = opt.choose_hardware(options.device, options.dtype)
    torch.manual_seed(options.seed)
    if options.predict is not None:
        predict_only(options, hardware)
        return

    # Data, model and method
    model = load_classifier(options)
    vars(options).update(model.settings)  # a saved classifier has its own
    setup.prepare(model, options, hardware)
    splits = ("train", "dev", "test")
    datasets = {split: load_pairs(read_split(options, split), split, model) for split in splits}
    run = setup.make_folder(tuple(model.settings.values()), model, options, hardware)

    # Training
    measure = partial(setup.evaluate, pair_metrics, hardware)
    train, dev = datasets.pop("train"), {"dev": datasets["dev"]}
    task = Task(train, lambda: measure(model, dev)[0], model.save_pretrained, "dev_accuracy")
    summary = setup.train(model, task, options, run, hardware)

    # The best model: its metrics and predictions
    if options.epochs:
        model = ParaphraseGPT.from_pretrained(run / "best").to(hardware.device)
    metrics, results = measure(model, datasets)
    metrics = {"dataset": options.dataset, **model.settings, **metrics}
    per_text = results.dropna(subset="loss").astype({"label": int})
    usage = f'python paraphrase_detection.py --predict {run}/best --pair "one" "another"'
    outputs = format_predictions(options, datasets, results)
    setup.finish_run(run, summary, (metrics, per_text), outputs, usage)


def load_classifier(options: Namespace) -> ParaphraseGPT:
    """A new classifier on a GPT-2, or that of a run's best/, which is trained further."""
    if (Path(options.model_size) / HEAD_FILE).is_file():
        return ParaphraseGPT.from_pretrained(options.model_size)
    return ParaphraseGPT(load_model(options.model_size), options.pooling, options.pair_encoding)


def load_pairs(pairs: pd.DataFrame, name: str, model: ParaphraseGPT) -> PairsDataset:
    """Pairs as tokens; prints how many are skipped or truncated, and their lines."""
    data = PairsDataset(pairs, model.gpt, model.settings["pair_encoding"])
    for problem, lines in (("skipped", data.skipped_lines), ("truncated", data.truncated_lines)):
        if lines:
            print(f"note: {len(lines)} {name} pairs are {problem}: lines {lines[:9]}")
    return data


def read_split(options: Namespace, split: str) -> pd.DataFrame:
    """The pairs of a split; raises InputError if there are none, or no labels for training."""
    path = vars(options)[f"para_{split}"]
    if path is None:
        raise InputError(f"--para_{split} is missing; name all files, or only a --dataset")
    pairs = read_pairs(path)
    if split != "test" and pairs["label"].isna().all():
        raise InputError(f"{path} has no labels in is_duplicate; only test pairs may have none")
    return pairs


def format_predictions(
    options: Namespace, datasets: dict[str, PairsDataset], results: pd.DataFrame
) -> setup.Outputs:
    """Path and text of the predictions, in the course's format: every id and 0 or 1.

    A skipped pair gets 0.
    """
    outputs = {}
    for split, frame in results.groupby("split"):
        answers = frame.set_index("id")["predicted"].reindex(datasets[split].all_ids, fill_value=0)
        lines = [f"{name}, {answer} \n" for name, answer in answers.items()]
        text = "id \t Predicted_Is_Paraphrase \n" + "".join(lines)
        outputs[vars(options)[f"para_{split}_out"]] = text
    return outputs


def score(options: Namespace) -> dict[str, float]:
    """The metrics of a file of predictions, without a model."""
    labels = read_split(options, "dev").dropna(subset="label").set_index("id")["label"]
    line = r"^ *(.*\S) *, *(0|1|3919|8505) *$"  # the tokens of no and yes count, too
    rows = re.findall(line, read_text(options.score), re.MULTILINE)
    check_unique(options.score, pd.Series([name for name, _ in rows]))
    answers = dict(rows)
    missing = labels.index.difference(answers)
    if len(missing):
        raise InputError(f"{options.score} has no 0 or 1 for {len(missing)} ids, as {missing[0]}")
    predicted = torch.tensor([answers[name] in ("1", "8505") for name in labels.index]).int()
    metrics = classification_metrics(predicted, torch.tensor(labels.to_numpy(int)))
    return {f"dev_{name}": value for name, value in metrics.items()}


def predict_only(options: Namespace, hardware: opt.Hardware) -> None:
    """Classify --pair, or else the given files or dev and test pairs, with a saved model."""
    model = ParaphraseGPT.from_pretrained(options.predict).to(hardware.device)
    if options.pair:
        frames = {"given": make_pairs(options.pair)}
    else:
        splits = [split for split in ("dev", "test") if vars(options)[f"para_{split}"]] or ["dev"]
        frames = {split: read_split(options, split) for split in splits}
    datasets = {name: load_pairs(frame, name, model) for name, frame in frames.items()}
    metrics, results = setup.evaluate(pair_metrics, hardware, model, datasets)
    if options.pair:
        for pair in results.merge(frames["given"], on="id").itertuples():
            answer = f"{ANSWERS[pair.predicted]} (probability of yes {pair.probability:.3f})"
            print(f"{answer}: {pair.sentence1} | {pair.sentence2}")
    else:
        setup.write_outputs(format_predictions(options, datasets, results))
    if metrics:
        print(metrics_table(metrics))


if __name__ == "__main__":
    with opt.exit_cleanly():
        main(parse_options())
