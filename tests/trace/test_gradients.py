"""What cuts a gradient is named, and the straight-through twin has the same values and a slope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedrobust import models
from fedrobust.trace import interruptions, straight_through

IMAGE = np.random.default_rng(0).uniform(size=(2, 4, 4, 1)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)


def dense(x):
    return x.reshape(len(x), -1) @ WEIGHT


def on_integers(x):
    steps = jnp.round(x * 50).astype(jnp.int8).reshape(len(x), -1)
    weight = jnp.round(WEIGHT * 20).astype(jnp.int8)
    total = lax.dot_general(steps, weight, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (total + 3).astype(jnp.float32) / 1000


def noised(x, number):
    """Draws bits, casts a counter and chooses by it; none of that depends on the image."""
    draw = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), x.shape)
    return x + draw * number.astype(jnp.float32) * jnp.where(number > 1, 1.0, 0.5), None


def passed_on(carry, _):
    """What is rounded depends on the image from the second step on."""
    x, before, total = carry
    return (x, dense(x), total + jnp.round(jnp.where(before > 0, before, before))), None


CUTS = {
    "nothing": (lambda x: dense(jnp.where(x > 0.5, x, 0.1 * x)), ()),
    "maximum": (lambda x: dense(jnp.maximum(jax.nn.relu(x), lax.cummax(x, axis=1))), ()),
    "round": (lambda x: dense(jnp.round(x * 7) / 7), ("round",)),
    "sign": (lambda x: dense(jnp.sign(x - 0.5)), ("sign",)),
    "floor in jit": (lambda x: dense(jax.jit(jnp.floor)(9 * x)), ("floor",)),
    "round in a scan": (lambda x: dense(lax.scan(lambda c, _: (jnp.round(c), None), x, length=2)[0]), ("round",)),
    "noise in a scan": (lambda x: dense(lax.scan(noised, x, jnp.arange(3))[0]), ()),
    "carry of a scan": (lambda x: lax.scan(passed_on, (x, jnp.zeros((2, 3)), dense(x)), length=3)[0][2], ("round",)),
    "stop": (lambda x: dense(lax.stop_gradient(x) + x), ("stop_gradient",)),
    "threshold": (lambda x: dense((x > 0.5).astype(jnp.float32)), ("cast from integer",)),
    "integers": (on_integers, ("round", "cast to integer", "cast from integer")),
    "bits": (lambda x: dense(x * (lax.bitcast_convert_type(x, jnp.uint32) & 1)), ("bitcast", "cast from integer")),
    "host": (lambda x: dense(jax.pure_callback(lambda y: y, x, x)), ("pure_callback",)),
    "choice by comparison": (lambda x: dense(jnp.where(x > 0.5, 1.0, 0.0)), ("choice",)),
    "choice by argmin": (lambda x: jnp.eye(3)[jnp.argmin(dense(x), axis=1)], ("choice",)),
    "choice of a branch": (lambda x: lax.cond(x.sum() > 0, lambda: jnp.ones(3), lambda: jnp.zeros(3)), ("choice",)),
    "branch of the image": (lambda x: dense(lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)), ()),
    "beside the path": (lambda x: (dense(x), jnp.round(x))[0], ()),
    "of constants": (lambda x: dense(x) + jnp.round(jnp.linspace(0.0, 2.0, 3)), ()),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_cuts_a_gradient_is_named(name):
    function, expected = CUTS[name]
    assert interruptions(function, jnp.asarray(IMAGE)) == expected


def test_of_our_own_models_only_a_shift_that_the_norm_undoes_is_cut():
    for name in ("small_cnn", "resnet9"):
        model = models.build(name, image_shape=(8, 8, 1), num_classes=2, width=8)
        params = model.init(jax.random.key(0), IMAGE[:1].repeat(2, 1).repeat(2, 2))
        names = interruptions(
            lambda x, m=model, p=params: m.apply(p, x), jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        )
        assert names == ("stop_gradient",)


@pytest.mark.parametrize("name", ["nothing", "round", "sign", "stop", "integers"])
def test_the_twin_has_the_same_values_and_the_slope_of_what_does_not_round(name):
    function, _ = CUTS[name]
    twin = straight_through(function)
    np.testing.assert_array_equal(jax.jit(twin)(IMAGE), jax.jit(function)(IMAGE))
    gradient = jax.grad(lambda x: jnp.sum(twin(x)[:, 0]))(jnp.asarray(IMAGE)).reshape(2, 16)
    slope = {"nothing": np.where(IMAGE > 0.5, 1, 0.1).reshape(2, 16), "stop": 2.0}.get(name, 1.0)
    expected = np.round(WEIGHT[:, 0] * 20) * 50 / 1000 if name == "integers" else WEIGHT[:, 0]
    np.testing.assert_allclose(gradient, np.broadcast_to(slope * expected, (2, 16)), rtol=1e-5)


def test_what_cuts_inside_a_loop_or_a_branch_is_named_and_a_counter_there_is_nothing():
    counted = lambda x: dense(lax.fori_loop(0, 3, lambda i, y: y + i * x, x))  # noqa: E731
    gradient = jax.grad(lambda x: jnp.sum(straight_through(counted)(x)[:, 0]))(jnp.asarray(IMAGE))
    np.testing.assert_allclose(gradient.reshape(2, 16), np.tile(4 * WEIGHT[:, 0], (2, 1)), rtol=1e-5)
    branched = lambda x: dense(lax.cond(x.sum() > 0, jnp.floor, jnp.sin, x))  # noqa: E731
    for function, place in ((CUTS["round in a scan"][0], "round inside 'scan'"), (branched, "floor inside 'cond'")):
        with pytest.raises(ValueError, match=f"^function has {place}: must be outside of loops and branches$"):
            straight_through(function)(IMAGE)
