"""Codes between clients and server: what arrives, what is remembered, what is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import keys, losses
from fedrobust.compression.codecs import error_feedback, identity, power_sgd, qsgd, top_k
from fedrobust.defenses import mean
from fedrobust.federated import LinkState, Sent, fedavg, latest, local_update, map_clients, rounds, save
from fedrobust.federated.link import link
from fedrobust.privacy import Plan, clipped_grad, private_grad
from fedrobust.types import Batch, Cohort

KEY = jax.random.key(0)
PARAMS = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(0.5)}
NUM_CLIENTS = 5
SCAN = functools.partial(map_clients, backend="scan")


def own(key, params, batch):
    """A client whose update are three numbers that follow from its label."""
    del key, params
    label = jnp.mean(batch.label.astype(jnp.float32)) + jnp.sum(batch.image)
    return {"a": jnp.stack([label, -3 * label]), "b": 0.5 * label + 1}, ()


def make_cohort(label, weight, ids):
    label = np.asarray(label, np.float32)
    shape = (len(label), 1, 1)
    image = np.where(np.isnan(label), np.nan, 0).astype(np.float32).reshape(*shape, 1, 1, 1)
    batch = Batch(image, np.nan_to_num(label).astype(np.int32).reshape(shape), np.ones(shape, bool))
    malicious = np.arange(len(label)) == 1
    return Cohort(np.asarray(ids, np.int32), np.asarray(weight, np.float32), malicious, batch)


COHORTS = [  # an absent client may bear any id, and hold NaN
    make_cohort([2, 6, np.nan], [1, 3, 0], [4, 0, 4]),
    make_cohort([np.nan, 1, 2], [0, 1, 1], [99, 2, 0]),
    make_cohort([3, np.nan, 5], [2, 0, 1], [0, -1, 4]),
]


def build(client=own, client_map=SCAN, **settings):
    return fedavg(lambda round: client, mean(), optax.sgd(1.0), client_map, **settings)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def play(algorithm, cohorts=COHORTS):
    state, infos = algorithm.init(PARAMS), []
    for r, cohort in enumerate(cohorts):
        state, info = jax.jit(algorithm.round)(jax.random.fold_in(KEY, r), state, cohort)
        infos.append(info)
    return state, infos


def test_updates_said_as_they_are_change_no_bit_and_are_counted_and_no_codec_adds_nothing():
    plain, quiet = play(build())
    coded, infos = play(build(codec=identity(PARAMS), num_clients=NUM_CLIENTS, downlink=identity(PARAMS)))
    assert plain._fields == ("params", "average", "mask", "optimizer", "aggregator", "round")
    assert bits(plain) == bits(coded)
    assert quiet[0].sent == Sent((), ())
    assert [info.sent.uplink.tolist() for info in infos] == [[96, 96, 0], [0, 96, 96], [96, 0, 96]]
    assert [int(info.sent.downlink) for info in infos] == [96, 96, 96]


@pytest.mark.parametrize("backend", ["vmap", "shard_map"])
def test_every_client_remembers_by_its_id_what_it_did_not_say(backend):
    """Against a loop: one number of three is said; the rest waits for the client's next turn, wherever it stands."""
    codec = error_feedback(top_k(PARAMS, share=0.4))
    client_map = functools.partial(map_clients, backend=backend)
    state, infos = play(build(client_map=client_map, codec=codec, num_clients=NUM_CLIENTS))
    params, waiting = np.array([1, -2, 0.5]), np.zeros((NUM_CLIENTS, 3))
    for cohort in COHORTS:
        total = np.zeros(3)
        for who, weight, label in zip(cohort.id, cohort.weight, cohort.batch.label.ravel(), strict=True):
            if weight > 0:
                meant = waiting[who] + np.array([label, -3 * label, 0.5 * label + 1])
                said = np.where(abs(meant) == abs(meant).max(), meant, 0)
                waiting[who] = meant - said
                total += weight * said
        params += total / cohort.weight.sum()
    np.testing.assert_allclose([*state.params["a"], state.params["b"]], params, rtol=1e-6)
    residual = state.link.uplink.residual
    np.testing.assert_allclose(np.column_stack([residual["a"], residual["b"]]), waiting, rtol=1e-6)
    assert state.link.downlink == ()
    assert all(
        (info.sent.uplink > 0).tolist() == (c.weight > 0).tolist() for info, c in zip(infos, COHORTS, strict=True)
    )


