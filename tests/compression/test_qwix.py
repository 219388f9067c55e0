"""Beside qwix, where it is installed: the same weights in 8 bits, smaller errors in 4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.compression import dequantize, quantize

qwix = pytest.importorskip("qwix")
WEIGHT = jax.random.normal(jax.random.key(0), (3, 3, 16, 32)) * jnp.exp(jax.random.normal(jax.random.key(1), (32,)))


def squared_errors(bits, symmetric):
    method = "absmax" if symmetric else "minmax"
    theirs = qwix.dequantize(qwix.quantize(WEIGHT, f"int{bits}", channelwise_axes=(3,), calibration_method=method))
    ours = dequantize(quantize(WEIGHT, bits=bits, symmetric=symmetric))
    return (float(jnp.sum(((found - WEIGHT) / WEIGHT.std((0, 1, 2))) ** 2)) for found in (ours, theirs))


@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bits_err_alike_and_four_bits_err_less(symmetric):
    ours, theirs = squared_errors(8, symmetric)
    np.testing.assert_allclose(ours, theirs, rtol=0.03)
    ours, theirs = squared_errors(4, symmetric)
    assert ours < 0.92 * theirs
