"""Laws of aggregation rules, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust.defenses import AGGREGATORS, coordinate_median, mean, trimmed_mean

KEY = jax.random.key(0)
BUILD = {"mean": mean, "coordinate_median": coordinate_median, "trimmed_mean": lambda: trimmed_mean(0.29)}
NUM_CLIENTS = 7


@functools.cache
def compiled(name):
    return jax.jit(BUILD[name]().apply)


def run(name, updates, weight):
    return compiled(name)(KEY, (), updates, jnp.asarray(weight, jnp.float32))


def oracle(name, updates, weight):
    here = updates[weight > 0].astype(np.float64)
    if not len(here):
        return np.zeros(updates.shape[1:])
    if name == "mean":
        return np.average(here, axis=0, weights=weight[weight > 0])
    if name == "coordinate_median":
        return np.median(here, axis=0)
    cut = int(len(here) * 29 // 100)
    return np.mean(np.sort(here, axis=0)[cut : len(here) - cut], axis=0)


def draw(seed, num_present, num_clients=NUM_CLIENTS):
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(num_clients, 3, 2)).astype(np.float32)
    weight = rng.uniform(0.5, 3, num_clients).astype(np.float32)
    weight[rng.permutation(num_clients)[num_present:]] = 0
    return updates, weight


def test_rules_by_hand():
    updates = {"w": jnp.asarray([[1.0], [2.0], [4.0], [100.0]]), "b": jnp.asarray([0.0, 0.0, 8.0, -9.0])}
    weight = jnp.asarray([1.0, 1.0, 2.0, 0.0])
    expected = {"mean": (2.75, 4.0), "coordinate_median": (2.0, 0.0)}
    for name, (w, b) in expected.items():
        update, state, info = run(name, updates, weight)
        np.testing.assert_allclose([update["w"][0], update["b"]], [w, b])
        assert state == () and info.num_present == 3
    update, _, info = trimmed_mean(0.25).apply(KEY, (), updates, jnp.ones(4))
    np.testing.assert_allclose([update["w"][0], update["b"]], [3.0, 0.0])
    assert info.num_trimmed == 1
    update, _, info = coordinate_median().apply(KEY, (), updates, jnp.ones(4))
    np.testing.assert_allclose([update["w"][0], update["b"]], [3.0, 0.0])


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=25)
@given(seed=st.integers(0, 999), num_present=st.integers(0, NUM_CLIENTS))
def test_equals_numpy_whoever_is_present(name, seed, num_present):
    updates, weight = draw(seed, num_present)
    update, _, info = run(name, updates, weight)
    np.testing.assert_allclose(update, oracle(name, updates, weight), rtol=1e-5, atol=1e-6)
    assert info.num_present == num_present


@pytest.mark.parametrize("name", BUILD)
def test_absent_clients_are_nothing_whatever_they_hold(name):
    updates, weight = draw(1, 4)
    absent = (weight == 0)[:, None, None]
    results = [run(name, np.where(absent, junk, updates), weight)[0] for junk in (0, np.nan, np.inf, -np.inf, 1e38)]
    for result in results[1:]:
        np.testing.assert_array_equal(np.asarray(result).view(np.int32), np.asarray(results[0]).view(np.int32))


@pytest.mark.parametrize("name", BUILD)
def test_order_of_clients_does_not_matter(name):
    updates, weight = draw(2, 5)
    order = np.random.default_rng(0).permutation(NUM_CLIENTS)
    np.testing.assert_allclose(run(name, updates[order], weight[order])[0], run(name, updates, weight)[0], atol=1e-6)


@pytest.mark.parametrize("name", BUILD)
def test_one_trace_for_any_number_present(name):
    traces = []

    @jax.jit
    def apply(updates, weight):
        traces.append(weight)
        return BUILD[name]().apply(KEY, (), updates, weight)

    for num_present in (0, 3, NUM_CLIENTS):
        assert apply(*draw(3, num_present))[2].num_present == num_present
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["coordinate_median", "trimmed_mean"])
@pytest.mark.parametrize("lie", [1e30, -1e30, np.inf, -np.inf, np.nan, -np.nan])
def test_a_dishonest_minority_cannot_leave_the_honest_range(name, lie):
    updates, weight = draw(4, NUM_CLIENTS)
    updates[[1, 5]] = lie  # 2 of 7 <= 0.29 * 7
    update = np.asarray(run(name, updates, weight)[0])
    honest = np.delete(updates, [1, 5], axis=0)
    assert (honest.min(0) - 1e-6 <= update).all() and (update <= honest.max(0) + 1e-6).all()
    poisoned = np.asarray(run("mean", updates, weight)[0])
    assert not ((honest.min(0) <= poisoned) & (poisoned <= honest.max(0))).any()


def test_trimming_counts_as_written_not_as_rounded():
    """0.29 * 100 is 28.999999999999996 in floats."""
    for fraction, num_clients, expected in ((0.29, 100, 29), (0.1, 10, 1), (0.2, 14, 2), (0.0, 5, 0), (0.49, 3, 1)):
        num_trimmed = jax.jit(lambda w, f=fraction: trimmed_mean(f).apply(KEY, (), w, w)[2].num_trimmed)
        assert num_trimmed(jnp.ones(num_clients)) == expected


def test_however_large_the_fraction_something_is_left():
    """Just below one half rounding would leave out all of an even number; the median's two are left."""
    fraction, (updates, weight) = float(np.nextafter(0.5, 0)), draw(6, 6)
    update, _, info = jax.jit(trimmed_mean(fraction).apply)(KEY, (), updates, weight)
    np.testing.assert_allclose(update, np.median(updates[weight > 0], axis=0), rtol=1e-5, atol=1e-6)
    assert info.num_trimmed == 2


def test_dtypes_and_the_registry():
    assert set(AGGREGATORS) == set(BUILD)
    for name in BUILD:
        update = run(name, {"h": jnp.ones((3, 2), jnp.bfloat16), "f": jnp.ones((3, 2))}, np.ones(3))[0]
        assert update["h"].dtype == jnp.bfloat16 and update["f"].dtype == jnp.float32


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1.0, float("nan")])
def test_a_bad_fraction_is_named(fraction):
    with pytest.raises(ValueError, match=r"^trim_fraction is "):
        trimmed_mean(fraction)
