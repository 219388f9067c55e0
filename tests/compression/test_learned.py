import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import attacks, defenses, losses, ops, privacy, trees
from fedrobust.compression import find_channels, initial_scores, kept_units, loss_of_scores, masks, num_kept
from fedrobust.compression.learned import gated_places
from fedrobust.types import Batch

KEY = jax.random.key(0)
ONE = jax.ShapeDtypeStruct((1, 2, 2, 2), jnp.float32)
IMAGE = jax.random.uniform(jax.random.key(3), (6, 2, 2, 2))
LABEL = jnp.arange(6) % 3


def apply(p, x):
    x = jnp.tanh(x.reshape(x.shape[0], -1) @ p["a"] + p["b"])
    return jnp.tanh(x @ p["c"]) @ p["d"]


SHAPES = {"a": (8, 6), "b": (6,), "c": (6, 4), "d": (4, 3)}
PARAMS = {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate(SHAPES.items())
}
CHANNELS = find_channels(apply, PARAMS, ONE)
LOSS = losses.cross_entropy(apply)
FIRST, SECOND = CHANNELS.unit[0][1], CHANNELS.unit[2][1]


def test_learning_starts_at_the_norms():
    found = np.asarray(initial_scores(CHANNELS, PARAMS))
    by_hand = np.sqrt((PARAMS["a"] ** 2).sum(0) + PARAMS["b"] ** 2 + (PARAMS["c"] ** 2).sum(1))
    np.testing.assert_allclose(found[FIRST], by_hand / by_hand.max(), rtol=1e-5)
    assert found[SECOND].max() == 1
    assert (initial_scores(CHANNELS, trees.zeros_like(PARAMS)) == 0).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_the_loss_is_that_of_the_masked_model(sparsity):
    loss = loss_of_scores(LOSS, apply, CHANNELS, PARAMS, sparsity=sparsity)
    for scores in (initial_scores(CHANNELS, PARAMS), jax.random.normal(KEY, (10,)), jnp.zeros(10)):
        chosen = masks(CHANNELS, PARAMS, sparsity=sparsity, score=scores)
        found = jax.jit(loss)(KEY, scores, IMAGE, LABEL)
        np.testing.assert_allclose(found, LOSS(KEY, trees.multiply(PARAMS, chosen), IMAGE, LABEL), rtol=1e-4, atol=1e-6)


def test_a_score_gets_the_gradient_of_its_units_factor():
    """Against the same net with a factor behind every unit, written out; removed units have one, too."""
    scores = jax.random.normal(KEY, (10,))
    keep = kept_units(CHANNELS, masks(CHANNELS, PARAMS, sparsity=0.5, score=scores)).astype(np.float32)

    def gated(gates):
        first, second = gates[FIRST], gates[SECOND]
        p = PARAMS
        x = jnp.tanh(IMAGE.reshape(6, 8) @ p["a"] + p["b"]) * first
        logits = (jnp.tanh(x @ p["c"]) * second) @ p["d"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, LABEL))

    loss = loss_of_scores(LOSS, apply, CHANNELS, PARAMS, sparsity=0.5)
    found = jax.jit(jax.grad(lambda s: jnp.mean(loss(KEY, s, IMAGE, LABEL))))(scores)
    np.testing.assert_allclose(found, jax.jit(jax.grad(gated))(keep), rtol=1e-4, atol=1e-6)
    assert (np.asarray(found) != 0).all()


def test_learned_scores_come_near_the_best_of_all_masks_on_the_adversarial_loss():
    """Of all 120 ways to keep 3 of 6 and 2 of 4 units, where half of the first layer is noise of a large norm."""
    rng = np.random.default_rng(5)
    signal = rng.normal(size=(8, 3))
    params = {
        "a": np.concatenate([signal, 3 * rng.normal(size=(8, 3))], 1).astype(np.float32),
        "b": np.zeros(6, np.float32),
        "c": np.concatenate([np.eye(3, 4), 0.1 * rng.normal(size=(3, 4))]).astype(np.float32),
        "d": 4 * np.eye(4, 3, dtype=np.float32),
    }
    image = jnp.asarray(rng.uniform(size=(60, 2, 2, 2)), jnp.float32)
    label = jnp.argmax(image.reshape(60, 8) @ signal, -1)
    adversarial = defenses.adversarial_loss(LOSS, apply, attacks.fgsm(norm="linf", eps=0.02), clean_share=0.0)
    loss = loss_of_scores(adversarial, apply, CHANNELS, params, sparsity=0.5)
    optimizer = optax.adam(0.05)

    def mean(scores):
        return jnp.mean(loss(KEY, scores, image, label))

    @jax.jit
    def learn(scores):
        def step(carry, _):
            scores, state = carry
            updates, state = optimizer.update(jax.grad(mean)(scores), state)
            return (optax.apply_updates(scores, updates), state), None

        return jax.lax.scan(step, (scores, optimizer.init(scores)), length=100)[0][0]

    every = np.zeros((120, 10), np.float32)
    chosen = itertools.product(itertools.combinations(FIRST, 3), itertools.combinations(SECOND, 2))
    for row, (first, second) in zip(every, chosen, strict=True):
        row[[*first, *second]] = 1
    values = np.sort(jax.jit(jax.vmap(mean))(every))
    start = initial_scores(CHANNELS, params)
    assert mean(start) > values[8]
    assert mean(learn(start)) < values[4]


