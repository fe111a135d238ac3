"""Fine-tune GPT-2 to classify whether two texts mean the same, with a pooling of hidden states.

python paraphrase_detection.py --pooling generalized              # minutes: pairs of Bible verses
python paraphrase_detection.py --model_size gpt2 --dataset quora  # 124M weights, Quora's questions
python paraphrase_detection.py --predict runs/.../best --pair "one text" "another"
"""

from argparse import Namespace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from config import ROOT, InputError
from datasets import PairsDataset, make_pairs, note_repeated_texts, read_pairs, read_text
from evaluation.metrics import classification_metrics, classify, metrics_table, pair_metrics
from evaluation.plots import draw_attention, draw_curves
from models.adapters import load_model
from models.paraphrase_gpt import ANSWERS, ParaphraseGPT
from pooling import POOLINGS
from speed.training import speed_up
from training import distributed
from training import options as opt
from training.loop import Task, Trainer
from training.runs import write_csv, write_text
from training.setup import apply_method, check_outputs, finish_run, open_run, prepare

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
PENALTIES = ("parameter_penalty", "attention_penalty", "vector_penalty")
SHOWN_TOKENS = 5


def parse_options(arguments: list[str] | None = None) -> Namespace:
    parser = opt.task_parser(__doc__, **DEFAULTS)
    add = parser.add_argument_group("pairs").add_argument
    add("--pooling", default="last", choices=POOLINGS, help="how hidden states become one vector")
    text = "joint: one prompt with both texts (default except for tiny); separate: one text each"
    add("--pair_encoding", choices=("joint", "separate"), help=text)
    add("--freeze_gpt", action="store_true", help="train only pooling and head, GPT-2 in eval mode")
    for name in PENALTIES:
        add(
            f"--{name}", type=float, metavar="N", help="weight of this penalty of multihead pooling"
        )
    text = "verses (default), or quora (default of --preset report), see data/download_quora.py"
    add("--dataset", choices=DATASETS, help=text)
    for split in SPLITS:
        add(f"--para_{split}", metavar="FILE", help=f"{split} pairs instead of those of --dataset")
    for split in SPLITS[1:]:
        path = f"predictions/para-{split}-output.csv"
        add(f"--para_{split}_out", default=path, metavar="FILE", help=f"predictions of {split}")
    text = "no training: classify dev and test pairs with a run's best/"
    add("--predict", metavar="DIR", help=text)
    text = "two texts for --predict, instead of files; can be repeated"
    add("--pair", nargs=2, action="append", metavar="TEXT", help=text)
    text = "no model: metrics of a file of predictions against the labels of --para_dev"
    add("--score", metavar="FILE", help=text)
    options = opt.parse(parser, arguments, REPORT)
    if options.use_lora and options.freeze_gpt:
        raise InputError("--use_lora trains GPT-2 and --freeze_gpt does not; remove one of them")
    penalties = [f"--{name}" for name in PENALTIES if vars(options)[name] is not None]
    if penalties and options.pooling != "multihead":
        raise InputError(f"{penalties[0]} needs --pooling multihead, not {options.pooling}")
    if options.pair_encoding is None:  # tiny hardly learns to compare texts within a prompt
        options.pair_encoding = "separate" if opt.is_tiny(options.model_size) else "joint"
    choose_files(options)
    check_outputs(options, ("para_dev_out", "para_test_out"))
    return options


def choose_files(options: Namespace) -> None:
    """Set the files that were not given; raises InputError if only some were."""
    values = vars(options)
    names = [f"para_{split}" for split in (SPLITS[1:] if options.predict else SPLITS)]
    missing = [name for name in names if values[name] is None]
    if options.dataset is None and not options.score and 0 < len(missing) < len(names):
        raise InputError(f"--{', --'.join(missing)} is missing too; or name a --dataset")
    default = "quora" if options.preset == "report" else "verses"
    options.dataset = options.dataset or default
    for split, file in zip(SPLITS, DATASETS[options.dataset], strict=True):
        values[f"para_{split}"] = values[f"para_{split}"] or str(ROOT / "data" / file)


