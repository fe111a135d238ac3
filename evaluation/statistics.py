"""Intervals and verdicts for the difference between two rows of an experiment.

Each seed is a training run of both rows, and each text is a test item of both: the difference has
two sources of chance.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property

import numpy as np
from scipy import stats

LEVEL = 0.95  # of the intervals shown
ALPHA = 0.05
SAMPLES = 20_000
STEPS = 10**9  # p values are multiples of 1 / STEPS
Interval = tuple[float, float]


def t_interval(values: np.ndarray, level: float = LEVEL) -> Interval:
    """Interval of the mean by Student's t, unbounded for a single value."""
    if len(values) < 2:
        return -math.inf, math.inf
    half_width = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return np.mean(values) - half_width, np.mean(values) + half_width


class Difference:
    """A table of differences (S seeds, T texts), and intervals of their mean."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.mean = values.mean()
        self.by_text = values.mean(axis=0)

    @cached_property
    def bootstrap(self) -> np.ndarray:
        """Means of texts that are drawn with replacement."""
        settings = {"n_resamples": SAMPLES, "batch": 1000, "method": "percentile", "rng": 0}
        return stats.bootstrap((self.by_text,), np.mean, **settings).bootstrap_distribution

    def over_seeds(self, level: float = LEVEL) -> Interval:
        """For other seeds and the same texts: Student's t of the mean difference of each seed."""
        return t_interval(self.values.mean(axis=1), level)

    def over_texts(self, level: float = LEVEL) -> Interval:
        """For other texts and the same seeds: bootstrap percentiles, unbounded for a single text.

        They are expanded for few texts (Hesterberg 2015, arXiv 1411.5279): those of eleven texts
        would be 16 % too narrow.
        """
        count = len(self.by_text)
        if count < 2:
            return -math.inf, math.inf
        quantile = stats.t.ppf((1 + level) / 2, count - 1) * math.sqrt(count / (count - 1))
        tail = stats.norm.cdf(-quantile)
        return tuple(np.quantile(self.bootstrap, [tail, 1 - tail]))

    def over_both(self, level: float = LEVEL) -> Interval:
        """For other seeds and texts: the squares of the distances from the mean to the ends add up.

        Each end has its own distance (Zou and Donner 2008). The interaction of seed and text is a
        part of both distances and must count once, so that of the texts is reduced by the share
        of interaction in their mean square.
        """
        centered = self.values - self.values.mean(axis=1, keepdims=True)
        seeds = len(centered)
        interaction = centered.var(axis=0, ddof=min(1, seeds - 1)).sum() / seeds
        between_texts = np.square(self.by_text - self.mean).sum()
        share = max(0, 1 - interaction / max(between_texts, 1e-300))
        intervals = np.array([self.over_seeds(level), self.over_texts(level)])
        below, above = np.abs(intervals - self.mean).T * [1, math.sqrt(share)]
        return self.mean - math.hypot(*below), self.mean + math.hypot(*above)


def p_value(interval: Callable[[float], Interval], claim: Callable[[float, float], bool]) -> float:
    """The smallest alpha for which the claim is true of the interval of level 1 - alpha, or 1."""
    return bisect_left(range(STEPS), True, 1, key=lambda k: claim(*interval(1 - k / STEPS))) / STEPS


def holm(p_values: list[float]) -> np.ndarray:
    """Adjusted p values (Holm 1979): the k-th smallest of m times m + 1 - k, without decreases."""
    order = np.argsort(p_values)
    scaled = np.take(p_values, order) * np.arange(len(order), 0, -1)
    return np.maximum.accumulate(scaled)[np.argsort(order)]


def verdicts(intervals: list[Callable[[float], Interval]], margin: float) -> list[str]:
    """The verdict for each of several differences to the same baseline.

    "higher" and "lower" mean an interval without zero, "equivalent" one within the margin, at the
    level of Holm's correction for all differences: p values invert the intervals. The two claims
    are corrected one by one; in a common order, easy equivalences would loosen the others' levels.
    """
    same = holm([p_value(i, lambda low, high: -margin < low <= high < margin) for i in intervals])
    other = holm([p_value(i, lambda low, high: low > 0 or high < 0) for i in intervals])
    signs = ["higher" if interval(LEVEL)[0] > 0 else "lower" for interval in intervals]
    return np.select([same <= ALPHA, other <= ALPHA], ["equivalent", signs], "undecided").tolist()
