"""Intervals and verdicts: by hand, and by how often they are right in simulations."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from evaluation import statistics
from evaluation.statistics import Difference, holm, p_value, t_interval, verdicts


def normal(mean):
    """The intervals of a normal estimate with standard error 1."""

    def interval(level):
        half_width = NormalDist().inv_cdf((1 + level) / 2)
        return mean - half_width, mean + half_width

    return interval


def test_the_t_interval_by_hand():
    """Differences 1 to 5: mean 3, standard error sqrt(2.5 / 5), quantile 2.776 (4 degrees)."""
    low, high = t_interval(np.arange(1, 6))
    assert (3 - low, high - 3) == pytest.approx([2.776 * 0.5**0.5] * 2, rel=1e-3)
    assert t_interval(np.array([1.0])) == (-math.inf, math.inf)


def test_intervals_of_equal_values():
    """A row may equal its baseline; neither is a single seed or text certain."""
    same = Difference(np.full((3, 4), 0.5))
    for interval in (same.over_seeds(), same.over_texts(), same.over_both()):
        assert interval == pytest.approx((0.5, 0.5))
    for shape in ((1, 5), (5, 1)):
        low, high = Difference(np.ones(shape)).over_both()
        assert (low, high) == (-math.inf, math.inf)


def test_the_bootstrap_by_hand():
    """400 texts with mean 0.25: about 1.96 standard errors of sqrt(0.25 * 0.75 / 400)."""
    difference = Difference(np.repeat([1.0, 0.0], [100, 300])[None])
    low, high = difference.over_texts()
    assert (0.25 - low, high - 0.25) == pytest.approx((0.0424, 0.0424), rel=0.05)
    assert Difference(difference.values).over_texts() == (low, high)


@pytest.mark.parametrize("count", [11, 20])
def test_the_bootstrap_of_few_texts_is_as_wide_as_the_t_interval(count):
    """Percentiles alone would be 16 and 9 % too narrow."""
    widths = []
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=count)
        widths.append(np.ptp(Difference(values[None]).over_texts()) / np.ptp(t_interval(values)))
    assert np.mean(widths) == pytest.approx(1, abs=0.04)


def test_the_interaction_counts_once_by_hand():
    """Mean squares: texts 16, interaction 4, so that 3/4 of the texts' variance is their own."""
    difference = Difference(np.array([[0.0, 2.0], [2.0, 8.0]]))
    (seeds_low, seeds_high), (texts_low, texts_high) = (
        difference.over_seeds(),
        difference.over_texts(),
    )
    expected = (
        3 - math.hypot(3 - seeds_low, 0.75**0.5 * (3 - texts_low)),
        3 + math.hypot(seeds_high - 3, 0.75**0.5 * (texts_high - 3)),
    )
    assert difference.over_both() == pytest.approx(expected)
    parallel = Difference(np.array([[0.0, 2.0], [1.0, 3.0]]))  # no interaction
    distances = np.array([parallel.over_seeds(), parallel.over_texts()]) - 1.5
    assert parallel.over_both()[1] == pytest.approx(1.5 + math.hypot(*distances[:, 1]))


def test_the_interval_over_both_covers_the_truth(monkeypatch):
    """In about 95 % of tables; with the interaction in both sources it would be 99 %."""
    monkeypatch.setattr(statistics, "SAMPLES", 1000)
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(800):
        values = rng.normal(size=12) / 3 + rng.normal(size=(3, 12))
        low, high = Difference(values).over_both()
        covered.append(low <= 0 <= high)
    assert 0.94 <= np.mean(covered) <= 0.98


def test_the_p_value_inverts_the_interval():
    """That of the t interval is the p value of the paired t test."""
    values = np.array([0.1, 0.5, 0.3, 0.9])
    p = p_value(lambda level: t_interval(values, level), lambda low, high: low > 0 or high < 0)
    assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=1e-8)
    assert p_value(normal(0), lambda low, high: low > 0) == 1


def test_holm_by_hand():
    """Times 4, 3, 2 and 1 in order of size; 0.04 is raised to the 0.06 of the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).tolist() == []


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([2.2], ["higher"]),  # p 0.028
        ([-2.2, 0, 0], ["undecided"] * 3),  # 3 * 0.028
        ([2.2, -2.5, 0], ["undecided", "lower", "undecided"]),  # 3 * 0.012, then 2 * 0.028
        ([2.3, -2.5, 2.0], ["higher", "lower", "higher"]),  # 2 * 0.021, then 1 * 0.046
    ],
)
def test_signs_with_holm_by_hand(means, expected):
    """The limits for the first, second and third of three are 0.017, 0.025 and 0.05."""
    assert verdicts([normal(mean) for mean in means], margin=0) == expected


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([0.9], ["equivalent"]),  # 2.1 from the margin: p 0.036
        ([0.9, 9], ["undecided", "higher"]),  # 2 * 0.036
        ([0.9, -0.5, 9], ["undecided", "equivalent", "higher"]),  # 3 * 0.012, then 2 * 0.036
        ([0.9, -0.5], ["equivalent", "equivalent"]),
    ],
)
def test_equivalence_with_holm_by_hand(means, expected):
    """Both ends must be within the margin of 3, so p is that of the distance to the nearer end."""
    assert verdicts([normal(mean) for mean in means], margin=3) == expected


def test_a_small_difference_may_be_equivalent_and_not_zero():
    """Then it is equivalent: the margin says what matters."""
    assert verdicts([normal(5)], margin=10) == ["equivalent"]


def test_a_table_without_differences_rarely_shows_one():
    """In at most 5 % of tables of 20 rows, also if most are equivalent; without Holm in 64 %."""
    rng = np.random.default_rng(0)
    for margin in (0, 4):
        tables = [verdicts([normal(m) for m in rng.normal(size=20)], margin) for _ in range(150)]
        assert np.mean([not {"higher", "lower"}.isdisjoint(table) for table in tables]) <= 0.06
