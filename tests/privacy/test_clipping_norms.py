"""Per-example gradient norms against a loop over single examples, for many kinds of layers.

52 architectures x 6 draws = 312 cases: settings of layers, data and parameters are drawn by hypothesis, each
architecture is compiled once. Gradients of convolutions that stay unwritten are drawn as often as written ones.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

from fedrobust import ops
from fedrobust.privacy import clip_sums, clipped_grad
from fedrobust.types import Batch

pytestmark = pytest.mark.optimized  # without, the float32 reference is off by more than 1e-5

KEY = jax.random.key(0)
NUM_DRAWS, SIZE = 6, 3
EPS = 1e-3
WAYS = [{}, {"microbatch_size": 2}, {"method": "norms_first", "microbatch_size": 2}]


def plain_conv(image, kernel, *, strides, padding, kernel_dilation, groups):
    """Channels last, by `lax`, as Flax and Haiku do; clipped_grad replaces it."""
    axes = "DHW"[3 - (image.ndim - 2) :]
    numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
    return lax.conv_general_dilated(
        image, kernel, strides, padding, rhs_dilation=kernel_dilation, dimension_numbers=numbers,
        feature_group_count=groups,
    )  # fmt: skip


def conv_net(draw):
    """One convolution of 1 to 3 axes with random settings, then a norm scale, then a dense layer or a mean."""
    num_axes = draw(st.integers(1, 3))
    per_axis = functools.partial(st.lists, min_size=num_axes, max_size=num_axes)
    window, strides = draw(per_axis(st.integers(1, 3))), draw(per_axis(st.integers(1, 2)))
    dilation = draw(per_axis(st.integers(1, 2)))
    groups, multiple = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    channels, features = 2, 2 * multiple if groups == 2 else multiple + 1
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, window, strict=True)]
    size = [r + draw(st.integers(0, 3)) for r in reach]
    padding = draw(st.sampled_from(["SAME", "VALID", [(1, 0)] * num_axes, [(0, 2)] * num_axes]))
    conv, norm = draw(st.sampled_from([ops.conv, plain_conv])), draw(st.sampled_from(["group", "scale", "none"]))
    settings = {"strides": strides, "padding": padding, "kernel_dilation": dilation, "groups": groups}
    shapes = {"kernel": (*window, channels // groups, features), "scale": (features,), "bias": (features,)}

    def apply(params, image):
        x = conv(image, params["kernel"], **settings)
        if norm == "group":
            x = ops.group_norm(x, 1, params["scale"], params["bias"], eps=EPS)
        elif norm == "scale":
            x = x * params["scale"] / jnp.sqrt(jnp.mean(x**2, axis=tuple(range(1, x.ndim)), keepdims=True) + EPS)
            x = x + params["bias"]
        return jnp.tanh(x).reshape(len(x), -1)

    return apply, shapes, (*size, channels)


def dense_net(draw):
    """Two layers of random widths."""
    size, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))

    def apply(params, image):
        return jnp.tanh(image @ params["a"] + params["b"]) @ params["c"]

    return apply, {"a": (size, width), "b": (width,), "c": (width, 2)}, (size,)


def shared_net(draw):
    """A kernel used twice, once transposed: the gradients of both uses add before the norm."""
    size, times = draw(st.integers(2, 4)), draw(st.integers(1, 3))

    def apply(params, image):
        x = image
        for _ in range(times):
            x = jnp.tanh(x @ params["a"]) @ params["a"].T
        return x

    return apply, {"a": (size, draw(st.integers(2, 4)))}, (size,)


def scanned_net(draw):
    """Layers of equal shape, stacked and scanned; of images, convolutions in the loop."""
    depth, conv = draw(st.integers(1, 3)), draw(st.sampled_from([None, ops.conv, plain_conv]))
    size = draw(st.integers(2, 4))

    def layer(x, kernel):
        if conv is None:
            return jnp.tanh(x @ kernel), None
        same = {"strides": (1, 1), "padding": "SAME", "kernel_dilation": (1, 1), "groups": 1}
        return jnp.tanh(conv(x, kernel, **same)), None

    shape = (depth, 2, 2) if conv is None else (depth, 2, 3, 2, 2)

    def apply(params, image):
        return lax.scan(layer, image, params["layers"])[0].reshape(len(image), -1)

    return apply, {"layers": shape}, (2,) if conv is None else (size, size, 2)


def embedding_net(draw):
    """Tokens looked up in a table, some more than once; the table's gradient is a scatter."""
    words, length, width = draw(st.integers(2, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))

    def apply(params, tokens):
        return jnp.tanh(params["table"][tokens].mean(axis=1)) @ params["c"]

    return apply, {"table": (words, width), "c": (width, 3)}, (length, words)


NUM_ARCHITECTURES = {conv_net: 18, dense_net: 8, shared_net: 8, scanned_net: 9, embedding_net: 9}
assert sum(NUM_ARCHITECTURES.values()) * NUM_DRAWS >= 300


def make_loss(apply):
    def loss(key, params, image, label):
        return jnp.sum((apply(params, image) - label[:, None]) ** 2, axis=1)

    return loss


@pytest.mark.parametrize("net", NUM_ARCHITECTURES)
def test_norms_equal_those_of_single_examples(net, monkeypatch):
    num_cases = 0

    @settings(max_examples=NUM_ARCHITECTURES[net], suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(drawn=st.data())
    def check(drawn):
        nonlocal num_cases
        apply, shapes, shape = net(drawn.draw)
        loss = make_loss(apply)
        monkeypatch.setattr(clip_sums, "_MAX_PRODUCTS", drawn.draw(st.sampled_from([0, math.inf])))
        run = jax.jit(clipped_grad(loss, clip_norm=1.0, **drawn.draw(st.sampled_from(WAYS))))
        alone = jax.jit(jax.grad(lambda params, x, y: loss(None, params, x[None], y[None])[0]))
        for _ in range(NUM_DRAWS):
            rng = np.random.default_rng(drawn.draw(st.integers(0, 2**32 - 1)))
            params = {name: rng.normal(size=size).astype(np.float32) for name, size in shapes.items()}
            label = rng.normal(size=SIZE).astype(np.float32)
            if net is embedding_net:
                image = rng.integers(0, shape[1], (SIZE, shape[0])).astype(np.int32)
            else:
                image = rng.normal(size=(SIZE, *shape)).astype(np.float32)
            _, info = run(KEY, params, Batch(image, label, np.ones(SIZE, bool)))
            for i in range(SIZE):
                leaves = jax.tree.leaves(alone(params, image[i], label[i]))
                expected = math.sqrt(sum(float(np.sum(np.asarray(g, np.float64) ** 2)) for g in leaves))
                np.testing.assert_allclose(info.norm[i], expected, rtol=1e-5)
            num_cases += 1

    check()
    assert num_cases >= NUM_ARCHITECTURES[net] * NUM_DRAWS
