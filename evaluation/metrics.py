"""Metrics of language models and of classifiers of pairs."""

import math

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from datasets import PairsDataset, SonnetsDataset, split
from models.paraphrase_gpt import ParaphraseGPT
from models.sonnet_gpt import SonnetGPT

BATCH_SIZE = 32
Results = tuple[dict[str, float], pd.DataFrame]  # metrics, and the results of single texts


@torch.no_grad()
def language_model_metrics(model: SonnetGPT, dataset: SonnetsDataset) -> Results:
    """`loss` (nats per token), `perplexity` and `bits_per_character`, and the losses of the texts.

    Bits per character divide the same loss by characters, so that tokenizers are comparable. The
    frame has the `loss` per token of each text and its number of `tokens`. Raises
    FloatingPointError for a loss that is not finite.
    """
    device = next(model.parameters()).device
    losses = []
    model.eval()
    for index in tqdm(range(len(dataset.lengths)), "evaluating", leave=False, disable=None):
        batch = dataset.collate([index])  # a single text needs no padding
        losses.append(model.loss(**{name: tensor.to(device) for name, tensor in batch.items()}))
    texts = pd.DataFrame({"id": dataset.ids, "loss": torch.stack(losses).tolist()})
    texts["tokens"] = dataset.lengths
    # Python floats: torch.load(weights_only=True) rejects NumPy scalars.
    total = float((texts["loss"] * texts["tokens"]).sum(skipna=False))
    if not math.isfinite(total):
        raise FloatingPointError("the loss of a text is not finite; try a smaller --lr")
    loss = total / sum(dataset.lengths)
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    return metrics | {"bits_per_character": total / math.log(2) / dataset.characters}, texts


@torch.no_grad()
def classify(model: ParaphraseGPT, dataset: PairsDataset) -> Tensor:
    """Logits (N, 2) in the order of the pairs, float32 on the CPU.

    Raises FloatingPointError if one is not finite.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(dataset.ids)), key=dataset.lengths.__getitem__)  # little padding
    logits = torch.zeros(len(order), 2)
    model.eval()
    for indices in tqdm(split(order, BATCH_SIZE), "evaluating", leave=False, disable=None):
        batch = dataset.collate(indices)
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        logits[indices] = model(ids, mask).float().cpu()
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are not finite; train or download the model again")
    return logits


def classification_metrics(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """`accuracy`, `macro_f1` and the accuracy of always predicting the `majority_class`.

    `accuracy_margin` is half of the accuracy's 95 % interval (normal approximation).
    """
    counts = torch.bincount(2 * labels + predicted, minlength=4).tolist()
    true_no, false_yes, false_no, true_yes = counts
    errors, total = false_yes + false_no, len(labels)
    f1 = [correct / max(1, correct + errors / 2) for correct in (true_no, true_yes)]
    accuracy = (true_no + true_yes) / total
    margin = 1.96 * math.sqrt(accuracy * (1 - accuracy) / total)
    majority = max(true_no + false_yes, false_no + true_yes) / total
    metrics = {"accuracy": accuracy, "accuracy_margin": margin, "majority_class": majority}
    return metrics | {"macro_f1": sum(f1) / 2}


def pair_metrics(model: ParaphraseGPT, dataset: PairsDataset) -> Results:
    """`loss` (nats per pair) and the classification_metrics, and the results of the pairs.

    The frame has `id`, `predicted`, `probability` (of yes), `loss` and `label` of each pair.
    Pairs without labels have no metrics, `loss` and `label`.
    """
    logits = classify(model, dataset)
    predicted, labels, metrics = logits.argmax(1), dataset.labels, {}
    texts = pd.DataFrame({"id": dataset.ids, "predicted": predicted.numpy()})
    texts["probability"] = logits.softmax(1)[:, 1].numpy()
    if labels is not None:
        losses = F.cross_entropy(logits, labels, reduction="none")
        texts = texts.assign(loss=losses.numpy(), label=labels.numpy())
        metrics = {"loss": losses.mean().item()} | classification_metrics(predicted, labels)
    return metrics, texts


def metrics_table(metrics: dict[str, float]) -> str:
    """One row per metric and one column per split and source, for the screen."""
    pattern = r"(.*?(?:train|dev|test))_(.*)"
    table = pd.Series(metrics, dtype=object).filter(regex=pattern)
    table.index = pd.MultiIndex.from_frame(table.index.str.extract(pattern), names=[None, None])
    return table.unstack(0, sort=False).to_string(float_format="{:.3f}".format, na_rep="")
