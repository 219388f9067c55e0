"""Weights in 8 bits: symmetric, one scale per output channel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust.types import Params

LEVELS = 127


class Quantized(NamedTuple):
    """Parameters in few bits.

    Attributes:
        value: a pytree like the parameters: int8 in [-127, 127] where a leaf has two axes or more, float16 for vectors
            and scalars (biases and norm scales, a hundredth of the weights, that int8 would hurt).
        scale: a pytree of the same structure: [n] float16 >= 0, one per index of the leaf's last axis (the output
            channel), for the int8 leaves; a scalar 1 for the others.
    """

    value: Params
    scale: Params


@jax.jit  # one compilation; leaf by leaf it would be several for every shape
def quantize(params: Params) -> Quantized:
    """Rounds each weight to the nearest of 255 multiples of its output channel's scale, max |w| / 127.

    Args:
        params: a pytree of finite float arrays; weights up to 8e6, vectors up to 65504 in absolute value.

    Returns:
        The parameters in 8 and 16 bits.

    Guarantees:
        |w - dequantize(quantize(w))| <= scale / 2 for every weight: the scale is rounded up to float16, so no weight is
        clipped. Zeros stay exactly zero. A pure function; it does not check for NaN and inf.

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018,
        https://arxiv.org/abs/1806.08342, sections 2.2 (symmetric) and 3.1.2 (per channel). Deviation: float16 scales.
    """
    scale = jax.tree.map(_scale, params)
    return Quantized(jax.tree.map(_round, params, scale), scale)


@jax.jit
def dequantize(quantized: Quantized) -> Params:
    """The float32 parameters that the quantized ones stand for.

    Args:
        quantized: what `quantize` returned.

    Returns:
        A pytree of float32 arrays: value * scale.
    """
    return jax.tree.map(lambda v, s: v.astype(jnp.float32) * s.astype(jnp.float32), quantized.value, quantized.scale)


def is_weight(leaf: jax.Array | np.ndarray) -> bool:
    """Whether a leaf is stored in 8 bits: a matrix or a kernel, not a vector."""
    return leaf.ndim >= 2


def _scale(w: jax.Array) -> jax.Array:
    if not is_weight(w):
        return jnp.ones((), jnp.float16)
    exact = jnp.max(jnp.abs(w.astype(jnp.float32)), axis=tuple(range(w.ndim - 1))) / LEVELS
    near = exact.astype(jnp.float16)
    return jnp.where(near.astype(jnp.float32) < exact, jnp.nextafter(near, jnp.float16(jnp.inf)), near)


def _round(w: jax.Array, scale: jax.Array) -> jax.Array:
    if not is_weight(w):
        return w.astype(jnp.float16)
    scale = scale.astype(jnp.float32)
    steps = w.astype(jnp.float32) / jnp.where(scale > 0, scale, 1)
    return jnp.clip(jnp.round(steps), -LEVELS, LEVELS).astype(jnp.int8)