def test_what_an_absent_client_remembers_stays_to_the_bit():
    codec = error_feedback(power_sgd({"w": jnp.zeros((6, 5))}, rank=1))
    params = {"w": jnp.zeros((6, 5))}

    def client(key, params, batch):
        return {"w": jax.random.normal(key, (6, 5))}, ()

    algorithm = build(client=client, codec=codec, num_clients=NUM_CLIENTS)
    state = algorithm.init(params)
    step = jax.jit(algorithm.round)
    for r, cohort in enumerate(COHORTS):
        before, (state, _) = state, step(jax.random.fold_in(KEY, r), state, cohort)
        present = set(np.asarray(cohort.id)[cohort.weight > 0].tolist())
        for who in range(NUM_CLIENTS):
            one, other = (bits(jax.tree.map(lambda x, who=who: x[who], s.link.uplink)) for s in (before, state))
            assert (one == other) == (who not in present)


def test_an_id_that_is_nobodys_remembers_nothing_and_is_heard_of_and_absent_rows_are_zeros():
    way = link(error_feedback(top_k(PARAMS, share=0.4)), None, NUM_CLIENTS, SCAN)
    start = way.init(PARAMS)
    updates = {"a": jnp.full((4, 2), 7.0).at[3].set(jnp.nan), "b": jnp.full(4, 9.0)}
    ids, weight = jnp.asarray([-1, NUM_CLIENTS, 1, 4]), jnp.asarray([1.0, 1.0, 1.0, 0.0])
    arrived, state, num_bits = jax.jit(way.up)(KEY, start, updates, ids, weight)
    rows = np.column_stack([arrived["a"], arrived["b"]])
    assert np.isnan(rows[:2]).any(axis=1).all()
    assert rows[2:].tolist() == [[0, 0, 9], [0, 0, 0]]
    assert num_bits[3] == 0
    others = np.arange(NUM_CLIENTS) != 1
    for before, after in zip(*map(jax.tree.leaves, (start.uplink, state.uplink)), strict=True):
        np.testing.assert_array_equal(after[others], before[others])


def test_clients_draw_codes_by_identity():
    """The same client says the same wherever it stands in the cohort."""
    algorithm = build(codec=qsgd(PARAMS, num_levels=1), num_clients=NUM_CLIENTS)
    step, state = jax.jit(algorithm.round), algorithm.init(PARAMS)
    one, _ = step(KEY, state, make_cohort([2, 5, 7], [1, 1, 1], [0, 3, 1]))
    other, _ = step(KEY, state, make_cohort([7, 2, 5], [1, 1, 1], [1, 0, 3]))
    named, _ = step(KEY, state, make_cohort([2, 5, 7], [1, 1, 1], [2, 4, 0]))
    close = lambda a, b: all(np.allclose(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))  # noqa: E731
    assert close(one.params, other.params)
    assert not close(one.params, named.params)


def showing_keys(like):
    """A codec that remembers the first number of the stream that it was given."""

    def encode(key, state, update):
        del state
        return update, jax.random.bits(key)

    return identity(like)._replace(init=lambda params: jnp.uint32(0), encode=encode)


def test_codes_are_drawn_from_streams_of_their_own():
    def client(key, params, batch):
        del batch
        return params, jax.random.bits(key)

    codec = showing_keys(PARAMS)
    algorithm = build(client=client, codec=codec, num_clients=NUM_CLIENTS, downlink=codec)
    state, info = jax.jit(algorithm.round)(KEY, algorithm.init(PARAMS), make_cohort([1, 2], [1, 1], [3, 0]))
    own = keys.per_client(keys.stream(KEY, "uplink"), jnp.asarray([3, 0]))
    assert state.link.uplink[jnp.asarray([3, 0])].tolist() == jax.vmap(jax.random.bits)(own).tolist()
    drawn = [*state.link.uplink[jnp.asarray([3, 0])].tolist(), int(state.link.downlink), *info.client.tolist()]
    assert len({*drawn, int(jax.random.bits(KEY))}) == 6


def test_malicious_clients_say_what_the_attack_made_of_their_update():
    def lie(key, updates, malicious):
        del key
        return jax.tree.map(lambda x: jnp.where(malicious.reshape(-1, *[1] * (x.ndim - 1)), 1000.0, x), updates)

    algorithm = build(codec=top_k(PARAMS, share=0.1), num_clients=NUM_CLIENTS, update_attack=lie)
    state, _ = jax.jit(algorithm.round)(KEY, algorithm.init(PARAMS), make_cohort([2, 6], [1, 1], [0, 1]))
    # one number arrives of each: -6 of the honest one in a[1], 1000 of the liar in its first place
    np.testing.assert_allclose([*state.params["a"], state.params["b"]], [1 + 500, -2 - 3, 0.5], rtol=1e-6)


