"""No noise is drawn twice: not for two rounds, clients, steps or leaves, and none of the system's for any two calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import defenses, federated
from fedrobust.privacy import add_gaussian, add_system_gaussian, clipped_grad, entropy, private_grad, private_mean
from fedrobust.types import Batch, Cohort
from tests.privacy.noise_cases import (
    CLIENT_PLAN,
    CLIPPED,
    KEY,
    MEAN,
    NUM_CLIENTS,
    PARAMS,
    PLAN,
    N,
    assert_normal,
    loss,
    make_batch,
)

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