def main(options: Namespace) -> None:
    config = opt.train_config(options, TINY_RATES)
    if options.score:
        score(options)
        return
    hardware = opt.choose_hardware(options)
    torch.manual_seed(config.seed)
    if options.predict:
        predict_only(options, hardware)
        return

    # Data, model and method
    pairs = {split: read_split(options, split) for split in SPLITS}
    texts = {s: frame[["sentence1", "sentence2"]].values.tolist() for s, frame in pairs.items()}
    note_repeated_texts(texts)
    settings = {name: vars(options)[name] for name in PENALTIES if vars(options)[name] is not None}
    gpt = load_model(options.model_size)
    model = ParaphraseGPT(gpt, options.pooling, options.pair_encoding, **settings)
    apply_method(model, options)
    model.to(hardware.device)
    datasets = {split: make_dataset(model, split, frame) for split, frame in pairs.items()}
    variant = (options.pooling, options.pair_encoding)
    run = open_run("paraphrases", variant, model, options, hardware)

    # Training
    prepare(model, options)
    task = Task(
        dataset=datasets["train"],
        evaluate=lambda: evaluate(model, {"dev": datasets["dev"]}, hardware)[0],
        save=model.save_pretrained,
        metric="dev_accuracy",
    )
    epochs = Trainer(model, task, config, run, hardware).train()

    # The best model: its metrics and predictions
    if epochs:
        model = ParaphraseGPT.from_pretrained(run.best).to(hardware.device)
    metrics, logits, results = evaluate(model, datasets, hardware)
    outputs = format_predictions(datasets, logits)
    for split in SPLITS[1:]:
        text = outputs[f"para_{split}_out"]
        write_text(vars(options)[f"para_{split}_out"], text)
        write_text(run.folder / "predictions" / f"para-{split}-output.csv", text)
    write_csv(run.folder / "per_text.csv", join_texts(results, pairs))
    settings = {"dataset": options.dataset, **model.settings}
    usage = f'`python paraphrase_detection.py --predict {run.best} --pair "one" "another"`'
    finish_run(run, epochs, settings | metrics, usage)
    if epochs:
        draw_curves(run.folder, run.title)
    weights = examples_of_weights(model, datasets["dev"], logits["dev"], hardware)
    if weights is not None:
        write_csv(run.folder / "attention.csv", weights)
        title = f"token weights of {options.pooling} pooling"
        draw_attention(run.folder / "attention.png", weights, title)
    print(f"\n{metrics_table(metrics)}\n\npredictions: {options.para_test_out}")
    print(f"metrics, plots and best model: {run.folder}")


def read_split(options: Namespace, split: str) -> pd.DataFrame:
    """The pairs of a split; raises InputError if train or dev pairs have no labels."""
    path = vars(options)[f"para_{split}"]
    if not Path(path).exists():
        advice = "check the path, or see data/README.md for the script that makes it"
        raise InputError(f"{path} does not exist; {advice}")
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
    for problem, lines in (
        ("skipped, because a text or the label is missing", dataset.skipped_lines),
        ("truncated", dataset.truncated_lines),
    ):
        if lines:
            shown = ", ".join(map(str, lines[:10]))
            print(f"note: {len(lines)} {split} pairs are {problem} (first lines: {shown})")
    return dataset


def evaluate(
    model: ParaphraseGPT, datasets: dict[str, PairsDataset], hardware: opt.Hardware
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, pd.DataFrame]]:
    """Metrics, logits, and the results of single pairs by split; metrics need labels."""
    metrics, logits, results = {}, {}, {}
    for split, dataset in datasets.items():
        with hardware.autocast():
            logits[split] = classify(model, dataset)
        if dataset.labels is not None:
            values, results[split] = pair_metrics(logits[split], dataset)
            metrics |= {f"{split}_{name}": value for name, value in values.items()}
    return metrics, logits, results


