"""Bounds on a rate and on a mean: by hand, against the binomial's own tails, and by how often they are wrong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedrobust import intervals


def test_bounds_by_hand():
    """No success in n trials: rates with (1 - p)^n >= alpha remain, and p^n >= alpha for n successes."""
    assert intervals.upper(0, 20, 0.95) == pytest.approx(1 - 0.05 ** (1 / 20), abs=1e-12)
    assert intervals.lower(20, 20, 0.95) == pytest.approx(0.05 ** (1 / 20), abs=1e-12)
    assert intervals.upper(20, 20, 0.95) == 1 and intervals.lower(0, 20, 0.95) == 0


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_at_a_bound_the_count_is_exactly_as_unlikely_as_stated(total):
    count = np.unique(np.linspace(0, total, 9).astype(int))
    low, high = intervals.lower(count, total, 0.99), intervals.upper(count, total, 0.99)
    np.testing.assert_allclose(stats.binom.sf(count[1:] - 1, total, low[1:]), 0.01, rtol=1e-6)
    np.testing.assert_allclose(stats.binom.cdf(count[:-1], total, high[:-1]), 0.01, rtol=1e-6)
    np.testing.assert_allclose(low, 1 - intervals.upper(total - count, total, 0.99), atol=1e-12)
    assert (low <= count / total).all() and (count / total <= high).all()


@pytest.mark.parametrize(("count", "total", "confidence"), [(-1, 5, 0.9), (6, 5, 0.9), (0, 0, 0.9), (1, 5, 1.0)])
def test_bad_counts_are_named(count, total, confidence):
    for bound in (intervals.lower, intervals.upper):
        with pytest.raises(ValueError, match=r"^(count|total|confidence) is "):
            bound(count, total, confidence)


def test_the_interval_of_a_mean_by_hand_and_by_how_often_it_misses():
    """Two values, one degree of freedom: t is Cauchy, its 97.5 % quantile tan(0.475 pi)."""
    half = np.tan(0.475 * np.pi)  # times a standard error of 1
    assert intervals.of_mean([3.0, 5.0], 0.95) == pytest.approx((4 - half, 4 + half))
    draws = np.random.default_rng(0).normal(7.0, 2.0, (2000, 4))
    bounds = np.array([intervals.of_mean(values, 0.9) for values in draws])
    missed = np.mean((bounds[:, 0] > 7) | (bounds[:, 1] < 7))
    assert abs(missed - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 2000)


@pytest.mark.parametrize("values", [[1.0], [], [1.0, np.nan], [[1.0, 2.0]]])
def test_values_without_an_interval_are_named(values):
    with pytest.raises(ValueError, match=r"^values is .* at least two finite numbers"):
        intervals.of_mean(values, 0.9)


@given(st.floats(1e-6, 1e6), st.integers(1, 6))
def test_a_number_is_never_read_as_less_than_it_is(value, digits):
    told = float(intervals.upper_text(value, digits))
    assert value <= told <= value * (1 + 10.0 ** (1 - digits)) * (1 + 1e-12)
    assert intervals.upper_text(told, digits) == intervals.upper_text(value, digits)
