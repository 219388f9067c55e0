"""The released label counts.

A public class of 10^9 records, against which one record of noise is nothing, makes the weight of that class tell the
noised count of the other. Averages are over n = 4 000 draws at a fixed seed: the mean of |Laplace| has a relative error
of 1 / sqrt(n) = 1.6 %, so a tolerance of 10 % is six of them: a right implementation fails for one seed in 5e8.
"""

import numpy as np
import pytest

from fedrobust.privacy import private_class_weight

HUGE = 10**9


def noised_count(seed, counts, epsilon):
    weight = private_class_weight(np.random.default_rng(seed), np.array(counts), histogram_epsilon=epsilon)
    return float(weight[1]) * HUGE


def draws(counts, epsilon, num=4000):
    """Noise of the first class, in records; float32 weights hold it to 1e-4 of a record."""
    total = sum(row[0] for row in counts)
    return np.array([noised_count(seed, counts, epsilon) for seed in range(num)]) - total


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_each_count_gets_laplace_noise_of_scale_one_over_epsilon(epsilon):
    noise = draws([[1000, HUGE]], epsilon)
    scale = np.abs(noise).mean()
    assert abs(scale * epsilon - 1) < 0.1
    assert 1.75 < np.mean(noise**2) / scale**2 < 2.25  # 2 for Laplace, 1.57 for a normal, 1.33 for a uniform
    assert abs(noise.mean()) < 6 * np.sqrt(2) / epsilon / np.sqrt(len(noise))


def test_every_silo_adds_its_own_noise():
    """Variance 2 / epsilon^2 per silo; with excess kurtosis its relative error at n = 4 000 is below 3 %."""
    noise = draws([[400, HUGE / 4]] * 4, 1.0)
    assert abs(noise.var() / (4 * 2) - 1) < 0.18


def test_one_record_moves_one_count_by_one():
    """So Laplace noise of scale 1 / epsilon is enough for adding or removing it."""
    without, with_one = (noised_count(0, [[n, HUGE]], 1.0) for n in (1000, 1001))
    assert abs(with_one - without - 1) < 1e-3


def test_weights_by_hand_where_noise_is_next_to_nothing():
    rng = np.random.default_rng(0)
    weight = private_class_weight(rng, np.array([[100, 40, 5], [300, 60, 45]]), histogram_epsilon=1e6)
    np.testing.assert_allclose(weight, [50 / 400, 50 / 100, 1], rtol=1e-4)
    assert weight.dtype == np.float32


def test_a_class_that_nobody_has_counts_for_one_record_at_least():
    """Or the others would all but vanish. Noise beyond 20 scales: one draw in 5e8."""
    for seed in range(20):
        weight = private_class_weight(np.random.default_rng(seed), np.array([[0, 100]]), histogram_epsilon=1.0)
        assert weight[1] > 1 / 120


@pytest.mark.parametrize("epsilon", [0.01, 1.0])
def test_weights_are_in_the_unit_interval_and_the_rarest_class_has_one(epsilon):
    for seed in range(50):
        counts = np.random.default_rng(seed).integers(0, 30, size=(3, 4))
        weight = private_class_weight(np.random.default_rng([seed, 1]), counts, histogram_epsilon=epsilon)
        assert weight.shape == (4,)
        assert (weight > 0).all()
        assert weight.max() == 1


@pytest.mark.parametrize("epsilon", [0, -1.0, np.inf, np.nan])
def test_a_bad_epsilon_is_named(epsilon):
    with pytest.raises(ValueError, match=r"^histogram_epsilon is "):
        private_class_weight(np.random.default_rng(0), np.ones((1, 2)), histogram_epsilon=epsilon)


def test_counts_of_one_silo_are_a_table_of_one_row():
    with pytest.raises(ValueError, match=r"^shape of silo_counts is \(2,\): must be \[num_silos, L\]$"):
        private_class_weight(np.random.default_rng(0), np.ones(2), histogram_epsilon=1.0)