def join_texts(results: dict[str, pd.DataFrame], pairs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The results of single pairs with their texts, largest loss first."""
    frames = []
    for split, frame in results.items():
        texts = pairs[split][["id", "sentence1", "sentence2"]]
        joined = frame.merge(texts, on="id").sort_values("loss", ascending=False)
        frames.append(joined.assign(split=split))
    return pd.concat(frames)


def format_predictions(
    datasets: dict[str, PairsDataset], logits: dict[str, Tensor]
) -> dict[str, str]:
    """The course's format for dev and test: every id of the file and 1 for a paraphrase.

    A skipped pair gets the majority class of the dev pairs.
    """
    majority = int(datasets["dev"].labels.float().mean() > 0.5)
    outputs = {}
    for split in SPLITS[1:]:
        dataset = datasets[split]
        answers = dict(zip(dataset.ids, logits[split].argmax(1).tolist(), strict=True))
        lines = [f"{name}, {answers.get(name, majority)} \n" for name in dataset.all_ids]
        outputs[f"para_{split}_out"] = "id \t Predicted_Is_Paraphrase \n" + "".join(lines)
    return outputs


def score(options: Namespace) -> None:
    """Print the metrics of a file of predictions, without a model."""
    pairs = read_split(options, "dev").dropna(subset="label").set_index("id")["label"]
    words = {"0": 0, "1": 1, "3919": 0, "8505": 1}  # the tokens of no and yes count, too
    answers = {}
    for line in read_text(options.score).splitlines()[1:]:
        name, _, answer = (part.strip() for part in line.rpartition(","))
        if answer not in words:
            raise InputError(f"{options.score}: {line!r} is not an id, a comma, and 0 or 1")
        answers[name] = words[answer]
    missing = [name for name in pairs.index if name not in answers]
    if missing:
        raise InputError(f"{options.score} lacks {len(missing)} ids, among them {missing[0]}")
    predicted = torch.tensor([answers[name] for name in pairs.index])
    metrics = classification_metrics(predicted, torch.tensor(pairs.to_numpy(int)))
    print(metrics_table({f"dev_{name}": value for name, value in metrics.items()}))


def predict_only(options: Namespace, hardware: opt.Hardware) -> None:
    """Classify --pair, or else dev and test pairs, with a saved model."""
    distributed.shutdown()  # one process is enough
    model = ParaphraseGPT.from_pretrained(options.predict).to(hardware.device)
    if not options.plain:
        speed_up(model.requires_grad_(False))
    if options.pair:
        answer_pairs(options.pair, model, hardware)
        return
    pairs = {split: read_split(options, split) for split in SPLITS[1:]}
    datasets = {split: make_dataset(model, split, frame) for split, frame in pairs.items()}
    metrics, logits, _ = evaluate(model, datasets, hardware)
    for name, text in format_predictions(datasets, logits).items():
        write_text(vars(options)[name], text)
        print(f"predictions: {vars(options)[name]}")
    print(metrics_table(metrics))


def answer_pairs(pairs: list[list[str]], model: ParaphraseGPT, hardware: opt.Hardware) -> None:
    """Print whether the texts of each pair mean the same, and how a learned pooling weighs them."""
    for texts in pairs:
        if not all(text.strip() for text in texts):
            raise InputError(f"--pair {texts} has an empty text; give two texts")
    dataset = PairsDataset(make_pairs(pairs), model.gpt, model.settings["pair_encoding"])
    probabilities = evaluate(model, {"pairs": dataset}, hardware)[1]["pairs"].softmax(1)
    for index, (probability, answer) in enumerate(zip(*probabilities.max(1), strict=True)):
        print(f"{ANSWERS[answer]} (probability {probability:.3f}): {' | '.join(pairs[index])}")
        weights = token_weights(model, dataset, index, hardware)
        if weights is not None:
            heaviest = weights.nlargest(SHOWN_TOKENS, "weight").itertuples(index=False)
            shown = ", ".join(f"{token!r} {weight:.2f}" for token, weight in heaviest)
            print(f"largest token weights (1 is the mean): {shown}")


@torch.no_grad()
def token_weights(
    model: ParaphraseGPT, dataset: PairsDataset, index: int, hardware: opt.Hardware
) -> pd.DataFrame | None:
    """The tokens of a pair and their weights by a learned pooling, as multiples of the mean."""
    batch = dataset.collate([index])
    ids, mask = (batch[name].to(hardware.device) for name in ("input_ids", "attention_mask"))
    with hardware.autocast():
        weights = model.token_weights(ids, mask)
    if weights is None:
        return None
    records = []
    for text, row in zip(dataset.texts[index], weights.flatten(0, -2).tolist(), strict=True):
        for token, weight in zip(text.tolist(), row, strict=False):  # the rest is padding
            records.append((model.gpt.tokenizer.decode([token]), weight * len(text)))
    return pd.DataFrame(records, columns=["token", "weight"])


def examples_of_weights(
    model: ParaphraseGPT, dataset: PairsDataset, logits: Tensor, hardware: opt.Hardware
) -> pd.DataFrame | None:
    """The token weights of one dev pair per cell of the confusion matrix, if any are learned."""
    cells = (2 * dataset.labels + logits.argmax(1)).tolist()
    frames = []
    for cell in sorted(set(cells)):
        index = cells.index(cell)
        weights = token_weights(model, dataset, index, hardware)
        if weights is None:
            return None
        pair = f"{dataset.ids[index]}: label {ANSWERS[cell // 2]}, predicted {ANSWERS[cell % 2]}"
        frames.append(weights.assign(pair=pair))
    return pd.concat(frames)


if __name__ == "__main__":
    with opt.exit_cleanly():
        main(parse_options())
