"""Fine-tune GPT-2 to judge whether two texts mean the same, from its last token's hidden state or a pooling of all.

python paraphrase_detection.py --pooling generalized              # minutes on a laptop: Bible verses, embedded base
python paraphrase_detection.py --model_size gpt2 --dataset quora  # 124M weights, Quora's question pairs
"""

import argparse
import ast
import math
import os
from pathlib import Path

from config import ROOT, HelpFormatter, InputError, Parser, check_outputs, exit_cleanly, parse, refuse, shared_options

REPORT = {"model_size": "gpt2", "pair_encoding": "joint", "epochs": 3, "patience": 3,
          "batch_size": 8, "schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.0}  # fmt: skip
SPLITS = ("train", "dev", "test")
DATASETS = {  # the files of train, dev and test, and what makes them
    "verses": (("verses-train.csv", "verses-dev.csv", "verses-test.csv"), "data/build_verses.py"),
    "quora": (("quora-train.csv", "quora-dev.csv", "quora-test-student.csv"), "data/download_quora.py"),
}
# the names in pooling.py's table, read off its text: to import it takes torch's seconds, and --help should not
POOLINGS = next(tuple(ast.literal_eval(key) for key in line.value.keys)
                for line in ast.parse((ROOT / "pooling.py").read_text(encoding="utf-8")).body
                if isinstance(line, ast.Assign) and ast.unparse(line.targets) == "POOLINGS")  # fmt: skip
PENALTIES = {"parameter_penalty": 0.01, "attention_penalty": 0, "vector_penalty": 0}  # multihead's, and its defaults
ERRORS = 10  # in errors.md


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    what, files = shared_options(
        parser, "paraphrases", epochs=3, batch_size=16, schedule="linear", warmup=0.06, max_grad_norm=1.0
    )
    what.add_argument("--pooling", default="last", choices=POOLINGS, help="how hidden states become one vector")
    what.add_argument("--pair_encoding", choices=("joint", "separate"), help="joint: one prompt holds both texts "
                      "(default, but for tiny); separate: each is read alone (tiny's default)")  # fmt: skip
    for name, default in PENALTIES.items():
        what.add_argument(f"--{name}", type=float, metavar="N", help="multihead: weight of the penalty on heads of "
                          f"like {name.split('_')[0]}s (default {default})")  # fmt: skip
    what.add_argument("--dataset", choices=DATASETS, help="verses (default, but for the report's preset), "
                      "or quora: run data/download_quora.py once")  # fmt: skip
    for split in SPLITS:
        files.add_argument(f"--para_{split}", metavar="FILE", help=f"{split} pairs, instead of the dataset's")
    for split in SPLITS[1:]:
        default = f"predictions/para-{split}-output.csv"
        files.add_argument(f"--para_{split}_out", default=default, metavar="FILE", help=f"predictions of {split}")
    what.add_argument("--predict_only", action="store_true", help="judge dev and test with --model; no training")
    what.add_argument("--model", metavar="DIR", help="a run's best/ folder, for --predict_only; "
                      "of a LoRA run, --model_size names its base")  # fmt: skip
    unused = ("seed", "pooling", "pair_encoding", "para_train", *PENALTIES)
    options = parse(parser, arguments, "paraphrases", REPORT, "predict_only", unused)
    if options.pair_encoding is None:  # tiny hardly learns to compare within a prompt: RESULTS.md
        options.pair_encoding = "separate" if options.model_size == "tiny" else "joint"
    if bool(options.model) != options.predict_only:
        raise InputError("--predict_only and --model DIR go together; to train from a folder, name it by --model_size")
    if options.model and not os.path.isfile(os.path.join(options.model, "adapter_config.json")):
        refuse(parser, options, ("model_size",), "beside --model, a folder that is no adapter of LoRA's")
    needed = SPLITS[1:] if options.predict_only else SPLITS
    named = [split for split in needed if getattr(options, f"para_{split}")]
    if named and len(named) < len(needed) and not options.dataset:
        lacking = " and ".join(f"--para_{split}" for split in needed if split not in named)
        raise InputError(f"--para_{named[0]} is given without {lacking}; name them too, or --dataset for the rest")
    default = "files" if named else "quora" if options.preset else "verses"
    options.dataset = "files" if len(named) == len(needed) else options.dataset or default
    for split, name in zip(SPLITS, DATASETS.get(options.dataset, [()])[0], strict=False):
        path = getattr(options, f"para_{split}") or str(ROOT / "data" / name)
        setattr(options, f"para_{split}", path)
    check_outputs(options, ("para_dev_out", "para_test_out"), tuple(f"para_{split}" for split in needed))
    return options


def main(options: argparse.Namespace) -> None:
    # imported here, so that --help and a mistyped option are answered at once
    import torch

    import processes
    from datasets import POOL, PairsDataset, bucketed_batches
    from evaluation import classification_figures, classify, overlap_accuracy, overlap_threshold
    from lora import apply_lora, hold_frozen
    from models.gpt2 import GPT2Model
    from models.paraphrase_gpt import ParaphraseGPT
    from runs import parameter_counts, summary, write_text
    from training import Task, precision, settings, start, train

    config, lora_config, device, dtype = settings(options)
    paths = {split: getattr(options, f"para_{split}") for split in SPLITS}
    if options.predict_only:
        processes.leave()  # one is enough
        model = ParaphraseGPT.from_pretrained(options.model, options.model_size)
    else:
        model = ParaphraseGPT(GPT2Model.from_pretrained(options.model_size), options.pooling, options.pair_encoding,
                              **penalties(options))  # fmt: skip
        if options.use_lora:
            apply_lora(model, lora_config)
    model.to(device)

    def read(split: str) -> PairsDataset:
        files, maker = DATASETS.get(options.dataset, ((), None))
        made = Path(paths[split]) in [ROOT / "data" / name for name in files]
        way_out = f"python {maker} makes it" if made else "check the path"
        data = PairsDataset(paths[split], model.gpt, model.settings["pair_encoding"], way_out)
        if split != "test" and data.labels is None:
            raise InputError(f"{paths[split]} has no column is_duplicate; only test pairs may lack it")
        for rows, what in ((data.dropped, "left out: no sentence or no label"), (data.shortened, "shortened to fit")):
            if rows:
                lines = ", ".join(map(str, rows[:10])) + ", ..." * (len(rows) > 10)
                print(f"{paths[split]}: {len(rows)} of its pairs {what} (line {lines})")
        return data

    def judge(model: ParaphraseGPT, data: PairsDataset, split: str) -> tuple[torch.Tensor, dict[str, float]]:
        with precision(device, dtype):
            logits = classify(model, data)
        found = {} if data.labels is None else classification_figures(logits, data.labels)
        return logits, {f"{split}_{name}": value for name, value in found.items()}

    sets = {split: read(split) for split in (SPLITS[1:] if options.predict_only else SPLITS)}
    sizes = ", ".join(f"{len(data):,} {split}" for split, data in sets.items())
    outputs = {split: Path(getattr(options, f"para_{split}_out")) for split in SPLITS[1:]}
    if options.predict_only:
        print(f"paraphrases: {options.model} judges pairs ({sizes})")
        figures = {}
        for split, data in sets.items():
            logits, found = judge(model, data, split)
            write_text(outputs[split], as_file(data.ids, logits))
            figures |= found
        print(f"\n{comparison(figures, sets)}\n\npredictions: {', '.join(map(str, outputs.values()))}")
        return

    variant = (options.pooling, options.pair_encoding)
    files = list(paths.values())
    run, title = start("paraphrases", variant, f"{options.dataset} ({sizes})", files, model, options, device, dtype)
    if options.use_lora:
        hold_frozen(model, dtype)
    train_set, dev_set = sets["train"], sets["dev"]
    step_size = config.batch_size * config.grad_accumulation
    task = Task(
        batches=lambda epoch: bucketed_batches(train_set.lengths, step_size, config.seed, epoch, POOL),
        collate=train_set.collate,
        loss=lambda model, batch: model.loss(**batch),
        items=lambda batch: len(batch["labels"]),
        evaluate=lambda model: judge(model, dev_set, "dev")[1],
        save=lambda model, folder: model.save_pretrained(folder),
        metric="dev_accuracy",
        larger_is_better=True,
    )
    progress = train(model, task, config, run, device, dtype)
    counts = parameter_counts(model)
    if progress.rows:
        del model  # and its gradients
        model = ParaphraseGPT.from_pretrained(run.best, options.model_size).to(device)

    figures, logits = {}, {}
    for split in SPLITS[1:]:
        logits[split], found = judge(model, sets[split], split)
        figures |= found
        for path in (run.folder / "predictions" / f"para-{split}-output.csv", outputs[split]):
            write_text(path, as_file(sets[split].ids, logits[split]))
    threshold = overlap_threshold(train_set.read())
    for split in SPLITS[1:]:
        if sets[split].labels is not None:
            figures[f"{split}_word_overlap_accuracy"] = overlap_accuracy(sets[split].read(), threshold)
    write_text(run.folder / "errors.md", errors(logits["dev"], dev_set))
    from figures import draw_attention, draw_curves  # matplotlib takes a moment

    if progress.rows:
        draw_curves(run.folder / "curves.png", progress.rows, title)
    with precision(device, dtype):
        examples = attention(model, dev_set, logits["dev"])
    if examples:
        draw_attention(run.folder / "attention.png", examples, f"what {options.pooling} pooling weighs")
    how = {name: getattr(options, name) for name in ("dataset", "pooling", "pair_encoding")}
    run.finish(title, summary("paraphrases", options, counts, progress) | how | figures)
    print(f"\n{comparison(figures, sets)}\n\npredictions: {', '.join(map(str, outputs.values()))}\n"
          f"errors, curves, metrics, best model, summary: {run.folder}")  # fmt: skip


def penalties(options: argparse.Namespace) -> dict[str, float]:
    """Multihead's settings that were given. Raises InputError for one out of range, or beside another pooling."""
    given = {name: getattr(options, name) for name in PENALTIES if getattr(options, name) is not None}
    for name, value in given.items():
        if options.pooling != "multihead" or not 0 <= value < float("inf"):
            raise InputError(f"--{name} {value} can't be used: it goes with --pooling multihead, and is at least 0")
    return given


def as_file(ids: list[str], logits) -> str:
    """Predictions in the course's format, 1 for a paraphrase, in the order of the input."""
    rows = zip(ids, logits.argmax(1).tolist(), strict=True)
    return "id \t Predicted_Is_Paraphrase \n" + "".join(f"{name}, {label} \n" for name, label in rows)


def comparison(figures: dict, sets: dict) -> str:
    """The model's figures beside two baselines, one column a labelled split."""
    columns = [("", "always the commoner answer", "word overlap, threshold from train", "accuracy, 95 % interval",
                "macro F1", "no: judged no, judged yes", "yes: judged no, judged yes")]  # fmt: skip
    for split, data in sets.items():
        found = {name.removeprefix(f"{split}_"): value for name, value in figures.items() if name.startswith(split)}
        if not found:
            continue
        share, yes = found["accuracy"], found["yes_judged_no"] + found["yes_judged_yes"]
        overlap = found.get("word_overlap_accuracy")
        columns.append((
            split, f"{max(yes, len(data) - yes) / len(data):.1%}", "-" if overlap is None else f"{overlap:.1%}",
            f"{share:.1%} ± {1.96 * math.sqrt(share * (1 - share) / len(data)):.1%}", f"{found['macro_f1']:.3f}",
            *(f"{found[f'{gold}_judged_no']}, {found[f'{gold}_judged_yes']}" for gold in ("no", "yes")),
        ))  # fmt: skip
    return "\n".join(f"{label:<34}" + "".join(f"{cell:>16}" for cell in cells)
                     for label, *cells in zip(*columns, strict=True))  # fmt: skip


def errors(logits, data) -> str:
    """The pairs of dev judged wrong with the most confidence, for a person to read."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = [row for row in confidence.argsort(descending=True).tolist() if predicted[row] != data.labels[row]]
    chosen = wrong[:ERRORS]
    pairs = {row: pair for row, pair in enumerate(data.read()) if row in set(chosen)}
    blocks = [f"# {len(wrong)} of {len(data)} dev pairs judged wrong; those with the most confidence\n"]
    for row in chosen:
        said, gold = ("yes" if predicted[row] else "no"), ("yes" if data.labels[row] else "no")
        pair = pairs[row]
        blocks.append(f"**says {said} ({confidence[row]:.1%}), label {gold}** (id {pair.id}, line {pair.line})\n\n"
                      f"1. {pair.sentence1}\n2. {pair.sentence2}\n")  # fmt: skip
    return "\n".join(blocks)


def attention(model, data, logits) -> list[tuple[str, list[tuple[str, float]]]]:
    """Tokens and weights of the first dev pair of each kind, judged right and wrong; none for a pooling without."""
    import torch

    predicted, examples = logits.argmax(1), []
    device = next(model.parameters()).device
    for gold, guess in ((1, 1), (0, 0), (1, 0), (0, 1)):
        for row in ((data.labels == gold) & (predicted == guess)).nonzero()[:1, 0].tolist():
            batch = data.collate([row])
            with torch.no_grad():
                weights = model.token_weights(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            if weights is None:
                return []
            tokens = []
            for text, weight in zip(data.texts(row), weights.flatten(0, -2).cpu(), strict=True):
                shown = [data.tokenizer.decode([token], skip_special_tokens=False) for token in text.tolist()]
                tokens += zip(shown, (weight[: len(text)] * len(text)).tolist(), strict=True)
            answer = "yes" if guess else "no"
            examples.append((f"{data.ids[row]}: judged {answer}, {'right' if gold == guess else 'wrong'}", tokens))
    return examples


if __name__ == "__main__":
    with exit_cleanly():
        main(parse_options())
