"""Every row of every registry obeys the contract of its type. A new row is tested the day it is registered.

A row that cannot be built without settings gets them in `SETTINGS`; nothing else here names a row.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import models, trees
from fedrobust.attacks import SEARCHES, UPDATE_ATTACKS, run
from fedrobust.compression import SCORES, find_channels, kept_units, masks
from fedrobust.compression.codecs import CODECS
from fedrobust.data import PARTITIONS
from fedrobust.defenses import AGGREGATORS
from fedrobust.federated import BACKENDS, map_clients
from fedrobust.models import BUILDERS, SPECS

SETTINGS = {
    "trimmed_mean": {"trim_fraction": 0.25},
    "dirichlet": {"alpha": 0.3},
    "quantity_skew": {"alpha": 0.3},
    "sign_flip": {"scale": 3.0},
    "auto_pgd": {"norm": "linf", "num_steps": 6, "random_start": True, "objective": "margin"},
    "qsgd": {"num_levels": 2},
    "power_sgd": {"rank": 1},
    "random_k": {"share": 0.3, "unbiased": True},
    "top_k": {"share": 0.3},
    "fab": {"norm": "linf", "num_steps": 6, "num_targets": 2},
    "momentum_pgd": {"norm": "linf", "step_size": 0.02, "num_steps": 6, "momentum": 0.5, "random_start": True},
    "random_noise": {"norm": "linf", "num_queries": 6},
    "rays": {"num_queries": 30, "tolerance": 1e-3},
    "square": {"norm": "linf", "num_queries": 30, "p_init": 0.8},
}
KEY = jax.random.key(0)
NUM_CLIENTS = 6


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, jnp.asarray(x).dtype), tree)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def updates(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(NUM_CLIENTS, 2, 3)).astype(np.float32),
        "b": rng.normal(size=(NUM_CLIENTS,)).astype(np.float32),
    }


WEIGHT = np.array([1, 0, 2, 1, 0, 0.5], np.float32)
PARAMS = jax.tree.map(lambda x: x[0], updates())


@functools.cache
def aggregator(name):
    built = AGGREGATORS[name](**SETTINGS.get(name, {}))
    return built._replace(apply=jax.jit(built.apply))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_gives_one_update_like_the_parameters_and_keeps_the_kind_of_its_state(name):
    rule = aggregator(name)
    state = rule.init(PARAMS)
    update, new, _ = rule.apply(KEY, state, updates(), WEIGHT)
    assert shapes(update) == shapes(PARAMS)
    assert shapes(new) == shapes(state)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_is_a_pure_function(name):
    rule = aggregator(name)
    first, again = (rule.apply(KEY, rule.init(PARAMS), updates(), WEIGHT) for _ in range(2))
    assert bits(first) == bits(again)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_never_sees_absent_clients(name):
    rule = aggregator(name)
    results = []
    for junk in (0, np.nan, np.inf, -1e38):
        absent = jax.tree.map(
            lambda x, junk=junk: np.where((WEIGHT == 0).reshape(-1, *[1] * (x.ndim - 1)), junk, x), updates()
        )
        absent = jax.tree.map(lambda x: x.astype(np.float32), absent)
        results.append(bits(rule.apply(KEY, rule.init(PARAMS), absent, WEIGHT)))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_does_not_mind_the_order_of_clients(name):
    rule, order = aggregator(name), np.array([4, 2, 0, 5, 1, 3])
    shuffled = jax.tree.map(lambda x: x[order], updates())
    one, other = (
        rule.apply(KEY, rule.init(PARAMS), u, w)[0] for u, w in ((updates(), WEIGHT), (shuffled, WEIGHT[order]))
    )
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_of_equal_updates_gives_that_update_and_of_nobody_zero(name):
    rule = aggregator(name)
    same = jax.tree.map(lambda x: np.repeat(x[:1], NUM_CLIENTS, 0), updates())
    for weight, expected in ((WEIGHT, PARAMS), (0 * WEIGHT, jax.tree.map(np.zeros_like, PARAMS))):
        update = rule.apply(KEY, rule.init(PARAMS), same, weight)[0]
        for x, y in zip(*map(jax.tree.leaves, (update, expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_clients", [1, 7])
@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_gives_every_example_to_one_client_and_repeats_itself(name, num_clients):
    label = np.random.default_rng(1).integers(0, 4, 90)
    first, again = (
        PARTITIONS[name](np.random.default_rng(5), label, num_clients, min_size=3, **SETTINGS.get(name, {}))
        for _ in range(2)
    )
    assert len(first) == num_clients
    assert min(map(len, first)) >= 3
    assert sorted(np.concatenate(first).tolist()) == list(range(90))
    assert [part.tolist() for part in first] == [part.tolist() for part in again]
    other = PARTITIONS[name](np.random.default_rng(6), label, num_clients, min_size=3, **SETTINGS.get(name, {}))
    assert num_clients == 1 or [part.tolist() for part in first] != [part.tolist() for part in other]


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_refuses_more_clients_than_examples(name):
    with pytest.raises(ValueError, match=r"^num_clients is 11: must be <= the number of examples, 10$"):
        PARTITIONS[name](np.random.default_rng(0), np.arange(10) % 2, 11, min_size=1, **SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", UPDATE_ATTACKS)
def test_an_update_attack_changes_malicious_rows_alone_and_is_pure(name):
    attack = UPDATE_ATTACKS[name](**SETTINGS.get(name, {}))
    sent, malicious = updates(), np.array([0, 1, 0, 0, 1, 0], bool)
    sent["w"][0, 0, 0], sent["b"][2] = np.nan, -0.0
    received, again = (jax.jit(attack)(KEY, sent, malicious) for _ in range(2))
    assert shapes(received) == shapes(sent)
    assert bits(received) == bits(again)
    honest = [jax.tree.map(lambda x: np.asarray(x)[~malicious], tree) for tree in (sent, received)]
    assert bits(honest[0]) == bits(honest[1])
    for before, after in zip(*map(jax.tree.leaves, (sent, received)), strict=True):
        assert (np.asarray(after)[malicious] != before[malicious]).all()
    assert bits(attack(KEY, sent, np.zeros(NUM_CLIENTS, bool))) == bits(sent)


@functools.cache
def search(name):
    """`(eps, 0 or NaN added to the logits) -> Found` of a small net's own predictions, the last image left alone."""
    rng = np.random.default_rng(3)
    first, last = (rng.normal(size=size).astype(np.float32) for size in ((12, 8), (8, 3)))
    image = rng.uniform(size=(6, 3, 4, 1)).astype(np.float32)

    def logits_fn(x):
        return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ first) @ last

    label, todo = logits_fn(image).argmax(1), np.arange(6) < 5

    @jax.jit
    def attack(eps, junk):
        found = run(SEARCHES[name](eps=eps, **SETTINGS[name]), num_slots=4)
        return found(KEY, lambda x: logits_fn(x) + junk, image, label, todo)

    return attack, logits_fn, image, np.asarray(label)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_counts_only_what_is_wrong_inside_the_ball_and_is_pure(name):
    attack, logits_fn, image, label = search(name)
    first, again = (attack(0.2, 0.0) for _ in range(2))
    assert bits(first) == bits(again)
    wrong = np.asarray(first.wrong)
    assert wrong.any()
    assert (np.asarray(logits_fn(first.image).argmax(1)) != label).tolist() == wrong.tolist()
    assert (np.abs(first.image - image) <= 0.2 + 1e-6).all()
    assert first.image.min() >= 0
    assert first.image.max() <= 1
    assert (first.image[5] == image[5]).all()
    assert first.num_queries[5] == 0


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_finds_nothing_at_radius_zero_and_leaves_images_where_logits_are_nan(name):
    attack, _, image, _ = search(name)
    still = attack(0.0, 0.0)
    assert not still.wrong.any()
    np.testing.assert_array_equal(still.image, image)
    lost = attack(0.2, np.nan)  # wrong before anything is changed, but for the one that is not to be attacked
    assert lost.wrong.tolist() == [True] * 5 + [False]
    np.testing.assert_array_equal(lost.image, image)