def test_factors_stand_where_units_are_read():
    assert gated_places(apply, CHANNELS) == [[False, False], [False], [True, False], [True, False]]

    def channels_first(p, x):
        x = jnp.transpose(x, (0, 3, 1, 2))
        x = jax.lax.conv(x, p["a"], (1, 1), "SAME") + p["b"][:, None, None]
        return jnp.tanh(jax.lax.conv(jnp.tanh(x), p["c"], (1, 1), "SAME")).mean((2, 3)) @ p["d"]

    shapes = {"a": (6, 2, 3, 3), "b": (6,), "c": (4, 6, 1, 1), "d": (4, 3)}
    channels = find_channels(channels_first, {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}, ONE)
    c_reads = [False, True, False, False]
    assert gated_places(channels_first, channels) == [[False] * 4, [False], c_reads, [True, False]]


def test_factors_stand_for_removal_in_a_network_with_norms_and_residual_sums():
    def normed(p, x):
        x = ops.group_norm(ops.conv(x, p["stem"]), 4, p["scale"], p["bias"])
        return (x + jax.nn.gelu(ops.conv(x, p["body"]))).mean((1, 2)) @ p["head"]

    shapes = {"stem": (1, 1, 2, 8), "scale": (8,), "bias": (8,), "body": (1, 1, 8, 8), "head": (8, 3)}
    params = {k: np.random.default_rng(i).normal(size=v).astype(np.float32) for i, (k, v) in enumerate(shapes.items())}
    channels = find_channels(normed, params, ONE)
    loss = losses.cross_entropy(normed)
    scores = jax.random.normal(KEY, (4,))
    chosen = masks(channels, params, sparsity=0.5, score=scores)
    found = loss_of_scores(loss, normed, channels, params, sparsity=0.5)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: jnp.sum(found(KEY, s, IMAGE, LABEL))))(scores)
    np.testing.assert_allclose(value, jnp.sum(loss(KEY, trees.multiply(params, chosen), IMAGE, LABEL)), rtol=1e-4)
    assert (jnp.abs(gradient) > 1e-3).all()


def test_scores_are_clipped_per_example_like_any_parameters():
    loss = loss_of_scores(LOSS, apply, CHANNELS, PARAMS, sparsity=0.5)
    scores = initial_scores(CHANNELS, PARAMS)
    clip_norm = 0.05
    clipped = privacy.clipped_grad(loss, clip_norm=clip_norm)
    found, info = jax.jit(lambda s: clipped(KEY, s, Batch(IMAGE, LABEL, jnp.ones(6, bool))))(scores)
    one = jax.jit(jax.grad(lambda s, x, y: loss(KEY, s, x[None], y[None])[0]))
    by_hand = np.zeros(10)
    for x, y in zip(IMAGE, LABEL, strict=True):
        gradient = np.asarray(one(scores, x, y), np.float64)
        by_hand += gradient * min(1, clip_norm / np.linalg.norm(gradient))
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-6)
    assert (info.norm > clip_norm).any()
    assert clipped.sensitivity("add_or_remove_one") == clip_norm
    assert num_kept(CHANNELS, masks(CHANNELS, PARAMS, sparsity=0.5, score=scores - found)).min() >= 2


def test_bad_settings_are_named_in_one_line():
    with pytest.raises(ValueError, match=r"^sparsity is 1.0: must be in \[0, 1\)$"):
        loss_of_scores(LOSS, apply, CHANNELS, PARAMS, sparsity=1.0)
    other = {**PARAMS, "b": np.zeros(7, np.float32)}
    with pytest.raises(ValueError, match=r"^params is 'a tree of 4 leaves': must be of .*$"):
        loss_of_scores(LOSS, apply, CHANNELS, other, sparsity=0.5)
    with pytest.raises(ValueError, match=r"^params is 'a tree of 4 leaves': must be of .*$"):
        initial_scores(CHANNELS, other)
