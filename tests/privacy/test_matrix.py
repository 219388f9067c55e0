"""Correlated noise against its matrices, written out in float64."""

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.privacy import make_plan
from fedrobust.privacy.matrix import correlated_mean, correlated_noise, toeplitz


def dense(strategy, num_steps):
    column = np.zeros(num_steps)
    num = min(num_steps, len(strategy.coefficients))
    column[:num] = strategy.coefficients[:num]
    return np.array([[column[t - s] if t >= s else 0.0 for s in range(num_steps)] for t in range(num_steps)])


@functools.cache
def plan(**changes):
    given = {"unit": "client", "relation": "add_or_remove_one", "sampling": "poisson", "sampling_rate": 1.0}
    return make_plan(**given | {"noise_multiplier": 3.0, "delta": 1e-4, "num_steps": 1} | changes)


def test_coefficients_are_those_of_the_square_root_of_the_running_sum():
    full = dense(toeplitz(8, max_participations=1), 8)
    np.testing.assert_allclose(full @ full, np.tri(8), atol=1e-12)
    assert toeplitz(3, max_participations=1).coefficients == (1.0, 0.5, 0.375)
    assert toeplitz(1, max_participations=4).coefficients == (1.0,)


@pytest.mark.parametrize(("num_bands", "times"), [(1, 3), (2, 1), (2, 3), (3, 2), (4, 2)])
def test_the_sensitivity_is_the_largest_over_all_participations(num_bands, times):
    """Brute force: every set of steps at least `num_bands` apart, every sign of its contributions."""
    num_steps, strategy = 9, toeplitz(num_bands, max_participations=times)
    matrix = dense(strategy, num_steps)
    worst = 0.0
    for count in range(1, times + 1):
        for steps in itertools.combinations(range(num_steps), count):
            if all(b - a >= num_bands for a, b in itertools.pairwise(steps)):
                for signs in itertools.product((-1, 1), repeat=count):
                    worst = max(worst, np.linalg.norm(matrix[:, steps] @ signs))
    assert worst == pytest.approx(strategy.sensitivity, rel=1e-12)


def test_steps_closer_than_the_bands_would_break_the_bound():
    strategy = toeplitz(3, max_participations=2)
    assert np.linalg.norm(dense(strategy, 9)[:, [0, 1]].sum(1)) > 1.1 * strategy.sensitivity


@pytest.mark.parametrize("num_bands", [1, 2, 4])
def test_the_noise_has_the_covariance_of_the_inverse_strategy(num_bands):
    """n draws: entries of the covariance have standard errors below 2 * scale / sqrt(n); six of them."""
    num_steps, n, stddev = 6, 40_000, 0.7
    strategy = toeplitz(num_bands, max_participations=1)
    noise = correlated_noise(strategy, stddev)
    tree = {"a": jnp.zeros(n), "b": jnp.zeros((2, 3))}

    def body(state, key):
        noisy, state = noise.apply(key, state, tree)
        return state, noisy

    _, noisy = jax.lax.scan(body, noise.init(tree), jax.random.split(jax.random.key(0), num_steps))
    inverse = np.linalg.inv(dense(strategy, num_steps))
    expected = stddev**2 * inverse @ inverse.T
    found = np.cov(np.asarray(noisy["a"], np.float64))
    np.testing.assert_allclose(found, expected, atol=6 * 2 * expected.max() / math.sqrt(n))
    assert noisy["b"].shape == (num_steps, 2, 3)


@pytest.mark.parametrize("num_steps", [16, 64])
def test_running_sums_carry_less_noise_than_with_independent_steps(num_steps):
    """At the same privacy: noise in units of each strategy's own sensitivity. Each unit takes part once."""

    def error(num_bands):
        strategy = toeplitz(num_bands, max_participations=1)
        sums = np.tri(num_steps) @ np.linalg.inv(dense(strategy, num_steps))
        return strategy.sensitivity * np.linalg.norm(sums, axis=1).max()

    assert error(1) == pytest.approx(math.sqrt(num_steps))
    assert error(num_steps) < 0.75 * error(1)
    assert error(num_steps) < error(4) < error(1)


def test_the_mean_clips_sums_and_adds_noise_of_multiplier_times_sensitivity():
    n, clip_norm = 100_000, 2.0
    strategy = toeplitz(3, max_participations=2)
    params = {"a": jnp.zeros(n)}
    updates = np.zeros((3, n), np.float32)
    updates[0, 0], updates[1, 1], updates[2] = 8.0, -1.0, np.nan
    for relation, factor in (("add_or_remove_one", 1), ("replace_one", 2)):
        mean = correlated_mean(plan(relation=relation), strategy, clip_norm=clip_norm, clients_per_round=4.0)
        apply = jax.jit(mean.apply)
        state = mean.init(params)
        silent, after, _ = apply(jax.random.key(1), state, {"a": jnp.zeros((3, n))}, jnp.zeros(3))
        stddev = 3.0 * factor * clip_norm * math.sqrt(2) * np.linalg.norm([1, 0.5, 0.375]) / 4
        assert np.std(silent["a"]) == pytest.approx(stddev, rel=6 / math.sqrt(2 * n))
        update, _, norm = apply(jax.random.key(1), state, {"a": jnp.asarray(updates)}, jnp.array([1.0, 0.3, 0.0]))
        np.testing.assert_allclose((update["a"] - silent["a"])[:3], [0.5, -0.25, 0], atol=1e-4)
        np.testing.assert_allclose(norm, [8, 1, 0])
        second, _, _ = apply(jax.random.key(2), after, {"a": jnp.zeros((3, n))}, jnp.zeros(3))
        both = np.corrcoef(silent["a"], second["a"])[0, 1]
        assert both == pytest.approx(-0.5 / math.sqrt(1.25), abs=6 / math.sqrt(n))  # n_1 = z_1 - n_0 / 2


def test_bad_settings_are_named():
    strategy = toeplitz(2, max_participations=1)
    for arguments, named in (
        ((plan(unit="record"), strategy), "plan.unit"),
        ((plan(num_steps=2), strategy), "plan.num_steps"),
        ((plan(sampling_rate=0.5), strategy), "plan.sampling_rate"),
    ):
        with pytest.raises(ValueError, match=f"^{named} is "):
            correlated_mean(*arguments, clip_norm=1.0, clients_per_round=2.0)
    with pytest.raises(ValueError, match=r"^plan\.noise_multiplier is 0\.0: "):
        correlated_mean(replace(plan(), noise_multiplier=0.0), strategy, clip_norm=1.0, clients_per_round=2.0)
    for name in ("clip_norm", "clients_per_round"):
        with pytest.raises(ValueError, match=f"^{name} is "):
            correlated_mean(plan(), strategy, **{"clip_norm": 1.0, "clients_per_round": 2.0} | {name: 0.0})
    for bad, named in (((0, 1), "num_bands"), ((1, 0), "max_participations")):
        with pytest.raises(ValueError, match=f"^{named} is "):
            toeplitz(bad[0], max_participations=bad[1])
    with pytest.raises(ValueError, match=r"^stddev is "):
        correlated_noise(strategy, -1.0)