SENT = {
    "w": np.random.default_rng(4).normal(size=(NUM_CLIENTS, 6, 5)).astype(np.float32),
    "b": np.random.default_rng(5).normal(size=(NUM_CLIENTS, 3)).astype(np.float32),
}
MODEL = jax.tree.map(lambda x: x[0], SENT)


@functools.cache
def codec(name):
    built = CODECS[name](MODEL, **SETTINGS.get(name, {}))
    return built._replace(encode=jax.jit(built.encode), decode=jax.jit(built.decode), num_bits=jax.jit(built.num_bits))


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_pure_and_keeps_the_shapes_of_state_code_and_update(name):
    built = codec(name)
    state = built.init(MODEL)
    (code, new), again = (built.encode(KEY, state, MODEL) for _ in range(2))
    assert bits((code, new)) == bits(again)
    assert shapes(new) == shapes(state)
    assert shapes(code) == shapes(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), built.shape))
    assert shapes(built.decode(code)) == shapes(MODEL)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(built.decode(code)))


@pytest.mark.parametrize("name", CODECS)
def test_a_code_goes_through_its_bytes_to_the_bit_and_they_are_what_is_counted(name):
    built = codec(name)
    for update in (MODEL, trees.zeros_like(MODEL), jax.tree.map(lambda x: -1e20 * x, MODEL)):
        code = built.encode(KEY, built.init(MODEL), update)[0]
        data = built.serialize(code)
        assert built.num_bits(code) == 8 * len(data)
        back = built.deserialize(data)
        assert jax.tree.structure(back) == jax.tree.structure(code)
        assert (shapes(back), bits(back)) == (shapes(code), bits(code))


