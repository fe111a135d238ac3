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
from datasets import PairsDataset, make_pairs, read_pairs, read_text
from evaluation.metrics import classification_metrics, metrics_table, pair_metrics
from evaluation.plots import draw_attention
from models.adapters import load_model
from models.paraphrase_gpt import ANSWERS, HEAD_FILE, ParaphraseGPT
from pooling import POOLINGS
from training import options as opt
from training import setup
from training.loop import Task
from training.runs import write_csv

TINY_RATES = {"full": 5e-4, "lora": 2e-3}  # chosen on dev, see data/README.md
DEFAULTS = {"epochs": 3, "batch_size": 16, "schedule": "linear", "warmup": 0.06}
DEFAULTS |= {"max_grad_norm": 1.0}
REPORT = {"model_size": "gpt2", "pair_encoding": "joint", "dataset": "quora", "patience": 3}
REPORT |= {"batch_size": 8, "schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}
DATASETS = {
    "verses": {split: f"verses-{split}.csv" for split in ("train", "dev", "test")},
    "quora": {"train": "quora-train.csv", "dev": "quora-dev.csv", "test": "quora-test-student.csv"},
}
EXAMPLES = 4  # pairs in attention.png


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = opt.task_parser(__doc__, **DEFAULTS)
    add = parser.add_argument_group("pairs").add_argument
    add("--pooling", default="last", choices=POOLINGS, help="how hidden states become one vector")
    add("--pair_encoding", choices=("joint", "separate"), help="one prompt, or two (for tiny)")
    add("--freeze_gpt", action="store_true", help="train only pooling and head, GPT-2 in eval mode")
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
    if options.freeze_gpt and options.method == "lora":
        raise InputError("--use_lora trains GPT-2 and --freeze_gpt does not; remove one of them")
    if options.freeze_gpt:
        options.method = "frozen"
    if options.pair_encoding is None:  # tiny hardly learns to compare texts within a prompt
        options.pair_encoding = "separate" if opt.is_tiny(options.model_size) else "joint"
    if not (options.para_train or options.para_dev or options.para_test):
        for split, name in DATASETS[options.dataset].items():
            vars(options)[f"para_{split}"] = str(ROOT / "data" / name)
    setup.check_outputs(options, "para_dev_out", "para_test_out")
    return options


def main(options: Namespace) -> None:
    if options.score:
        print(metrics_table(score(options)))
        return
    hardware = opt.choose_hardware(options.device, options.dtype)
    torch.manual_seed(options.seed)
    if options.predict:
        predict_only(options, hardware)
        return

    # Data, model and method
    model = load_classifier(options)
    setup.prepare(model, options, hardware)
    datasets = {split: load_pairs(options, split, model) for split in ("train", "dev", "test")}
    variant = (model.settings["pooling"], model.settings["pair_encoding"])
    run = setup.open_run("paraphrases", variant, model, options, hardware)

    # Training
    measure = partial(setup.evaluate, pair_metrics, hardware)
    train, dev = datasets.pop("train"), {"dev": datasets["dev"]}
    task = Task(train, lambda: measure(model, dev)[0], model.save_pretrained, "dev_accuracy")
    setup.train(model, task, options, run, hardware)

    # The best model: its metrics and predictions
    if options.epochs:
        model = ParaphraseGPT.from_pretrained(run.best).to(hardware.device)
    metrics, results = measure(model, datasets)
    metrics = {"dataset": options.dataset, **model.settings, **metrics}
    per_text = results.dropna(subset="loss").astype({"label": int})
    usage = f'python paraphrase_detection.py --predict {run.folder}/best --pair "one" "another"'
    outputs = format_predictions(options, datasets, results)
    setup.finish_run(run, metrics, per_text, outputs, usage)
    weights = token_weights(model.cpu(), datasets["dev"])
    if weights is not None:
        write_csv(run.folder / "attention.csv", weights)
        draw_attention(run.folder / "attention.png", weights, f"token weights, {run.title}")


def load_classifier(options: Namespace) -> ParaphraseGPT:
    """A new classifier on a GPT-2, or that of a run's best/, which is trained further."""
    if (Path(options.model_size) / HEAD_FILE).is_file():
        return ParaphraseGPT.from_pretrained(options.model_size)
    return ParaphraseGPT(load_model(options.model_size), options.pooling, options.pair_encoding)


def load_pairs(options: Namespace, split: str, model: ParaphraseGPT) -> PairsDataset:
    """The pairs of a split as tokens; prints which are skipped or truncated."""
    data = PairsDataset(read_split(options, split), model.gpt, model.settings["pair_encoding"])
    for problem, lines in (("skipped", data.skipped_lines), ("truncated", data.truncated_lines)):
        if lines:
            print(f"note: {len(lines)} {split} pairs are {problem}: lines {lines[:9]}")
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
        outputs[f"para-{split}-output.csv"] = vars(options)[f"para_{split}_out"], text
    return outputs


def score(options: Namespace) -> dict[str, float]:
    """The metrics of a file of predictions, without a model."""
    labels = read_split(options, "dev").dropna(subset="label").set_index("id")["label"]
    line = r"^ *(.*\S) *, *(0|1|3919|8505) *$"  # the tokens of no and yes count, too
    answers = dict(re.findall(line, read_text(options.score), re.MULTILINE))
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
        answer_pairs(options.pair, model, hardware)
        return
    splits = [split for split in ("dev", "test") if vars(options)[f"para_{split}"]]
    datasets = {split: load_pairs(options, split, model) for split in splits}
    metrics, results = setup.evaluate(pair_metrics, hardware, model, datasets)
    setup.write_outputs(format_predictions(options, datasets, results))
    if metrics:
        print(metrics_table(metrics))


def answer_pairs(pairs: list[list[str]], model: ParaphraseGPT, hardware: opt.Hardware) -> None:
    """Print whether the texts of each pair mean the same."""
    dataset = PairsDataset(make_pairs(pairs), model.gpt, model.settings["pair_encoding"])
    if dataset.skipped_lines:
        raise InputError("--pair has an empty text; give two texts")
    _, results = setup.evaluate(pair_metrics, hardware, model, {"pairs": dataset})
    for texts, result in zip(pairs, results.itertuples(), strict=True):
        probability = max(result.probability, 1 - result.probability)
        print(f"{ANSWERS[result.predicted]} (probability {probability:.3f}): {' | '.join(texts)}")


@torch.no_grad()
def token_weights(model: ParaphraseGPT, dataset: PairsDataset) -> pd.DataFrame | None:
    """`pair`, `token` and its `weight` by a learned pooling (1 is the mean); None without one."""
    records = []
    for index in range(len(dataset.ids))[:EXAMPLES]:
        batch = dataset.collate([index])
        weights = model.token_weights(batch["input_ids"], batch["attention_mask"])
        if weights is None:
            return None
        for text, row in zip(dataset.texts[index], weights.flatten(0, -2).tolist(), strict=True):
            for token, weight in zip(text.tolist(), row, strict=False):  # the rest is padding
                word = model.gpt.tokenizer.decode([token])
                records.append((dataset.ids[index], word, weight * len(text)))
    return pd.DataFrame(records, columns=["pair", "token", "weight"])


if __name__ == "__main__":
    with opt.exit_cleanly():
        main(parse_options())
