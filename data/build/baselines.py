"""Classify pairs by counting: single similarities with a threshold, and a logistic regression.

    python data/build/baselines.py
    python data/build/baselines.py --train FILE --dev FILE --test FILE --name quora

A model of meaning should do better than every row of results/baselines-NAME.csv.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sparse
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for the project's modules

from datasets import read_pairs  # noqa: E402

CUT = 4  # letters: "lips" and "lip", "answered" and "answer" become equal
REGULARISATION = (0.1, 1.0, 10.0)  # values of C; dev chooses
CHARACTERS = "character 3- to 5-grams"
SPLITS = ("train", "dev", "test")
# For each split, the rows of first and of second sentences.
Halves = dict[str, tuple[sparse.csr_matrix, sparse.csr_matrix]]


def words(text: str) -> list[str]:
    """Return lower-case words without punctuation."""
    return re.findall(r"\w+", text.lower().replace("'", ""))


def cut_words(text: str) -> list[str]:
    """Return words cut to their first letters, a simple stem."""
    return [word[:CUT] for word in words(text)]


ANALYZERS = {
    "words": {"analyzer": words},
    "4-letter cuts": {"analyzer": cut_words},
    CHARACTERS: {"analyzer": "char_wb", "ngram_range": (3, 5)},
}


def tfidf(analyzer: str, splits: dict[str, pd.DataFrame]) -> tuple[Halves, Halves]:
    """Return counts and TF-IDF of both sentences, per split; train determines the weights."""
    vectorizer = CountVectorizer(min_df=2, dtype=np.float32, **ANALYZERS[analyzer])
    texts = {s: pd.concat([pairs["sentence1"], pairs["sentence2"]]) for s, pairs in splits.items()}
    counts = {"train": vectorizer.fit_transform(texts["train"])}
    for split in SPLITS[1:]:
        counts[split] = vectorizer.transform(texts[split])
    weights = TfidfTransformer(sublinear_tf=True).fit(counts["train"])
    weighted = {split: weights.transform(rows) for split, rows in counts.items()}
    return halves(counts), halves(weighted)


def halves(matrices: dict[str, sparse.csr_matrix]) -> Halves:
    """Return the rows of first and of second sentences, per split."""
    return {
        split: (rows[: rows.shape[0] // 2], rows[rows.shape[0] // 2 :])
        for split, rows in matrices.items()
    }


def jaccard(first: sparse.csr_matrix, second: sparse.csr_matrix) -> np.ndarray:
    """Return the Jaccard index of the sets of two count matrices, row by row."""
    shared = first.sign().multiply(second.sign()).sum(axis=1)
    union = first.sign().sum(axis=1) + second.sign().sum(axis=1) - shared
    return np.asarray(shared / np.maximum(union, 1)).ravel()


def cosine(first: sparse.csr_matrix, second: sparse.csr_matrix) -> np.ndarray:
    """Return the cosine of two matrices with normalized rows, row by row."""
    return np.asarray(first.multiply(second).sum(axis=1)).ravel()


def fit_threshold(scores: np.ndarray, labels: np.ndarray) -> tuple[np.floating, bool]:
    """Return the most accurate threshold, and whether the scores above it are positive."""
    values = np.unique(scores)
    thresholds = np.r_[-np.inf, (values[1:] + values[:-1]) / 2]
    accuracies = np.array([np.mean((scores > value) == labels) for value in thresholds])
    if accuracies.max() >= 1 - accuracies.min():
        return thresholds[accuracies.argmax()], True
    return thresholds[accuracies.argmin()], False


def regression_features(first: sparse.csr_matrix, second: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return product, absolute difference and cosine of the TF-IDF rows of both sentences."""
    return sparse.hstack(
        [first.multiply(second), abs(first - second), cosine(first, second)[:, None]]
    ).tocsr()


def regression(weighted: Halves, labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the predictions of a regression fit on train, with the regularisation best on dev."""
    features = {split: regression_features(*both) for split, both in weighted.items()}
    models = [
        LogisticRegression(C=value, solver="liblinear").fit(features["train"], labels["train"])
        for value in REGULARISATION
    ]
    model = max(models, key=lambda model: model.score(features["dev"], labels["dev"]))
    return {split: model.predict(features[split]) for split in features}


def predictions(splits: dict[str, pd.DataFrame]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield the name of every baseline, with the predicted labels of each split."""
    labels = {split: pairs["label"].to_numpy() for split, pairs in splits.items()}
    majority = float(labels["train"].mean() > 0.5)
    yield "majority class", {split: np.full(len(gold), majority) for split, gold in labels.items()}
    for analyzer in ANALYZERS:
        counts, weighted = tfidf(analyzer, splits)
        measures = [("TF-IDF cosine", cosine, weighted)]
        if analyzer != CHARACTERS:
            measures.insert(0, ("Jaccard", jaccard, counts))
        for name, measure, rows in measures:
            scores = {split: measure(*both) for split, both in rows.items()}
            threshold, above = fit_threshold(scores["train"], labels["train"])
            answers = {split: (scores[split] > threshold) == above for split in splits}
            yield f"{name} of {analyzer}", answers
    yield f"logistic regression on {CHARACTERS}", regression(weighted, labels)


def baselines(splits: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return a frame with the accuracy of every baseline, from a frame of pairs per split."""
    table = pd.DataFrame(
        {split: np.mean(answers[split] == splits[split]["label"]) for split in SPLITS}
        | {"baseline": name}
        for name, answers in predictions(splits)
    )
    best = table[1:-1].nlargest(1, "train").assign(baseline="best similarity on train")
    table = pd.concat([table[:-1], best, table[-1:]], ignore_index=True)
    columns = {"baseline": "baseline", "dev": "dev_accuracy", "test": "test_accuracy"}
    return table[list(columns)].rename(columns=columns).round(4)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for split in SPLITS:
        default = ROOT / "data" / f"verses-{split}.csv"
        parser.add_argument(f"--{split}", default=default, metavar="FILE", help=f"{split} pairs")
    parser.add_argument("--name", default="verses", help="writes results/baselines-NAME.csv")
    parser.add_argument("--out", default=ROOT / "results", type=Path, metavar="DIR", help="folder")
    options = parser.parse_args(arguments)
    splits = {split: read_pairs(getattr(options, split)) for split in SPLITS}
    splits = {split: pairs[pairs["label"].notna()] for split, pairs in splits.items()}
    table = baselines(splits)
    table.to_csv(options.out / f"baselines-{options.name}.csv", index=False)
    print(table.to_string(index=False))
    return table


if __name__ == "__main__":
    main()
