"""Laws of a federated round, with clients so simple that a round can be done by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust.defenses import coordinate_median, mean
from fedrobust.federated import fedavg, map_clients
from fedrobust.types import Batch, Cohort

KEY = jax.random.key(0)
SCAN = functools.partial(map_clients, backend="scan")
VMAP = functools.partial(map_clients, backend="vmap")
PARAMS = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(0.5)}


def shift(key, params, batch):
    """A client whose update is the mean of its labels; its info shows the first number of its stream."""
    value = jnp.mean(batch.label.astype(jnp.float32)) + jnp.sum(batch.image)
    return jax.tree.map(lambda x: jnp.full_like(x, value), params), jax.random.bits(key)


def make_cohort(label, weight, malicious=None, ids=None):
    """One example per client, whose label is its update."""
    label = np.asarray(label, np.float32)
    image = np.where(np.isnan(label), np.nan, 0).astype(np.float32).reshape(-1, 1, 1, 1, 1, 1)
    shape = (len(label), 1, 1)
    batch = Batch(image, np.nan_to_num(label).astype(np.int32).reshape(shape), np.ones(shape, bool))
    ids = np.arange(len(label)) if ids is None else np.asarray(ids)
    malicious = np.zeros(len(label), bool) if malicious is None else np.asarray(malicious, bool)
    return Cohort(ids.astype(np.int32), np.asarray(weight, np.float32), malicious, batch)


def build(client=shift, aggregator=None, optimizer=None, client_map=SCAN, **settings):
    return fedavg(lambda round: client, aggregator or mean(), optimizer or optax.sgd(1.0), client_map, **settings)


def close(tree, a, b):
    np.testing.assert_allclose(tree["a"], a, rtol=1e-6)
    np.testing.assert_allclose(tree["b"], b, rtol=1e-6)


@pytest.mark.parametrize("client_map", [SCAN, VMAP])
def test_one_round_by_hand_with_weights_and_an_absent_client_of_nan(client_map):
    algorithm = build(client_map=client_map)
    state = algorithm.init(PARAMS)
    state, info = algorithm.round(KEY, state, make_cohort([2, 6, np.nan], [1, 3, 0]))
    close(state.params, [6.0, 3.0], 5.5)  # + (1 * 2 + 3 * 6) / 4
    close(state.average, [6.0, 3.0], 5.5)
    assert state.round == 1
    assert info.num_present == 2
    np.testing.assert_allclose(info.update_norm, 5 * np.sqrt(3), rtol=1e-6)
    assert info.client[2] == 0


def test_server_momentum_by_hand():
    algorithm = build(optimizer=optax.sgd(0.5, momentum=0.9))
    state = algorithm.init(PARAMS)
    for label in (2, 4):
        state, _ = algorithm.round(KEY, state, make_cohort([label], [1]))
    # velocity 2, then 0.9 * 2 + 4 = 5.8; moved by 0.5 * (2 + 5.8) = 3.9
    close(state.params, [4.9, 1.9], 4.4)


def test_the_server_optimizer_decays_the_parameters_that_are_trained_not_their_average():
    decay = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))
    algorithm = build(optimizer=decay, average_decay=0.9)
    state, step = algorithm.init(PARAMS), jax.jit(algorithm.round)
    for label in (2, 4, 1):
        state, _ = step(KEY, state, make_cohort([label], [1]))
    moved = 0.9 * (0.9 * 2 + 4) + 1
    close(state.params, 0.9**3 * np.asarray(PARAMS["a"]) + moved, 0.9**3 * 0.5 + moved)


def test_nobody_present_changes_no_parameter():
    algorithm = build()
    before = algorithm.init(PARAMS)
    after, info = algorithm.round(KEY, before, make_cohort([np.nan, np.nan], [0, 0]))
    close(after.params, PARAMS["a"], PARAMS["b"])
    assert (info.num_present, after.round, info.update_norm) == (0, 1, 0)


def test_the_client_sees_the_round():
    def by_round(round):
        return lambda key, params, batch: (jax.tree.map(lambda x: jnp.zeros_like(x) + 10 * (round + 1), params), ())

    algorithm = fedavg(by_round, mean(), optax.sgd(1.0), SCAN)
    state = algorithm.init(PARAMS)
    for moved in (10, 30, 60):
        state, _ = algorithm.round(KEY, state, make_cohort([0, 0], [1, 1]))
        close(state.params, np.asarray(PARAMS["a"]) + moved, 0.5 + moved)


def test_clients_draw_by_identity_not_by_place_and_anew_every_round():
    algorithm = build()
    state = algorithm.init(PARAMS)
    drawn = {}
    for ids in ([3, 8, 5], [5, 3, 8], [8, 1, 3]):
        _, info = algorithm.round(KEY, state, make_cohort([1, 1, 1], [1, 1, 1], ids=ids))
        for name, bits in zip(ids, info.client.tolist(), strict=True):
            assert drawn.setdefault(name, bits) == bits
    assert len(set(drawn.values())) == 4
    _, info = algorithm.round(jax.random.fold_in(KEY, 1), state, make_cohort([1], [1], ids=[3]))
    assert info.client.tolist() != [drawn[3]]


def test_absent_clients_are_nothing_whatever_they_hold():
    results = []
    for label, name in ((0, 7), (3, 8), (np.nan, 9)):
        for client_map in (SCAN, VMAP):
            algorithm = build(aggregator=coordinate_median(), client_map=client_map)
            cohort = make_cohort([1, label, 5, 6], [1, 0, 1, 1], malicious=[0, 1, 0, 0], ids=[0, name, 2, 3])
            state, info = algorithm.round(KEY, algorithm.init(PARAMS), cohort)
            results.append(jax.tree.map(lambda x: x.tolist(), (state, info)))
    assert all(result == results[0] for result in results)


def lie(key, updates, malicious):
    """Replaces the malicious rows, and would show whom it was told of."""
    del key

    def leaf(x):
        return jnp.where(malicious.reshape(-1, *[1] * (x.ndim - 1)), 1000.0, x)

    return jax.tree.map(leaf, updates)


def test_an_update_attack_changes_the_updates_of_malicious_clients_alone():
    cohort = make_cohort([2, 6, 4, np.nan], [1, 1, 2, 0], malicious=[0, 1, 0, 1])
    algorithm = build(update_attack=lie)
    state, _ = algorithm.round(KEY, algorithm.init(PARAMS), cohort)
    moved = (2 + 1000 + 2 * 4) / 4
    close(state.params, np.asarray(PARAMS["a"]) + moved, 0.5 + moved)
    honest = build()
    assert honest.round(KEY, honest.init(PARAMS), cohort)[0].params["b"] == 4.5


def test_the_attack_and_the_aggregator_draw_from_streams_of_their_own():
    seen = {}

    def attack(key, updates, malicious):
        seen["attack"] = jax.random.bits(key).item()
        return updates

    def aggregate(key, state, updates, weight):
        seen["aggregate"] = jax.random.bits(key).item()
        return jax.tree.map(lambda x: x[0], updates), state, ()

    algorithm = build(aggregator=mean()._replace(apply=aggregate), update_attack=attack)
    _, info = algorithm.round(KEY, algorithm.init(PARAMS), make_cohort([1, 2], [1, 1]))
    assert len({*seen.values(), *info.client.tolist(), jax.random.bits(KEY).item()}) == 5


def test_what_the_mask_zeroes_stays_zero_under_momentum_and_averaging():
    algorithm = build(optimizer=optax.sgd(0.5, momentum=0.9), average_decay=0.9)
    state = algorithm.init(PARAMS)
    mask = {"a": jnp.asarray([0.0, 1.0]), "b": jnp.asarray(0.0)}
    state, _ = algorithm.round(KEY, state, make_cohort([3, 1], [1, 1]))
    state = state._replace(mask=mask)
    free = build(optimizer=optax.sgd(0.5, momentum=0.9), average_decay=0.9)
    unmasked = state._replace(mask=jax.tree.map(jnp.ones_like, mask))
    for _ in range(3):
        state, _ = algorithm.round(KEY, state, make_cohort([3, 1], [1, 1]))
        unmasked, _ = free.round(KEY, unmasked, make_cohort([3, 1], [1, 1]))
        for tree, other in ((state.params, unmasked.params), (state.average, unmasked.average)):
            assert (tree["a"][0], tree["b"]) == (0, 0)
            assert tree["a"][1] == other["a"][1] != 0


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9])
def test_the_average_by_hand(decay):
    """The decay warms up as (1 + r) / (10 + r): the first rounds are not drowned in the initial parameters."""
    algorithm = build(average_decay=decay)
    state, params, average = algorithm.init(PARAMS), -2.0, -2.0
    for r, label in enumerate([3, 0, 5, 1]):
        state, _ = algorithm.round(KEY, state, make_cohort([label], [1]))
        params += label
        now = min(decay, (1 + r) / (10 + r))
        average = now * average + (1 - now) * params
        np.testing.assert_allclose([state.params["a"][1], state.average["a"][1]], [params, average], rtol=1e-5)


def test_parameters_of_half_precision_are_averaged_in_float32_in_one_program():
    """The average lies between two numbers of bfloat16."""
    algorithm = build(average_decay=0.9)
    start = algorithm.init(jax.tree.map(lambda x: jnp.full(x.shape, 256.0, jnp.bfloat16), PARAMS))
    step, state, average = jax.jit(algorithm.round), start, 256.0
    for r in range(3):
        state, _ = step(KEY, state, make_cohort([8], [1]))
        now = (1 + r) / (10 + r)
        average = now * average + (1 - now) * (256 + 8 * (r + 1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    assert step._cache_size() == 1
    assert state.params["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.average["b"], average, rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, np.nan])
def test_a_bad_decay_is_named(decay):
    with pytest.raises(ValueError, match=r"^average_decay is "):
        build(average_decay=decay)


def test_a_cohort_of_the_wrong_shape_is_refused():
    algorithm = build()
    cohort = make_cohort([1, 2], [1, 1])
    with pytest.raises(AssertionError):
        algorithm.round(KEY, algorithm.init(PARAMS), cohort._replace(id=np.arange(3, dtype=np.int32)))
