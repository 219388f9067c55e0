"""The client map: five backends, one result, on eight virtual devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import attacks, defenses, federated, losses, ops, privacy
from fedrobust.federated import BACKENDS, default_backend, map_clients
from fedrobust.types import Batch, Cohort

KEY = jax.random.key(0)
SHAPE = (4, 4, 1)
NUM_CLIENTS, ABSENT = 5, 2


def gradient_at(shared, client):
    """d/dp sum(p * x): the client's own x, unless somebody sums it over clients."""
    return jax.grad(lambda p: jnp.sum(p * client))(shared)


SPREADS = [(b, k, n) for b in ("pmap", "shard_map") for k, n in [(8, None), (5, None), (5, 2), (1, 8), (9, 3)]]
ALONE = [(b, 5, None) for b in BACKENDS if b not in ("pmap", "shard_map")]


@pytest.mark.parametrize(("backend", "num_clients", "num_devices"), SPREADS + ALONE)
def test_gradients_of_shared_parameters_are_not_summed_over_clients(backend, num_clients, num_devices):
    clients = np.arange(3 * num_clients, dtype=np.float32).reshape(num_clients, 3)
    mapped = jax.jit(map_clients(gradient_at, backend=backend, num_devices=num_devices))
    np.testing.assert_array_equal(mapped(np.ones(3, np.float32), clients), clients)


rng = np.random.default_rng(1)
PARAMS = {"kernel": rng.normal(size=(3, 3, 1, 4)).astype(np.float32), "w": rng.normal(size=(4, 3)).astype(np.float32)}


def apply(params, image):
    return jnp.mean(jax.nn.relu(ops.conv(image, params["kernel"])), axis=(1, 2)) @ params["w"]


@functools.cache
def private_robust_round(backend):
    """DP-SGD on adversarial samples in every client, averaged: the round of the study."""
    attack = attacks.pgd(norm="linf", eps=0.1, step_size=0.05, num_steps=1, random_start=True, keep_best=False)
    loss = defenses.adversarial_loss(losses.cross_entropy(apply), apply, attack, clean_share=0.0)
    clipped = privacy.clipped_grad(loss, clip_norm=1.0)
    plan = privacy.Plan("record", "add_or_remove_one", "poisson", 0.5, 10, 0.5, 0.0, 8.0, 1e-5)
    gradient = privacy.private_grad(clipped, plan, num_records=6)
    algorithm = federated.fedavg(
        lambda round: federated.local_update(gradient, optax.sgd(1.0), skip_empty=False),
        defenses.mean(),
        optax.sgd(0.5, momentum=0.9),
        functools.partial(map_clients, backend=backend),
    )
    return algorithm._replace(round=jax.jit(algorithm.round))


def cohort(order=range(NUM_CLIENTS)):
    rng = np.random.default_rng(0)
    image = rng.uniform(size=(NUM_CLIENTS, 1, 4, *SHAPE)).astype(np.float32)
    mask = rng.random((NUM_CLIENTS, 1, 4)) < 0.7
    label = rng.integers(0, 3, mask.shape).astype(np.int32)
    weight = np.array([1, 2, 0, 0.5, 1], np.float32)
    image[~mask] = np.nan
    image[ABSENT] = np.nan
    whole = Cohort(
        np.arange(10, 10 + NUM_CLIENTS, dtype=np.int32), weight, np.zeros(5, bool), Batch(image, label, mask)
    )
    return jax.tree.map(lambda x: x[list(order)], whole)


@functools.cache
def after_a_round(backend):
    algorithm = private_robust_round(backend)
    return algorithm.round(KEY, algorithm.init(PARAMS), cohort())


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_on_a_private_adversarial_round(backend):
    state, info = after_a_round(backend)
    expected, expected_info = after_a_round("vmap")
    for x, y in zip(jax.tree.leaves((state, info)), jax.tree.leaves((expected, expected_info)), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    assert info.num_present == NUM_CLIENTS - 1
    assert not np.any(info.client.norm[ABSENT])
    assert max(abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (state.params, PARAMS)), strict=True)) > 1e-3


def test_the_order_of_a_cohort_does_not_matter():
    order = [3, 0, 4, 2, 1]
    algorithm = private_robust_round("scan")
    state, info = algorithm.round(KEY, algorithm.init(PARAMS), cohort(order))
    expected, expected_info = after_a_round("scan")
    for x, y in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(info.client.norm, expected_info.client.norm[jnp.asarray(order)])


def test_backends_hand_every_client_its_own_row_of_a_nested_tree():
    def fn(shared, client):
        return {"sum": client["x"].sum() + shared["a"], "key": jax.random.bits(client["key"])}

    clients = {"x": jnp.arange(10.0).reshape(5, 2), "key": jax.random.split(KEY, 5)}
    for backend in BACKENDS:
        result = map_clients(fn, backend=backend)({"a": 0.5}, clients)
        assert result["sum"].tolist() == [1.5, 5.5, 9.5, 13.5, 17.5]
        assert result["key"].tolist() == jax.vmap(jax.random.bits)(clients["key"]).tolist()


def test_the_default_backend_is_one_of_them():
    assert default_backend() == "scan"  # the tests run on CPU devices
    np.testing.assert_array_equal(map_clients(gradient_at)(np.ones(2), np.eye(2)), np.eye(2))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("backend", {"backend": "threads"}),
        *(("num_devices", {"backend": b, "num_devices": n}) for b in ("pmap", "shard_map") for n in (0, -1, 9)),
    ],
)
def test_a_bad_setting_of_the_map_is_named(name, settings):
    with pytest.raises(ValueError, match=f"^{name} is "):
        map_clients(gradient_at, **settings)


@pytest.mark.parametrize(("count", "expected"), [(1, "vmap"), (4, "shard_map")])
def test_accelerators_take_all_clients_at_once_and_share_them_where_there_are_several(count, expected, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    monkeypatch.setattr("jax.device_count", lambda: count)
    assert default_backend() == expected
