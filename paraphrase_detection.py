"""Fine-tune GPT-2 to classify whether two texts mean the same, with a pooling of hidden states.

python paraphrase_detection.py --pooling generalized              # minutes: pairs of Bible verses
python paraphrase_detection.py --model_size gpt2 --dataset quora  # 124M weights, Quora's questions
python paraphrase_detection.py --predict runs/.../best --pair "one text" "another"
"""

from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from config import ROOT, InputError, TrainConfig
from datasets import PairsDataset, make_pairs, note_repeated_texts, read_pairs, read_text
from evaluation.metrics import classification_metrics, metrics_table, pair_metrics
from evaluation.plots import draw_attention
from models.adapters import load_model
from models.paraphrase_gpt import ANSWERS, HEAD_FILE, ParaphraseGPT
from pooling import POOLINGS
from training import distributed
from training import options as opt
from training.loop import Task, Trainer
from training.runs import write_csv, write_text
from training.setup import check_outputs, evaluate, finish_run, open_run, prepare, summarize

TINY_RATES = {"full": 5e-4, "lora": 2e-3}  # chosen on dev, see data/README.md
DEFAULTS = {"epochs": 3, "batch_size": 16, "schedule": "linear", "warmup": 0.06}
DEFAULTS |= {"max_grad_norm": 1.0}
REPORT = {"model_size": "gpt2", "pair_encoding": "joint", "epochs": 3, "patience": 3}
REPORT |= {"batch_size": 8, "schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}
DATASETS = {  # the files of train, dev and test
    "verses": ("verses-train.csv", "verses-dev.csv", "verses-test.csv"),
    "quora": ("quora-train.csv", "quora-dev.csv", "quora-test-student.csv"),
}
SPLITS = ("train", "dev", "test")
ENCODINGS = ("joint", "separate")
SENTENCES = ["sentence1", "sentence2"]
SHOWN_TOKENS, EXAMPLES = 5, 4  # tokens of --pair, and pairs in attention.png


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = opt.task_parser(__doc__, **DEFAULTS)
    add = parser.add_argument_group("pairs").add_argument
    add("--pooling", default="last", choices=POOLINGS, help="how hidden states become one vector")
    add("--pair_encoding", choices=ENCODINGS, help="one prompt (default but for tiny) or two")
    add("--freeze_gpt", action="store_true", help="train only pooling and head, GPT-2 in eval mode")
    add("--dataset", choices=DATASETS, help="default: verses, or quora with --preset report")
    for split in SPLITS:
        add(f"--para_{split}", metavar="FILE", help=f"{split} pairs instead of those of --dataset")
    for split in SPLITS[1:]:
        path = f"predictions/para-{split}-output.csv"
        add(f"--para_{split}_out", default=path, metavar="FILE", help=f"predictions of {split}")
    add("--predict", metavar="DIR", help="classify dev and test, or given files, with best/")
    add("--pair", nargs=2, action="append", metavar="TEXT", help="texts for --predict, not files")
    add("--score", metavar="FILE", help="no model: metrics of predictions for --para_dev")
    options = opt.parse(parser, arguments, REPORT, TINY_RATES)
    if options.use_lora and options.freeze_gpt:
        raise InputError("--use_lora trains GPT-2 and --freeze_gpt does not; remove one of them")
    if options.freeze_gpt:
        options.method = "frozen"
    if options.pair_encoding is None:  # tiny hardly learns to compare texts within a prompt
        options.pair_encoding = "separate" if opt.is_tiny(options.model_size) else "joint"
    choose_files(options)
    check_outputs(options, "para_dev_out", "para_test_out")
    return options


def choose_files(options: Namespace) -> None:
    """Set the files that were not given; raises InputError if only some are for training."""
    values = vars(options)
    missing = [split for split in SPLITS if values[f"para_{split}"] is None]
    if options.dataset is None and 0 < len(missing) < len(SPLITS) and not options.score:
        if options.predict and missing != ["dev", "test"]:  # classify only the given files
            return
        raise InputError(f"--para_{missing[0]} is missing too; or name a --dataset")
    if options.dataset is None:
        options.dataset = "quora" if options.preset == "report" else "verses"
    for split, file in zip(SPLITS, DATASETS[options.dataset], strict=True):
        values[f"para_{split}"] = values[f"para_{split}"] or str(ROOT / "data" / file)


def main(options: Namespace) -> None:
    if options.score:
        print(metrics_table(score(options)))
        return
    config = opt.from_options(TrainConfig, options)
    hardware = opt.choose_hardware(options)
    torch.manual_seed(config.seed)
    if options.predict:
        predict_only(options, hardware)
        return

    # Data, model and method
    model = load_classifier(options)
    prepare(model, options, hardware)
    pairs = {split: read_split(options, split) for split in SPLITS}
    note_repeated_texts({s: frame[SENTENCES].values.tolist() for s, frame in pairs.items()})
    datasets = {split: make_dataset(model, split, frame) for split, frame in pairs.items()}
    variant = (model.settings["pooling"], model.settings["pair_encoding"])
    run = open_run("paraphrases", variant, model, options, hardware)

    # Training
    measure = partial(evaluate, pair_metrics, hardware)
    train, dev = datasets.pop("train"), {"dev": datasets["dev"]}
    task = Task(train, lambda: measure(model, dev)[0], model.save_pretrained, "dev_accuracy")
    epochs = Trainer(model, task, config, run, hardware).train()
    run.summary |= summarize(epochs, task.metric)

    # The best model: its metrics and predictions
    if epochs:
        model = ParaphraseGPT.from_pretrained(run.best).to(hardware.device)
    metrics, results = measure(model, datasets)
    metrics = {"dataset": options.dataset, **model.settings, **metrics}
    texts = pd.concat(pairs).reset_index(0, names="split")[["split", "id", *SENTENCES]]
    per_text = results.dropna(subset="loss").astype({"label": int}).merge(texts)
    per_text = per_text.sort_values(["split", "loss"], ascending=[True, False])
    usage = f'python paraphrase_detection.py --predict {run.shown}/best --pair "one text" "another"'
    finish_run(run, metrics, per_text, format_predictions(options, datasets, results), usage)
    examples = range(len(datasets["dev"].ids))[:EXAMPLES]
    weights = token_weights(model, datasets["dev"], examples, hardware)
    if weights is not None:
        write_csv(run.folder / "attention.csv", weights)
        title = f"token weights of {variant[0]} pooling"
        draw_attention(run.folder / "attention.png", weights, title)


def load_classifier(options: Namespace) -> ParaphraseGPT:
    """A new classifier on a GPT-2, or that of a run's best/, which is trained further."""
    if (Path(options.model_size) / HEAD_FILE).is_file():
        return ParaphraseGPT.from_pretrained(options.model_size)
    gpt = load_model(options.model_size)
    return ParaphraseGPT(gpt, options.pooling, options.pair_encoding)


def read_split(options: Namespace, split: str) -> pd.DataFrame:
    """The pairs of a split; raises InputError if train or dev pairs have no labels."""
    path = vars(options)[f"para_{split}"]
    if options.dataset == "quora" and not Path(path).exists():
        raise InputError(f"{path} does not exist; python data/download_quora.py makes it")
    pairs = read_pairs(path)
    if split != "test" and pairs["label"].isna().all():
        raise InputError(f"{path} has no labels in is_duplicate; only test pairs may have none")
    return pairs


def make_dataset(model: ParaphraseGPT, split: str, pairs: pd.DataFrame) -> PairsDataset:
    """The pairs as tokens; prints which are skipped or truncated."""
    try:
        dataset = PairsDataset(pairs, model.gpt, model.settings["pair_encoding"])
    except InputError as error:
        raise InputError(f"the {split} pairs: {error}") from error
    note_lines(f"{split} pairs are skipped (a text or the label is missing)", dataset.skipped_lines)
    note_lines(f"{split} pairs are truncated", dataset.truncated_lines)
    return dataset


def note_lines(problem: str, lines: list[int]) -> None:
    """Print the number of lines with a problem, and the first of them."""
    if lines:
        print(f"note: {len(lines)} {problem}: lines {', '.join(map(str, lines[:9]))}")


def format_predictions(
    options: Namespace, datasets: dict[str, PairsDataset], results: pd.DataFrame
) -> dict[str, tuple[str, str]]:
    """Path and text of dev and test predictions, in the course's format: every id and 0 or 1.

    A skipped pair gets the majority class of the dev pairs, or 0.
    """
    majority, outputs = 0, {}
    if "dev" in datasets:
        majority = int(datasets["dev"].labels.float().mean() > 0.5)
    for split, frame in results.groupby("split"):
        answers = dict(zip(frame["id"], frame["predicted"], strict=True))
        lines = [f"{name}, {answers.get(name, majority)} \n" for name in datasets[split].all_ids]
        text = "id \t Predicted_Is_Paraphrase \n" + "".join(lines)
        outputs[f"para-{split}-output.csv"] = vars(options)[f"para_{split}_out"], text
    return outputs


def score(options: Namespace) -> dict[str, float]:
    """The metrics of a file of predictions, without a model."""
    labels = read_split(options, "dev").dropna(subset="label").set_index("id")["label"]
    classes = {"0": 0, "1": 1, "3919": 0, "8505": 1}  # the tokens of no and yes count, too
    answers = {}
    for line in read_text(options.score).splitlines()[1:]:
        name, _, answer = (part.strip() for part in line.rpartition(","))
        if answer not in classes:
            raise InputError(f"{options.score}: {line!r} is not an id, a comma, and 0 or 1")
        answers[name] = classes[answer]
    missing = labels.index.difference(answers)
    if len(missing):
        raise InputError(f"{options.score} lacks {len(missing)} ids, among them {missing[0]}")
    predicted = torch.tensor([answers[name] for name in labels.index])
    metrics = classification_metrics(predicted, torch.tensor(labels.to_numpy(int)))
    return {f"dev_{name}": value for name, value in metrics.items()}


def predict_only(options: Namespace, hardware: opt.Hardware) -> None:
    """Classify --pair, or else the given files or dev and test pairs, with a saved model."""
    distributed.shutdown()  # one process is enough
    model = ParaphraseGPT.from_pretrained(options.predict).to(hardware.device)
    if options.pair:
        answer_pairs(options.pair, model, hardware)
        return
    splits = [split for split in SPLITS[1:] if vars(options)[f"para_{split}"]]
    datasets = {s: make_dataset(model, s, read_split(options, s)) for s in splits}
    metrics, results = evaluate(pair_metrics, hardware, model, datasets)
    for path, text in format_predictions(options, datasets, results).values():
        write_text(path, text)
        print(f"predictions: {path}")
    if metrics:
        print(metrics_table(metrics))


def answer_pairs(pairs: list[list[str]], model: ParaphraseGPT, hardware: opt.Hardware) -> None:
    """Print whether the texts of each pair mean the same, and how a learned pooling weighs them."""
    for texts in pairs:
        if not all(map(str.strip, texts)):
            raise InputError(f"--pair {texts} has an empty text; give two texts")
    dataset = PairsDataset(make_pairs(pairs), model.gpt, model.settings["pair_encoding"])
    _, results = evaluate(pair_metrics, hardware, model, {"pairs": dataset})
    for index, result in results.iterrows():
        probability = max(result["probability"], 1 - result["probability"])
        answer = ANSWERS[result["predicted"]]
        print(f"{answer} (probability {probability:.3f}): {' | '.join(pairs[index])}")
        weights = token_weights(model, dataset, [index], hardware)
        if weights is not None:
            heaviest = weights.nlargest(SHOWN_TOKENS, "weight")[["token", "weight"]]
            shown = [f"{token!r} {weight:.2f}" for token, weight in heaviest.to_numpy()]
            print(f"largest token weights (1 is the mean): {', '.join(shown)}")


@torch.no_grad()
def token_weights(
    model: ParaphraseGPT, dataset: PairsDataset, indices: Iterable[int], hardware: opt.Hardware
) -> pd.DataFrame | None:
    """`pair`, `token` and its `weight` by a learned pooling (1 is the mean); None without one."""
    records = []
    for index in indices:
        batch = dataset.collate([index])
        ids, mask = (batch[name].to(hardware.device) for name in ("input_ids", "attention_mask"))
        with hardware.autocast():
            weights = model.token_weights(ids, mask)
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
