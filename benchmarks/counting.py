"""The accuracy of word counts on pairs, compared with the predictions of a model.

    python benchmarks/counting.py TRAIN_CSV DEV_CSV PREDICTIONS

Logistic regression on TF-IDF features of both sentences (product, absolute difference, cosine) and
the Jaccard index of their words, trained on the first file. The interval of the difference is a
bootstrap over the dev pairs.
"""

import argparse
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import scipy.sparse as sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from datasets import read_pairs
from evaluation import bootstrap_interval


def jaccard(first, second):
    """Jaccard index of the sets of words of two texts."""
    one, other = set(first.lower().split()), set(second.lower().split())
    return len(one & other) / max(1, len(one | other))


def features(pairs, vectorizer):
    """A sparse matrix with one row per pair."""
    first, second = (vectorizer.transform(pairs[name]) for name in ("sentence1", "sentence2"))
    product = first.multiply(second)
    overlap = np.array([list(map(jaccard, pairs["sentence1"], pairs["sentence2"]))]).T
    cosine = np.asarray(product.sum(1)).reshape(-1, 1)
    return sparse.hstack([product, abs(first - second), cosine, overlap]).tocsr()


def read_predictions(path):
    """Id -> label, from a file that paraphrase_detection.py has written."""
    with open(path, encoding="utf-8", newline="") as file:
        return {record[0]: int(record[1]) for record in list(csv.reader(file))[1:]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train")
    parser.add_argument("dev")
    parser.add_argument("predictions", help="a file that paraphrase_detection.py has written")
    options = parser.parse_args()
    train, dev = (
        read_pairs(path).dropna(subset=["label"]) for path in (options.train, options.dev)
    )
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([*train["sentence1"], *train["sentence2"]])
    regression = LogisticRegression(max_iter=300)
    regression.fit(features(train, vectorizer), train["label"])
    labels = dev["label"].to_numpy()
    counting = regression.predict(features(dev, vectorizer)) == labels
    predicted = dev["id"].map(read_predictions(options.predictions)).to_numpy() == labels
    gain = predicted.astype(float) - counting
    low, high = bootstrap_interval(gain)
    print(
        f"accuracy of logistic regression {counting.mean():.1%}, of the predictions "
        f"{predicted.mean():.1%}, difference {100 * gain.mean():+.1f} points "
        f"(95 % CI {100 * low:+.1f} to {100 * high:+.1f})"
    )


if __name__ == "__main__":
    main()