def remembering(like):
    """A codec that says nothing, and remembers what it was given."""
    whole = identity(like)

    def encode(key, state, update):
        del key, state
        return jax.tree.map(jnp.zeros_like, update), update

    return whole._replace(init=lambda params: jax.tree.map(jnp.zeros_like, params), encode=encode)


def test_under_privacy_the_codec_is_given_the_noised_update_and_nothing_else():
    params = {"w": jnp.zeros((100, 2))}

    def loss(key, p, image, label):
        return losses.cross_entropy(lambda p, x: x.reshape(len(x), -1) @ p["w"])(key, p, image, label)

    plan = Plan("record", "zero_out", "poisson", 0.5, 3, 1.0, 0.0, 8.0, 1e-5)
    clipped = clipped_grad(loss, clip_norm=1.0, microbatch_size=4)
    client = local_update(private_grad(clipped, plan, num_records=8), optax.sgd(1.0), skip_empty=False)
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(2, 1, 4, 100, 1, 1)).astype(np.float32)
    label, mask = rng.integers(0, 2, (2, 1, 4)).astype(np.int32), np.ones((2, 1, 4), bool)
    mask[1] = False  # a client that drew nobody: its update is noise alone
    batch, key = Batch(image, label, mask), jax.random.key(3)
    cohort = Cohort(np.int32([3, 1]), np.float32([1, 1]), np.zeros(2, bool), batch)
    algorithm = build(client=client, codec=remembering(params), num_clients=NUM_CLIENTS)
    state, _ = jax.jit(algorithm.round)(key, algorithm.init(params), cohort)
    assert (state.params["w"] == 0).all()  # the server hears of codes alone
    own_keys = keys.per_client(keys.stream(key, "client"), cohort.id)
    expected, _ = jax.jit(jax.vmap(client, (0, None, 0)))(own_keys, params, batch)
    np.testing.assert_allclose(state.link.uplink["w"][cohort.id], expected["w"], rtol=1e-4, atol=1e-6)
    # 200 numbers of deviation clip norm over expected records: 5 standard errors, false failures below 1e-6
    assert abs(float(jnp.std(state.link.uplink["w"][1])) / (1.0 / (0.5 * 8)) - 1) < 5 / np.sqrt(2 * 200)


def test_the_server_moves_by_what_clients_decode_and_says_the_rest_later():
    cohorts = [make_cohort([2], [1], [0]), make_cohort([1], [1], [0])]
    state, infos = play(build(downlink=error_feedback(top_k(PARAMS, share=0.4))), cohorts)
    # round 1 means [2, -6, 2], says -6; round 2 means [1, -3, 1.5] + [2, 0, 2], says 3.5
    np.testing.assert_allclose([*state.params["a"], state.params["b"]], [1, -2 - 6, 0.5 + 3.5], rtol=1e-6)
    residual = state.link.downlink.residual
    np.testing.assert_allclose([*residual["a"], residual["b"]], [3, -3, 0], rtol=1e-6)
    assert infos[0].sent.uplink == ()
    assert int(infos[0].sent.downlink) == 8 * (4 + 2)


def test_a_coded_run_resumed_from_disk_equals_the_unbroken_one(tmp_path):
    codec = error_feedback(top_k(PARAMS, share=0.4))
    algorithm = build(codec=codec, num_clients=NUM_CLIENTS, downlink=codec)
    start = algorithm.init(PARAMS)
    whole = {done: bits(state) for done, state, _ in rounds(algorithm, start, COHORTS.__getitem__, KEY, 3)}
    for done, state, _ in rounds(algorithm, start, COHORTS.__getitem__, KEY, 1):
        save(tmp_path, done, state)
    step, found = latest(tmp_path, start)
    assert isinstance(found.link, LinkState)
    assert bits(found) == whole[step]
    assert [bits(state) for _, state, _ in rounds(algorithm, found, COHORTS.__getitem__, KEY, 3)] == [
        whole[2],
        whole[3],
    ]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"codec": identity(PARAMS)}, "codec and num_clients is 'codec alone'"),
        ({"num_clients": 5}, "codec and num_clients is 'num_clients alone'"),
        ({"codec": identity(PARAMS), "num_clients": 0}, "num_clients is 0"),
    ],
)
def test_a_codec_needs_to_know_how_many_clients_there_are(settings, names):
    with pytest.raises(ValueError, match=f"^{names}: must be "):
        build(**settings)


def test_a_codec_for_another_model_is_refused():
    algorithm = build(codec=top_k({**PARAMS, "a": jnp.zeros(3)}, share=0.4), num_clients=NUM_CLIENTS)
    with pytest.raises((AssertionError, ValueError, TypeError)):
        algorithm.round(KEY, algorithm.init(PARAMS), COHORTS[0])
