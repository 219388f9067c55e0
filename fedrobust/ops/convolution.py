"""Convolution with any number of spatial axes, closed under reverse differentiation and `vmap`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedrobust import check
from fedrobust.ops._contractions import Geometry, contract, plain


def conv(
    image: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolution."""
    num_axes = image.ndim - 2
    check.require(num_axes >= 1 and kernel.ndim == image.ndim, "kernel.ndim", kernel.ndim, f"image.ndim, {image.ndim}")
    window = kernel.shape[:-2]
    dilation = _per_axis("kernel_dilation", kernel_dilation, num_axes)
    steps = _per_axis("strides", strides, num_axes)
    if isinstance(padding, str):
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, window, strict=True)]
        padding = lax.padtype_to_pads(image.shape[1:-1], reach, steps, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    geometry = Geometry(image.shape[1:-1], window, steps, pads, dilation, groups)
    return _conv(geometry, image, kernel)


def _per_axis(name: str, value: int | Sequence[int], num_axes: int) -> tuple[int, ...]:
    values = (value,) * num_axes if isinstance(value, int) else tuple(value)
    check.require(len(values) == num_axes and all(v >= 1 for v in values), name, value, f"1 or {num_axes} numbers >= 1")
    return values


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _conv(geometry: Geometry, image: jax.Array, kernel: jax.Array) -> jax.Array:
    # Plain to whoever reads the jaxpr, a contraction as soon as a vmap touches it.
    @jax.custom_batching.custom_vmap
    def value(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return plain(geometry, image, kernel)

    @value.def_vmap
    def _(size: int, in_batched: list[bool], image: jax.Array, kernel: jax.Array) -> tuple[jax.Array, bool]:
        axes = [0 if batched else None for batched in in_batched]
        return jax.vmap(partial(contract, "output", geometry), axes)(image, kernel), True

    return value(image, kernel)


@partial(_conv.defjvp, symbolic_zeros=True)
def _tangent(geometry, primals, tangents):
    image, kernel = primals
    d_image, d_kernel = tangents
    zero = jax.custom_derivatives.SymbolicZero
    out = _conv(geometry, image, kernel)
    parts = []
    if not isinstance(d_image, zero):
        parts.append(contract("output", geometry, d_image, kernel))
    if not isinstance(d_kernel, zero):
        parts.append(contract("output", geometry, image, d_kernel))
    return out, sum(parts[1:], parts[0])
