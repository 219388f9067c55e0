"""Which results of a function are left open, and that all of them stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedrobust import ops
from fedrobust.ops import KernelGradients
from fedrobust.trace import with_open_kernels

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(3, 5, 4, 2)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 3, 2, 2)).astype(np.float32)
SCALE = RNG.normal(size=2).astype(np.float32)


def once(params, x):
    return jnp.tanh(ops.conv(x, params["kernel"]) * params["scale"])


def jitted(params, x):
    return jax.jit(jax.jit(once))(params, x)


def twice(params, x):
    return once(params, once(params, x))


def transposed(params, x):
    return once({**params, "kernel": jnp.swapaxes(params["kernel"], -1, -2)}, x)


def scanned(params, x):
    return lax.scan(lambda x, _: (once(params, x), None), x, length=2)[0]


def gradients(apply):
    return jax.vmap(jax.value_and_grad(lambda p, x: jnp.sum(apply(p, x[None]) ** 2)), (None, 0))


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, KernelGradients))


@pytest.mark.parametrize(("apply", "num_open"), [(once, 1), (jitted, 1), (twice, 0), (transposed, 0), (scanned, 0)])
def test_a_kernel_used_once_is_left_open_and_every_result_is_the_same(apply, num_open):
    params = {"kernel": KERNEL, "scale": SCALE}
    function = gradients(apply)
    expected = leaves(function(params, IMAGE))
    found = leaves(with_open_kernels(function, lambda g: True)(params, IMAGE))
    assert [isinstance(x, KernelGradients) for x in found] == [False, num_open == 1, False]
    for a, b in zip(found, expected, strict=True):
        a = jax.vmap(lambda i, a=a: a.weighted_sum(jnp.eye(3)[i]))(jnp.arange(3)) if num_open and b.ndim == 5 else a
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    closed = leaves(with_open_kernels(function, lambda g: False)(params, IMAGE))
    assert not any(isinstance(x, KernelGradients) for x in closed)
    for a, b in zip(closed, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_stack_that_something_else_reads_is_written():
    def function(params, x):
        value, gradient = gradients(once)(params, x)
        return value, gradient, jnp.sum(gradient["kernel"])

    found = leaves(with_open_kernels(function, lambda g: True)({"kernel": KERNEL, "scale": SCALE}, IMAGE))
    assert not any(isinstance(x, KernelGradients) for x in found)