@pytest.mark.parametrize("name", CODECS)
def test_bytes_cut_off_or_too_many_are_no_code(name):
    built = codec(name)
    data = built.serialize(built.encode(KEY, built.init(MODEL), MODEL)[0])
    for wrong in (b"", data[:-1], data[: len(data) // 2], data + b"\0"):
        with pytest.raises(ValueError, match=r"^[^\n]*code[^\n]*$"):
            built.deserialize(wrong)


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_of_nothing_says_nothing(name):
    built = codec(name)
    for x in jax.tree.leaves(built.decode(built.encode(KEY, built.init(MODEL), trees.zeros_like(MODEL))[0])):
        assert (x == 0).all()


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_maps_over_clients(name):
    built = codec(name)
    key, state = jax.random.split(KEY, 2), built.init(MODEL)

    def through(key, update):
        code, new = built.encode(key, state, update)
        return built.decode(code), new, built.num_bits(code)

    sent = jax.tree.map(lambda x: x[:2], SENT)
    mapped = jax.jit(jax.vmap(through))(key, sent)
    for row in range(2):
        one, alone = (jax.tree.map(lambda x, row=row: x[row], tree) for tree in (mapped, sent))
        for x, y in zip(*map(jax.tree.leaves, (one, through(key[row], alone))), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_maps_a_pure_function_of_one_client_over_all(backend):
    def fn(shared, client):
        return {"dot": client["x"] @ shared, "twice": client["n"] * 2}

    clients = {"x": updates()["w"], "n": np.arange(NUM_CLIENTS, dtype=np.int32)}
    mapped = jax.jit(map_clients(fn, backend=backend))
    first, again = (mapped(np.ones(3, np.float32), clients) for _ in range(2))
    assert bits(first) == bits(again)
    assert shapes(first) == {"dot": ((NUM_CLIENTS, 2), jnp.float32), "twice": ((NUM_CLIENTS,), jnp.int32)}
    np.testing.assert_allclose(first["dot"], clients["x"].sum(axis=2), rtol=1e-5, atol=1e-6)
    assert first["twice"].tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("name", SCORES)
def test_a_score_ranks_every_unit_is_pure_and_follows_the_units_when_they_change_places(name):
    def apply(p, x):
        return jax.nn.relu(x.reshape(len(x), -1) @ p["a"] + p["b"]) @ p["c"]

    rng, order = np.random.default_rng(2), np.array([3, 0, 4, 1, 2])
    params = {"a": rng.normal(size=(4, 5)), "b": rng.normal(size=5), "c": rng.normal(size=(5, 3))}
    channels = find_channels(apply, params, jnp.zeros((1, 2, 2, 1)))
    first, again = (SCORES[name](channels, params, KEY) for _ in range(2))
    assert (first.shape, first.dtype) == ((5,), np.float64)
    assert np.isfinite(first).all()
    assert bits(first) == bits(again)
    keep = kept_units(channels, masks(channels, params, sparsity=0.4, score=name, key=KEY))
    assert keep.sum() == 3
    assert first[~keep].max() <= first[keep].min()
    if name != "random":
        moved = {"a": params["a"][:, order], "b": params["b"][order], "c": params["c"][order]}
        np.testing.assert_allclose(SCORES[name](channels, moved, KEY), first[order], rtol=1e-9)


SHAPE = (8, 8, 2)


@functools.cache
def model(name, builder):
    return models.build(name, builder=builder, image_shape=SHAPE, num_classes=3, width=2)


@functools.cache
def made(name, builder):
    """The model's parameters and its compiled function."""
    built = model(name, builder)
    return built.init(KEY, jnp.zeros((1, *SHAPE))), jax.jit(built.apply)


@pytest.mark.parametrize("name", SPECS)
def test_builders_give_equal_trees_and_float32_logits_for_any_batch(name):
    trees = []
    for builder in BUILDERS:
        built = model(name, builder)
        params = jax.eval_shape(built.init, KEY, jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32))
        for size in (1, 5):
            logits = jax.eval_shape(built.apply, params, jax.ShapeDtypeStruct((size, *SHAPE), jnp.float32))
            assert (logits.shape, logits.dtype) == ((size, 3), jnp.float32)
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        trees.append(shapes_of(params))
    assert all(tree == trees[0] for tree in trees)


def shapes_of(params):
    return {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("name", SPECS)
def test_a_model_computes_every_row_from_its_own_image_and_is_pure(name, builder):
    params, apply = made(name, builder)
    image = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype(np.float32)
    other = image.copy()
    other[1] = np.nan
    first, again, neighbour = (apply(params, x) for x in (image, image, other))
    assert bits(first) == bits(again)
    assert bits(first[0]) == bits(neighbour[0])
    assert np.isfinite(first).all() and (first[0] != first[1]).any()
    assert bits(model(name, builder).init(KEY, jnp.zeros((1, *SHAPE)))) == bits(params)
