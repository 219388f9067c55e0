"""Laws of a client's gradient and of its local training, against NumPy float64 and a loop written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import losses
from fedrobust.federated import local_update, mean_grad
from fedrobust.types import Batch

KEY = jax.random.key(0)
SIZE = 4


def apply(params, image):
    return image.reshape(image.shape[0], -1) @ params["w"] + params["b"]


GRAD = mean_grad(losses.cross_entropy(apply))
RUN = jax.jit(GRAD)
rng = np.random.default_rng(0)
PARAMS = {"w": rng.normal(size=(4, 3)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}


def make_batch(seed, mask, shape=(SIZE,)):
    rng = np.random.default_rng(seed)
    image = rng.uniform(size=(*shape, 2, 2, 1)).astype(np.float32)
    return Batch(image, rng.integers(0, 3, shape).astype(np.int32), np.asarray(mask, bool))


def oracle(params, batch):
    """Gradient and value of the mean cross-entropy over the real examples, in float64."""
    x, y = (np.asarray(a)[np.asarray(batch.mask)] for a in (batch.image.reshape(SIZE, -1), batch.label))
    if not len(x):
        return {"w": np.zeros((4, 3)), "b": np.zeros(3)}, 0.0
    logits = x.astype(np.float64) @ params["w"] + params["b"]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = (p - np.eye(3)[y]) / len(x)
    return {"w": x.T @ error, "b": error.sum(axis=0)}, -np.log(p[np.arange(len(x)), y]).mean()


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def bits(tree):
    return [np.asarray(x).view(np.int32).tolist() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("mask", [[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
def test_mean_gradient_equals_numpy_over_the_real_examples(mask):
    batch = make_batch(1, mask)
    gradient, info = RUN(KEY, PARAMS, batch)
    expected, value = oracle(PARAMS, batch)
    close(gradient, expected)
    np.testing.assert_allclose(info.loss, value, rtol=1e-5)


def test_padding_of_the_mean_gradient_is_nothing_whatever_it_holds():
    batch, results = make_batch(2, [1, 0, 1, 0]), []
    for junk, label in ((0, 0), (np.nan, -7), (np.inf, 99)):
        image, labels = batch.image.copy(), batch.label.copy()
        image[[1, 3]], labels[[1, 3]] = junk, label
        results.append(bits(RUN(KEY, PARAMS, Batch(image, labels, batch.mask))))
    assert results[0] == results[1] == results[2]


def test_an_empty_batch_gives_an_exactly_zero_mean_gradient():
    batch = make_batch(3, np.zeros(SIZE))._replace(image=np.full((SIZE, 2, 2, 1), np.nan, np.float32))
    gradient, info = RUN(KEY, PARAMS, batch)
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))
    assert info.loss == 0


STEPS = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], bool)


def by_hand(skip_empty, momentum=0.9, rate=0.5):
    """Heavy-ball SGD in float64. An empty batch has a zero gradient, but momentum still moves the parameters."""
    batches = make_batch(4, STEPS, STEPS.shape)
    params = {k: v.astype(np.float64) for k, v in PARAMS.items()}
    velocity = {k: np.zeros_like(v) for k, v in params.items()}
    values = []
    for s in range(len(STEPS)):
        gradient, value = oracle(params, Batch(*(x[s] for x in batches)))
        values.append(value)
        if skip_empty and not STEPS[s].any():
            continue
        velocity = {k: momentum * velocity[k] + gradient[k] for k in params}
        params = {k: params[k] - rate * velocity[k] for k in params}
    return {k: params[k] - PARAMS[k] for k in params}, values


@pytest.mark.parametrize("skip_empty", [True, False])
def test_local_training_equals_a_loop_by_hand(skip_empty):
    update = jax.jit(local_update(GRAD, optax.sgd(0.5, momentum=0.9), skip_empty=skip_empty))
    change, info = update(KEY, PARAMS, make_batch(4, STEPS, STEPS.shape))
    expected, values = by_hand(skip_empty)
    close(change, expected)
    np.testing.assert_allclose(info.loss, values, rtol=1e-5)


def test_skipping_and_not_skipping_empty_batches_differ():
    """So that the test above can tell them apart."""
    assert abs(by_hand(True)[0]["w"] - by_hand(False)[0]["w"]).max() > 0.01


def test_a_skipped_batch_draws_and_moves_nothing_and_a_counted_one_does():
    def noise(key, params, batch):
        del batch
        return {"w": jax.random.normal(key, params["w"].shape), "b": jnp.zeros(3)}, ()

    batches = make_batch(5, np.zeros(STEPS.shape), STEPS.shape)
    skipped, counted = (
        local_update(noise, optax.sgd(1.0), skip_empty=s)(KEY, PARAMS, batches)[0] for s in (True, False)
    )
    assert not any(np.any(x) for x in jax.tree.leaves(skipped))
    steps = [jax.random.normal(jax.random.fold_in(KEY, s), (4, 3)) for s in range(len(STEPS))]
    np.testing.assert_allclose(counted["w"], -np.sum(steps, axis=0), rtol=1e-4, atol=1e-5)


def test_weights_decay_from_where_local_training_stands():
    """With no gradient each step leaves 0.9 of the parameters."""
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))
    still = local_update(
        lambda key, params, batch: (jax.tree.map(jnp.zeros_like, params), ()), optimizer, skip_empty=False
    )
    change, _ = still(KEY, PARAMS, make_batch(6, STEPS, STEPS.shape))
    close(change, {name: (0.9 ** len(STEPS) - 1) * x for name, x in PARAMS.items()})
