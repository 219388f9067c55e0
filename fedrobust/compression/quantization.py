"""Weights in 8 or 4 bits, one scale per output channel, with or without a zero point."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check
from fedrobust.types import Params

_RATIOS = tuple(1 - i / 20 for i in range(11))  # 1, 0.95, ..., 0.5


class Quantized(NamedTuple):
    """Parameters in few bits: a weight is (value - zero) * scale.

    Attributes:
        value: a pytree like the parameters: int8 or int4 where a leaf has two axes or more, float16 for vectors and
            scalars (biases and norm scales, a hundredth of the weights, that few bits would hurt).
        scale: a pytree of the same structure: [n] float16 >= 0, one per index of the leaf's last axis (the output
            channel), for the weights; a scalar 1 for the others.
        zero: None where quantization is symmetric. Else a pytree of the same structure: [n] int8, within the range of
            the values, for the weights; a scalar 0 for the others.
    """

    value: Params
    scale: Params
    zero: Params | None = None


def quantize(params: Params, *, bits: int = 8, symmetric: bool = True) -> Quantized:
    """Rounds each weight to the nearest of 2^bits (symmetric: one fewer) evenly spaced values of its output channel.

    Symmetric values are multiples of one scale, in [-127, 127] or [-7, 7]; asymmetric ones span the channel's own range
    and zero. In 8 bits the range is the channel's. In 4 bits that wastes the few values on outliers: of the ranges that
    are 1, 0.95, ..., 0.5 times as wide each channel takes the one with the least squared error of its weights, which
    needs no data, and clips what lies outside.

    Args:
        params: a pytree of finite float arrays; weights up to 8e6 (4 bits: 4e5) and vectors up to 65504 in absolute
            value.
        bits: 8 or 4, of the weights.
        symmetric: whether values are multiples of the scale.

    Returns:
        The parameters in `bits` and 16 bits.

    Raises:
        ValueError: bits that are neither 8 nor 4.

    Guarantees:
        In 8 bits |w - dequantize(quantize(w))| <= scale / 2 for every weight: the scale is rounded up to float16, so no
        weight is clipped. In 4 bits the squared error of a channel is at most that of its whole range. Zeros stay
        exactly zero. A pure function; it does not check for NaN and inf.

    Source: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018,
        https://arxiv.org/abs/1806.08342, sections 2.1, 2.2 and 3.1.2 (per channel); Banner et al. 2019,
        https://arxiv.org/abs/1810.05723 (clipping in 4 bits). Deviations: float16 scales; the range is searched for.
    """
    check.one_of("bits", bits, (4, 8))
    return _quantize(params, bits, symmetric)


@jax.jit
def dequantize(quantized: Quantized) -> Params:
    """The float32 parameters that the quantized ones stand for.

    Args:
        quantized: what `quantize` returned.

    Returns:
        A pytree of float32 arrays: (value - zero) * scale.
    """
    if quantized.zero is None:
        return jax.tree.map(_decode, quantized.value, quantized.scale)
    return jax.tree.map(_decode, quantized.value, quantized.scale, quantized.zero)


def is_weight(leaf: jax.Array | np.ndarray) -> bool:
    """Whether a leaf is stored in few bits: a matrix or a kernel, not a vector."""
    return leaf.ndim >= 2


@functools.partial(jax.jit, static_argnums=(1, 2))  # one compilation; leaf by leaf it would be several for every shape
def _quantize(params: Params, bits: int, symmetric: bool) -> Quantized:
    found = jax.tree.map(lambda w: _Leaf(*_quantize_leaf(w, bits, symmetric)), params)
    value, scale, zero = (jax.tree.map(lambda x, i=i: x[i], found, is_leaf=_is_leaf) for i in range(3))
    return Quantized(value, scale, None if symmetric else zero)


class _Leaf(NamedTuple):
    value: jax.Array
    scale: jax.Array
    zero: jax.Array


def _is_leaf(x: object) -> bool:
    return isinstance(x, _Leaf)


def _quantize_leaf(w: jax.Array, bits: int, symmetric: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    if not is_weight(w):
        return w.astype(jnp.float16), jnp.ones((), jnp.float16), jnp.zeros((), jnp.int8)
    w = w.astype(jnp.float32)
    scale, zero = _whole_range(w, bits, symmetric) if bits == 8 else _best_range(w, bits, symmetric)
    return _encode(w, scale, zero, bits, symmetric), scale, zero


def _whole_range(w: jax.Array, bits: int, symmetric: bool, ratio: float | jax.Array = 1.0) -> tuple[jax.Array, ...]:
    """Scale and zero point of the range of each output channel, made narrower by a ratio."""
    axes = tuple(range(w.ndim - 1))
    low, high = _limits(bits, symmetric)
    if symmetric:
        scale = _rounded_up(ratio * jnp.max(jnp.abs(w), axis=axes, initial=0.0) / high)
        return scale, jnp.zeros(scale.shape, jnp.int8)
    least = ratio * jnp.min(w, axis=axes, initial=0.0)
    scale = _rounded_up((ratio * jnp.max(w, axis=axes, initial=0.0) - least) / (high - low))
    return scale, (low - jnp.round(least / _divisor(scale))).astype(jnp.int8)


def _best_range(w: jax.Array, bits: int, symmetric: bool) -> tuple[jax.Array, ...]:
    """Scale and zero point of the tried range with the least squared error, channel by channel."""

    def attempt(ratio: jax.Array) -> tuple[jax.Array, ...]:
        scale, zero = _whole_range(w, bits, symmetric, ratio)
        rounded = _decode(_encode(w, scale, zero, bits, symmetric), scale, zero)
        return jnp.sum(jnp.square(rounded - w), axis=tuple(range(w.ndim - 1))), scale, zero

    error, scale, zero = jax.vmap(attempt)(jnp.asarray(_RATIOS, jnp.float32))
    best = jnp.argmin(error, axis=0)[None]
    return tuple(jnp.take_along_axis(x, best, axis=0)[0] for x in (scale, zero))


def _encode(w: jax.Array, scale: jax.Array, zero: jax.Array, bits: int, symmetric: bool) -> jax.Array:
    low, high = _limits(bits, symmetric)
    steps = jnp.round(w / _divisor(scale))
    return jnp.clip(steps + zero, low, high).astype(jnp.int8 if bits == 8 else jnp.int4)


def _decode(value: jax.Array, scale: jax.Array, zero: jax.Array | None = None) -> jax.Array:
    value = value.astype(jnp.float32)
    return (value if zero is None else value - zero) * scale.astype(jnp.float32)


def _limits(bits: int, symmetric: bool) -> tuple[int, int]:
    """The least and the largest value."""
    high = 2 ** (bits - 1) - 1
    return (-high if symmetric else -high - 1), high


def _rounded_up(exact: jax.Array) -> jax.Array:
    """The least float16 that is not smaller."""
    near = exact.astype(jnp.float16)
    return jnp.where(near.astype(jnp.float32) < exact, jnp.nextafter(near, jnp.float16(jnp.inf)), near)


def _divisor(scale: jax.Array) -> jax.Array:
    scale = scale.astype(jnp.float32)
    return jnp.where(scale > 0, scale, 1)
