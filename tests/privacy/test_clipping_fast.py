"""Losses written with plain convolutions are clipped through the library's own, without edits."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fedrobust import losses, ops, trace
from fedrobust.attacks import pgd
from fedrobust.defenses import adversarial_loss
from fedrobust.privacy import clip_sums, clipped_grad
from fedrobust.types import Batch

KEY = jax.random.key(0)
SIZE, CLIP_NORM = 3, 0.7
IMAGE = np.random.default_rng(0).uniform(size=(SIZE, 6, 5, 2)).astype(np.float32)
BATCH = Batch(IMAGE, np.array([0, 2, 1], np.int32), np.ones(SIZE, bool))


class FlaxNet(nn.Module):
    """Strides, dilation, groups, a `custom_jvp` activation, a checkpointed layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 1), kernel_dilation=(1, 2))(x))
        x = jax.nn.silu(nn.remat(nn.Conv)(4, (3, 3), feature_group_count=2)(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


class TransposedNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.ConvTranspose(2, (2, 2), strides=(2, 2))(x).reshape(len(x), -1))


def haiku_net(x):
    x = jax.nn.relu(hk.Conv2D(4, 3, stride=2)(x))
    x = jax.nn.softplus(hk.Conv2D(3, (2, 3), padding="VALID")(x))
    return hk.Linear(3)(x.reshape(len(x), -1))


@functools.cache
def model(name):
    if name == "haiku":
        net = hk.transform(haiku_net)
        return net.init(KEY, IMAGE), lambda params, x: net.apply(params, None, x)
    net = {"flax": FlaxNet, "transposed": TransposedNet}[name]()
    return net.init(KEY, IMAGE), net.apply


def adversarial(apply):
    attack = pgd(norm="linf", eps=0.1, step_size=0.05, num_steps=2, random_start=True)
    return adversarial_loss(losses.cross_entropy(apply), apply, attack, clean_share=0.5)


def convolutions(function, *args):
    """How many `conv_general_dilated` are left in a jaxpr, at any depth, but not those that `ops.conv` stands for."""
    found = 0

    def visit(jaxpr):
        nonlocal found
        for eqn in jaxpr.eqns:
            found += eqn.primitive.name == "conv_general_dilated"
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns") and eqn.primitive.name != "custom_jvp_call":
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def reference(loss, params):
    """A loop over examples, the convolutions left as they are."""
    key, total, norms = jax.random.split(KEY, SIZE), 0, []
    gradient = jax.jit(jax.grad(lambda p, k, x, y: loss(k, p, x[None], y[None])[0]))
    for i in range(SIZE):
        leaves = jax.tree.leaves(gradient(params, key[i], BATCH.image[i], BATCH.label[i]))
        g = np.concatenate([np.ravel(x) for x in leaves]).astype(np.float64)
        norms.append(np.linalg.norm(g))
        total = total + g * min(1, CLIP_NORM / norms[-1])
    return total, norms


@pytest.mark.parametrize(
    ("name", "make_loss", "num_left"),
    [
        ("flax", losses.cross_entropy, 0),
        ("haiku", losses.cross_entropy, 0),
        ("flax", adversarial, 1),  # the attack's own input gradient of the convolution with strides
    ],
)
def test_a_user_model_takes_the_fast_path_and_gives_the_same(name, make_loss, num_left):
    params, apply = model(name)
    loss = make_loss(apply)
    grad = clipped_grad(loss, clip_norm=CLIP_NORM, microbatch_size=2)
    total, info = jax.jit(grad)(KEY, params, BATCH)
    expected, norms = reference(loss, params)
    np.testing.assert_allclose(info.norm, norms, rtol=1e-5)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(total)])
    np.testing.assert_allclose(flat, expected, rtol=1e-3, atol=1e-6)
    assert convolutions(grad, KEY, params, BATCH) == 2 * num_left  # a branch for each kind of platform
    assert convolutions(jax.grad(lambda p: loss(KEY, p, IMAGE, BATCH.label).sum()), params) >= num_left + 2


def test_transposed_convolutions_are_left_alone():
    params, apply = model("transposed")
    fast = trace.fast_convolutions(apply)
    assert str(jax.make_jaxpr(fast)(params, IMAGE)) == str(jax.make_jaxpr(apply)(params, IMAGE))
    _, info = jax.jit(clipped_grad(losses.cross_entropy(apply), clip_norm=CLIP_NORM))(KEY, params, BATCH)
    np.testing.assert_allclose(info.norm, reference(losses.cross_entropy(apply), params)[1], rtol=1e-5)


