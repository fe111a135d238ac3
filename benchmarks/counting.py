"""What counting words gets on pairs, and how much a model's predictions are better.

    python benchmarks/counting.py TRAIN_CSV DEV_CSV PREDICTIONS

Logistic regression on TF-IDF features of both sentences (product, absolute difference, cosine, word overlap), trained
on the first file. The interval of the difference is a bootstrap over the dev pairs.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import scipy.sparse as sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import Pair, read_pairs
from evaluation import word_overlap

DRAWS = 10_000


def features(pairs: list[Pair], vectors: TfidfVectorizer) -> sparse.csr_matrix:
    """A row a pair."""
    first, second = (vectors.transform([getattr(pair, name) for pair in pairs]) for name in ("sentence1", "sentence2"))
    product = first.multiply(second)
    overlap = np.array([[word_overlap(pair)] for pair in pairs])
    return sparse.hstack([product, abs(first - second), product.sum(1), overlap]).tocsr()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("dev")
    parser.add_argument("predictions", help="as paraphrase_detection.py writes them")
    options = parser.parse_args()
    train, dev = (list(read_pairs(path, "check the path", [])) for path in (options.train, options.dev))
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectors.fit([pair.sentence1 for pair in train] + [pair.sentence2 for pair in train])
    model = LogisticRegression(max_iter=300).fit(features(train, vectors), [pair.label for pair in train])
    gold = np.array([pair.label for pair in dev])
    with open(options.predictions, encoding="utf-8", newline="") as file:
        said = {row[0]: int(row[1]) for row in list(csv.reader(file))[1:]}
    counting = model.predict(features(dev, vectors)) == gold
    predicted = np.array([said[pair.id] for pair in dev]) == gold
    gain = predicted.astype(float) - counting
    draws = np.random.default_rng(0).integers(len(gain), size=(DRAWS, len(gain)))
    low, high = 100 * np.percentile(gain[draws].mean(1), [2.5, 97.5])
    print(f"logistic regression {counting.mean():.1%}, predictions {predicted.mean():.1%}, "
          f"difference {100 * gain.mean():+.1f} points (95 % interval {low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()
