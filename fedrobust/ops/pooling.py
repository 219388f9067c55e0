"""Pooling written as maxima and means of strided slices."""

from collections.abc import Sequence

import itertools
import jax
import jax.numpy as jnp
from jax import lax


def _windows(image, window, strides, padding, fill):
    window, num = tuple(window), len(window)
    strides = tuple(strides or window)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image.shape[1:-1], window, strides, padding)
    padded = lax.pad(image, jnp.asarray(fill, image.dtype), [(0, 0, 0), *((l, h, 0) for l, h in padding), (0, 0, 0)])
    out = []
    for offset in itertools.product(*map(range, window)):
        stop = [o + (n - k) // s * s + 1 for o, n, k, s in zip(offset, padded.shape[1:-1], window, strides)]
        out.append(lax.slice(padded, (0, *offset, 0), (image.shape[0], *stop, image.shape[-1]), (1, *strides, 1)))
    return out


def max_pool(image, window, strides=None, padding="VALID"):
    """Max."""
    a, *rest = _windows(image, window, strides, padding, -jnp.inf)
    for b in rest:
        a = jnp.maximum(a, b)
    return a


def avg_pool(image, window, strides=None, padding="VALID"):
    """Mean."""
    parts = _windows(image, window, strides, padding, 0)
    return sum(parts) / len(parts)
