"""Laws of the noised sums."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.privacy import ClippedGrad, add_gaussian, clipped_grad, private_grad, private_mean
from fedrobust.types import Batch
from tests.privacy.noise_cases import (
    CLIENT_PLAN,
    CLIPPED,
    KEY,
    MEAN,
    NUM_CLIENTS,
    PARAMS,
    PLAN,
    SIZE,
    N,
    assert_normal,
    loss,
    make_batch,
)


@functools.cache
def compiled(relation="add_or_remove_one", class_weight=None):
    weight = None if class_weight is None else jnp.asarray(class_weight)
    return jax.jit(private_grad(CLIPPED, replace(PLAN, relation=relation), num_records=20, class_weight=weight))


def test_noise_has_the_stddev_asked_for_and_is_independent_across_leaves():
    noisy = add_gaussian(KEY, {"a": jnp.full(N, 7.0), "b": jnp.zeros((2, N // 2))}, 0.3)
    a, b = np.asarray(noisy["a"]) - 7, np.ravel(noisy["b"])
    assert_normal(a, 0.3)
    assert_normal(b, 0.3)
    assert abs(np.corrcoef(a, b)[0, 1]) < 6 / np.sqrt(N)
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 6 / np.sqrt(N)


def test_noise_of_zero_stddev_is_nothing_and_shapes_and_dtypes_stay():
    tree = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(())}
    for stddev in (0.0, 1.0):
        noisy = add_gaussian(KEY, tree, stddev)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), noisy) == jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert all((x == 1).all() for x in jax.tree.leaves(add_gaussian(KEY, tree, 0.0)))


def test_noise_is_a_function_of_its_key():
    tree = {"a": jnp.zeros(5)}
    first, again, other = (add_gaussian(k, tree, 1.0)["a"] for k in (KEY, KEY, jax.random.key(4)))
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize(("relation", "factor"), [("add_or_remove_one", 1), ("zero_out", 1), ("replace_one", 2)])
def test_an_empty_batch_gives_noise_of_multiplier_times_sensitivity_over_expected_size(relation, factor):
    gradient, info = compiled(relation=relation)(KEY, PARAMS, make_batch(mask=False))
    stddev = 1.2 * factor * 0.5 / 5.0
    assert_normal(gradient["a"], stddev)
    assert_normal(gradient["b"], stddev)
    assert abs(np.corrcoef(gradient["a"], gradient["b"])[0, 1]) < 6 / np.sqrt(N)
    assert info.loss == 0


@pytest.mark.parametrize("num_shares", [2, 5])
def test_a_share_has_its_part_of_the_variance_and_all_shares_make_one_mechanism(num_shares):
    share = jax.jit(private_grad(CLIPPED, PLAN, num_records=20, num_shares=num_shares))
    shares = [share(jax.random.key(i), PARAMS, make_batch(mask=False))[0]["b"] for i in range(num_shares)]
    whole = 1.2 * 0.5 / 5.0
    for one in shares:
        assert_normal(one, whole / np.sqrt(num_shares))
    assert_normal(sum(shares), whole)
    assert abs(np.corrcoef(shares[0], shares[1])[0, 1]) < 6 / np.sqrt(N)


def test_a_share_holds_all_of_the_signal():
    """The same key draws the same noise up to its scale: the difference to an empty batch is what the records add."""
    whole, share = (private_grad(CLIPPED, PLAN, num_records=20, num_shares=k) for k in (1, 4))
    one, empty = make_batch(np.arange(SIZE) < 1), make_batch(False)
    added = [run(KEY, PARAMS, one)[0]["a"] - run(KEY, PARAMS, empty)[0]["a"] for run in (whole, share)]
    np.testing.assert_allclose(added[0], added[1], atol=1e-6)
    assert abs(added[1][0] - added[1][4]) > 0.01


@pytest.mark.parametrize("num_shares", [0, -1, 2.0, np.nan])
def test_the_number_of_shares_is_a_whole_number_of_at_least_one(num_shares):
    with pytest.raises(ValueError, match=r"^num_shares is "):
        private_grad(CLIPPED, PLAN, num_records=20, num_shares=num_shares)


@pytest.mark.parametrize("num_real", [1, 3, SIZE])
def test_the_denominator_is_the_expected_size_never_the_realised_one(num_real):
    """The same key draws the same noise, so the difference to an empty batch is what the records contribute."""
    batch = make_batch()._replace(mask=np.arange(SIZE) < num_real)
    with_data, without = (compiled()(KEY, PARAMS, b)[0]["a"][:3] for b in (batch, make_batch(mask=False)))
    pixels = batch.image[:num_real, 0, 0, 0].astype(np.float64)
    expected = sum(g * min(1, 0.5 / (abs(g) * np.sqrt(3))) for g in pixels) / 5.0
    np.testing.assert_allclose(with_data - without, np.full(3, expected), atol=1e-6)


def test_class_weights_stand_after_the_clip():
    """All gradients exceed the clip norm: a weight inside the loss would be clipped away."""
    image = np.full((SIZE, 1, 1, 1), 10.0, np.float32)
    batch = Batch(image, np.array([0, 0, 1, 1, 1, 2], np.int32), np.arange(SIZE) < 5)
    run = compiled(class_weight=(1.0, 0.25, 0.5))
    difference = run(KEY, PARAMS, batch)[0]["a"][:3] - run(KEY, PARAMS, make_batch(mask=False))[0]["a"][:3]
    np.testing.assert_allclose(difference, np.full(3, (2 + 3 * 0.25) * 0.5 / np.sqrt(3) / 5), rtol=1e-3)


def test_class_weights_may_be_numpy_as_they_are_released_and_padding_may_have_any_label():
    def weights_of(key, params, batch, weight):
        return params, weight

    batch = make_batch(np.arange(SIZE) < 2)._replace(label=np.array([1, 0, 7, -9, 1, 1], np.int32))
    weight = np.array([0.25, 1.0], np.float32)
    grad = private_grad(ClippedGrad(weights_of, 1.0), PLAN, num_records=20, class_weight=weight)
    for run in (grad, jax.jit(grad)):
        assert run(KEY, {"a": jnp.zeros(1)}, batch)[1][:2].tolist() == [1.0, 0.25]


def test_the_noise_does_not_depend_on_the_randomness_of_the_loss():
    """A loss that draws from its key must not share a stream with the noise that hides it."""

    def apply(key, params, batch, weight):
        return add_gaussian(key, params, 1.0), None

    plan, batch = replace(PLAN, noise_multiplier=1.0), make_batch()
    empty = make_batch(mask=False)
    noise = private_grad(clipped_grad(loss, clip_norm=1.0), plan, num_records=4)(KEY, PARAMS, empty)[0]["b"]
    both = private_grad(ClippedGrad(apply, 1.0), plan, num_records=4)(KEY, PARAMS, batch)[0]["b"]
    drawn = both - noise
    assert_normal(drawn, 1.0)
    assert abs(np.corrcoef(drawn, noise)[0, 1]) < 6 / np.sqrt(N)


NOT_POSITIVE = (0, -1.0, np.inf, np.nan)


@pytest.mark.parametrize("value", NOT_POSITIVE)
def test_numbers_of_the_private_gradient_must_be_positive(value):
    with pytest.raises(ValueError, match=r"^num_records is "):
        private_grad(CLIPPED, PLAN, num_records=value)
    with pytest.raises(ValueError, match=r"^plan\.noise_multiplier is "):
        private_grad(CLIPPED, replace(PLAN, noise_multiplier=value), num_records=2)


def test_a_plan_for_something_else_is_refused():
    with pytest.raises(ValueError, match=r"^relation is 'swap'"):
        private_grad(CLIPPED, replace(PLAN, relation="swap"), num_records=2)
    with pytest.raises(ValueError, match=r"^plan\.unit is 'client'"):
        private_grad(CLIPPED, CLIENT_PLAN, num_records=2)
    with pytest.raises(ValueError, match=r"^plan\.unit is 'record'"):
        private_mean(PLAN, clip_norm=1.0, num_clients=2)
    with pytest.raises(ValueError, match=r"^plan\.relation is 'zero_out'"):
        private_mean(replace(CLIENT_PLAN, relation="zero_out"), clip_norm=1.0, num_clients=2)


MEAN_APPLY = jax.jit(MEAN.apply)


def aggregate(updates, weight):
    return MEAN_APPLY(KEY, MEAN.init(PARAMS), {"a": updates}, jnp.asarray(weight, jnp.float32))


def test_client_level_noise_is_added_once_not_once_per_client():
    for weight in (np.zeros(NUM_CLIENTS), np.ones(NUM_CLIENTS)):
        update, state, _ = aggregate(jnp.zeros((NUM_CLIENTS, N)), weight)
        assert_normal(update["a"], 0.7 * 2.0 / 4.0)
        assert state == ()


def test_client_updates_are_clipped_then_summed_over_the_expected_number():
    updates = np.zeros((NUM_CLIENTS, 4), np.float32)
    updates[0, 0], updates[1, 1], updates[2, 2], updates[3, 3] = 8.0, -1.0, 2.0, np.nan
    updates[4] = 50  # absent
    weight = np.array([1, 0.2, 3, 1, 0])
    noise = aggregate(updates, np.zeros(NUM_CLIENTS))[0]["a"]
    update, _, norm = aggregate(updates, weight)
    # clip(8) = 2; a client's weight says only that it is there; a NaN from a present client is dropped
    np.testing.assert_allclose(update["a"] - noise, np.array([2, -1, 2, 0]) / 4, atol=1e-5)
    np.testing.assert_allclose(norm, [8, 1, 2, np.nan, 0])


def test_absent_clients_are_nothing_in_the_private_mean_whatever_they_hold():
    updates, weight = np.random.default_rng(0).normal(size=(NUM_CLIENTS, 4)).astype(np.float32), [1, 0, 1, 0, 1]
    results = []
    for junk in (0, np.nan, np.inf, 1e38):
        updates[[1, 3]] = junk
        update, _, norm = aggregate(updates, weight)
        results.append((update["a"].tolist(), norm.tolist()))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("value", NOT_POSITIVE)
def test_numbers_of_the_private_mean_must_be_positive(value):
    for name in ("clip_norm", "num_clients"):
        with pytest.raises(ValueError, match=f"^{name} is "):
            private_mean(CLIENT_PLAN, **{"clip_norm": 1.0, "num_clients": 2.0} | {name: value})
    with pytest.raises(ValueError, match=r"^plan\.noise_multiplier is "):
        private_mean(replace(CLIENT_PLAN, noise_multiplier=value), clip_norm=1.0, num_clients=2)
