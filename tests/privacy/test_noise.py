"""Laws of the noised sums.

Statistical tests draw N = 200 000 normals at a fixed key. Their standard deviation has a relative error of
1 / sqrt(2 N) = 0.0016, so a tolerance of 1 % is six of them: a right implementation fails for one key in 5e8.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import defenses, federated
from fedrobust.privacy import (
    ClippedGrad,
    Plan,
    add_gaussian,
    add_system_gaussian,
    clipped_grad,
    entropy,
    private_grad,
    private_mean,
)
from fedrobust.types import Batch, Cohort

KEY = jax.random.key(3)
N = 200_000


def loss(key, params, image, label):
    """Its gradient is the image's first pixel in every one of the parameters' first three entries."""
    return image[:, 0, 0, 0] * jnp.sum(params["a"][:3])


PARAMS = {"a": jnp.zeros(N), "b": jnp.zeros(N)}
CLIPPED = clipped_grad(loss, clip_norm=0.5)
SIZE = 6


def make_batch(mask=True, label=0):
    image = np.linspace(-2, 2, SIZE, dtype=np.float32).reshape(-1, 1, 1, 1)
    return Batch(image, np.full(SIZE, label, np.int32), np.full(SIZE, mask))


PLAN = Plan(
    unit="record",
    relation="add_or_remove_one",
    sampling="poisson",
    sampling_rate=0.25,
    num_steps=3,
    noise_multiplier=1.2,
    histogram_epsilon=0.0,
    epsilon=8.0,
    delta=1e-5,
)


@functools.cache
def compiled(relation="add_or_remove_one", class_weight=None):
    weight = None if class_weight is None else jnp.asarray(class_weight)
    return jax.jit(private_grad(CLIPPED, replace(PLAN, relation=relation), num_records=20, class_weight=weight))


def assert_normal(sample, stddev):
    sample = np.asarray(sample, np.float64)
    assert abs(sample.std() / stddev - 1) < 0.01
    assert abs(sample.mean()) < 6 * stddev / np.sqrt(sample.size)
    inside = np.mean(np.abs(sample) < stddev)  # 0.6827 of a normal; 0.58 of a uniform, 0.76 of a Laplace
    assert abs(inside - 0.6827) < 0.01


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


NUM_CLIENTS = 5
CLIENT_PLAN = replace(PLAN, unit="client", noise_multiplier=0.7)
MEAN = private_mean(CLIENT_PLAN, clip_norm=2.0, num_clients=16)
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


ROUNDS, CLIENTS, STEPS, LEAF = 3, 4, 3, 2000
SMALL = {"a": jnp.zeros(LEAF), "b": jnp.zeros((2, LEAF // 2))}


@functools.cache
def federation(noise, backend, blind):
    """The trainer with gradients of zero, which reports every gradient it makes: the noise and nothing else.

    Args:
        blind: "" for the right trainer; "client" or "step" for one whose noise does not look at it.
    """
    private = private_grad(clipped_grad(loss, clip_norm=0.5), PLAN, num_records=4, noise=noise)

    def reported(key, params, batch):
        gradient, _ = private(KEY if blind == "step" else key, params, batch)
        return gradient, gradient

    def client_update(round):
        update = federated.local_update(reported, optax.sgd(1.0), skip_empty=False)
        return (lambda key, *rest: update(jax.random.fold_in(KEY, round), *rest)) if blind == "client" else update

    algorithm = federated.fedavg(
        client_update, defenses.mean(), optax.sgd(1.0), functools.partial(federated.map_clients, backend=backend)
    )
    return algorithm, jax.jit(algorithm.round)


def draws(noise=add_gaussian, backend="scan", blind="", round_key=jax.random.fold_in):
    """[rounds, clients, steps, leaves, LEAF] standard normals, all that a training draws."""
    algorithm, run = federation(noise, backend, blind)
    state, rows = algorithm.init(SMALL), []
    batch = Batch(*(np.zeros((CLIENTS, STEPS, 1, *shape), t) for shape, t in (((1, 1, 1), "f"), ((), "i"), ((), "?"))))
    cohort = Cohort(np.arange(CLIENTS), np.ones(CLIENTS, np.float32), np.zeros(CLIENTS, bool), batch)
    for r in range(ROUNDS):
        state, info = run(round_key(KEY, r), state, cohort)
        rows.append(np.stack([np.asarray(x).reshape(CLIENTS, STEPS, LEAF) for x in info.client.values()], axis=2))
    return np.stack(rows).astype(np.float64) / (PLAN.noise_multiplier * 0.5)


def assert_independent(noise):
    """No two of the 72 vectors equal; each standard; 2 556 correlations within six errors: one seed in 2e5 fails."""
    rows = noise.reshape(-1, LEAF)
    assert len(np.unique(rows, axis=0)) == len(rows) == ROUNDS * CLIENTS * STEPS * 2
    # 6 sqrt(2 / LEAF) and 6 / sqrt(LEAF): six errors of a variance and of a mean
    assert np.abs(rows.var(axis=1) - 1).max() < 6 * np.sqrt(2 / LEAF)
    assert np.abs(rows.mean(axis=1)).max() < 6 / np.sqrt(LEAF)
    between = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.abs(between).max() < 6 / np.sqrt(LEAF)


@pytest.mark.parametrize(
    ("noise", "backend"),
    [(add_gaussian, "scan"), (add_gaussian, "vmap"), (add_system_gaussian, "scan"), (add_system_gaussian, "shard_map")],
)
def test_a_training_draws_new_noise_for_every_round_client_step_and_leaf(noise, backend):
    assert_independent(draws(noise=noise, backend=backend))


def test_system_noise_where_jax_cannot_draw_it_is_an_error_and_never_shared():
    """The trainer leaves absent clients out by `cond`; mapped, JAX allows no side effects in it."""
    with pytest.raises(NotImplementedError, match="IO effect"):
        draws(noise=add_system_gaussian, backend="vmap")


@pytest.mark.parametrize("blind", ["client", "step"])
def test_noise_that_forgets_the_client_or_the_step_is_found_out(blind):
    with pytest.raises(AssertionError):
        assert_independent(draws(blind=blind))


def test_noise_that_forgets_the_round_is_found_out_and_system_noise_cannot():
    def same(key, r):
        return key

    with pytest.raises(AssertionError):
        assert_independent(draws(round_key=same))
    assert_independent(draws(noise=add_system_gaussian, round_key=same))


def test_noise_needs_a_key():
    for noise in (add_gaussian, add_system_gaussian):
        with pytest.raises(TypeError, match="key"):
            noise(tree=SMALL, stddev=1.0)
    for function in (private_grad(CLIPPED, PLAN, num_records=2), MEAN.apply):
        with pytest.raises(TypeError, match=r"key|positional"):
            function(PARAMS, make_batch())


def test_system_noise_is_normal_and_two_calls_with_one_key_differ():
    tree = {"a": jnp.full(N, 7.0), "b": jnp.zeros((2, N // 2), jnp.bfloat16), "c": jnp.zeros((0, 3))}
    run = jax.jit(add_system_gaussian)
    first, again = run(KEY, tree, 0.3), run(KEY, tree, 0.3)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), first) == jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    a, b = (np.asarray(x["a"], np.float64) - 7 for x in (first, again))
    assert_normal(a, 0.3)
    for other in (b, np.ravel(np.asarray(first["b"], np.float64)), np.roll(a, 1)):
        assert_normal(other, 0.3)
        assert abs(np.corrcoef(a, other)[0, 1]) < 6 / np.sqrt(N)
    assert jax.tree.map(jnp.array_equal, run(KEY, tree, 0.0), tree) == {"a": True, "b": True, "c": True}


def test_the_rarest_system_words_give_finite_noise_and_as_much_up_as_down(monkeypatch):
    ends = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    monkeypatch.setattr(entropy, "system_words", lambda size: ends[:size])
    low, below, above, high = entropy._normals(4)
    assert 8.2 < high == -low < 8.3
    assert 0 < above == -below < 1e-15


def assert_all_differ(rows):
    assert len(np.unique(np.asarray(rows).reshape(-1, LEAF), axis=0)) == np.asarray(rows).size // LEAF


def test_system_noise_is_never_folded_cached_or_shared():
    """Equal calls in one program, in the steps of a scan, in a branch, and over whatever of its inputs is mapped."""
    tree = jnp.zeros(LEAF)

    @jax.jit
    def all_kinds(key):
        twice = [add_system_gaussian(key, tree, 1.0), add_system_gaussian(key, tree, 1.0)]
        steps = jax.lax.scan(lambda c, _: (c, add_system_gaussian(key, tree, 1.0)), 0, None, length=3)[1]
        branch = jax.lax.cond(steps[0, 0] < 100, lambda: add_system_gaussian(key, tree, 1.0), lambda: tree)
        by_key = jax.vmap(add_system_gaussian, (0, None, None))(jnp.stack([key] * 3), tree, 1.0)
        by_tree = jax.vmap(add_system_gaussian, (None, 0, None))(key, jnp.zeros((3, LEAF)), 1.0)
        by_stddev = jax.vmap(add_system_gaussian, (None, None, 0))(key, tree, jnp.ones(3))
        return jnp.concatenate([jnp.stack(twice), steps, branch[None], by_key, by_tree, by_stddev])

    assert_all_differ(np.concatenate([all_kinds(KEY), all_kinds(KEY)]))


def test_the_client_level_mean_takes_system_noise():
    mean = private_mean(CLIENT_PLAN, clip_norm=2.0, num_clients=16, noise=add_system_gaussian)
    updates, weight = {"a": jnp.zeros((NUM_CLIENTS, N))}, jnp.ones(NUM_CLIENTS)
    first, again = (mean.apply(KEY, (), updates, weight)[0]["a"] for _ in range(2))
    assert_normal(first, 0.7 * 2.0 / 4.0)
    assert abs(np.corrcoef(first, again)[0, 1]) < 6 / np.sqrt(N)