def test_a_function_without_plain_convolutions_is_called_as_it_is():
    def apply(params, image):
        return ops.conv(image, params)

    params = np.ones((3, 3, 2, 2), np.float32)
    fast = trace.fast_convolutions(apply)
    assert str(jax.make_jaxpr(fast)(params, IMAGE)) == str(jax.make_jaxpr(apply)(params, IMAGE))


def test_checkpoints_stay_checkpoints():
    params, apply = model("flax")
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda p: trace.fast_convolutions(apply)(p, IMAGE).sum()))(params))
    assert "remat" in jaxpr or "checkpoint" in jaxpr


def conv(image, kernel):
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def scanned(kernel, image):
    return lax.scan(lambda x, _: (jnp.tanh(conv(x, kernel)), None), image, length=2)[0]


def looped(kernel, image):
    return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(conv(x, kernel)), image)


def while_looped(kernel, image):
    def unfinished(carry):
        return (jnp.sum(conv(carry[1], kernel)) < 1e9) & (carry[0] < 2)

    return lax.while_loop(unfinished, lambda carry: (carry[0] + 1, jnp.tanh(conv(carry[1], kernel))), (0, image))[1]


def branched(kernel, image):
    return lax.cond(jnp.sum(kernel) > 0, lambda: jnp.tanh(conv(image, kernel)), lambda: conv(image, -kernel))


def jitted(kernel, image):
    return jax.jit(conv)(image, kernel)


@pytest.mark.parametrize("function", [scanned, looped, while_looped, branched, jitted])
def test_convolutions_inside_loops_and_branches_are_replaced(function):
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2, 2)).astype(np.float32)
    fast = trace.fast_convolutions(function)
    assert convolutions(fast, kernel, IMAGE) == 0 < convolutions(function, kernel, IMAGE)
    np.testing.assert_allclose(jax.jit(fast)(kernel, IMAGE), function(kernel, IMAGE), atol=1e-5)
    if function is not while_looped:  # has no derivative in reverse mode
        got, want = (jax.jit(jax.grad(lambda k, f=f: jnp.sum(f(k, IMAGE) ** 2)))(kernel) for f in (fast, function))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_captured_tracers_and_arrays_reach_the_fast_function():
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2, 2)).astype(np.float32)

    def outer(scale):
        def apply(kernel, image):
            return lax.map(lambda x: conv(x[None], kernel * scale)[0] + IMAGE[0], image)

        return trace.fast_convolutions(apply)(kernel, IMAGE), apply(kernel, IMAGE)

    got, want = jax.jit(outer)(2.0)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_derivatives_given_by_an_author_survive_beside_a_convolution():
    @jax.custom_vjp
    def step(x):
        return jnp.round(x)

    step.defvjp(lambda x: (step(x), None), lambda _, g: (7 * g,))
    kernel = np.ones((3, 3, 2, 2), np.float32)
    fast = trace.fast_convolutions(lambda k, x: step(conv(x, k)))
    got = jax.grad(lambda k: fast(k, IMAGE).sum())(kernel)
    want = jax.grad(lambda k: 7 * conv(IMAGE, k).sum())(kernel)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [1e-6, 0.3])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-7, 0))
def test_a_contribution_stays_in_the_ball_where_unwritten_gradients_nearly_cancel(clip_norm, seed, exponent):
    """Equal patches whose output gradients sum to almost nothing: what is measured of the norm is mostly rounding."""
    rng = np.random.default_rng(seed)
    pull = rng.normal(size=(8, 8, 3))
    pull -= pull.mean(axis=(0, 1)) * (1 - 10.0**exponent)
    image = np.broadcast_to(rng.uniform(size=(1, 1, 1, 2)), (1, 8, 8, 2)).astype(np.float32)
    params, batch = {"kernel": np.zeros((1, 1, 2, 3), np.float32)}, Batch(image, pull[None], np.ones(1, bool))
    total = np.asarray(cancelling(clip_norm)(KEY, params, batch)["kernel"], np.float64)
    assert np.linalg.norm(total) <= clip_norm


@functools.cache
def cancelling(clip_norm):
    def loss(key, params, image, label):
        return jnp.sum(ops.conv(image, params["kernel"]) * label, axis=(1, 2, 3))

    def run(*args):
        with pytest.MonkeyPatch.context() as patch:  # while it is traced
            patch.setattr(clip_sums, "_MAX_PRODUCTS", np.inf)
            return clipped_grad(loss, clip_norm=clip_norm)(*args)[0]

    return jax.jit(run)
