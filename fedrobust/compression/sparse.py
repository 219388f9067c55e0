"""Masks over single weights. They make no model smaller or faster here: XLA multiplies by their zeros.

They exist to compare with, and for files and machines that know how to profit: a file compresses well, and some
accelerators skip half of 2:4. What gets smaller by itself is in `fedrobust.compression.selection`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check
from fedrobust.compression.selection import SCOPES, num_removed
from fedrobust.types import Params


def n_of_m_masks(params: Params, *, n: int = 2, m: int = 4) -> Params:
    """Masks that keep the n largest of every m consecutive weights along the axis that is summed over.

    No speed and no memory is gained in JAX; the masked model costs what the dense one does.

    Args:
        params: concrete float arrays. A leaf with two axes or more is a kernel [..., inputs, outputs] and its inputs
            are cut into runs of m; one whose inputs are no multiple of m stays whole, as vectors do.
        n: kept of every m, in [1, m].
        m: >= 1.

    Returns:
        A pytree like `params` of float32 zeros and ones. Of equal weights the later stays.

    Raises:
        ValueError: n or m out of range.

    Source: Mishra et al., Accelerating Sparse Deep Neural Networks, 2021, https://arxiv.org/abs/2104.08378.
    """
    check.at_least("m", m, 1)
    check.require(isinstance(n, int) and 1 <= n <= m, "n", n, f"a whole number in [1, m = {m}]")

    def mask(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 2 or leaf.shape[-2] % m:
            return jnp.ones(leaf.shape, jnp.float32)
        size = np.abs(np.moveaxis(np.asarray(leaf), -2, -1))
        runs = size.reshape(*size.shape[:-1], -1, m)
        rank = np.argsort(np.argsort(runs, axis=-1, kind="stable"), axis=-1)
        keep = (rank >= m - n).reshape(size.shape)
        return jnp.asarray(np.moveaxis(keep, -1, -2), jnp.float32)

    return jax.tree.map(mask, params)


def unstructured_masks(params: Params, *, sparsity: float, scope: str = "uniform") -> Params:
    """Masks that remove the smallest weights one by one.

    No speed and no memory is gained in JAX; the masked model costs what the dense one does.

    Args:
        params: concrete float arrays. Leaves with two axes or more are pruned; vectors, a hundredth of the weights,
            stay.
        sparsity: in [0, 1), the share of the weights to remove.
        scope: "uniform" removes the same share of every leaf, "global" the smallest of all leaves together, but never
            the largest weight of a leaf.

    Returns:
        A pytree like `params` of float32 zeros and ones.

    Raises:
        ValueError: sparsity outside [0, 1), or an unknown scope.

    Source: Han et al., Learning both Weights and Connections, 2015, https://arxiv.org/abs/1506.02626, section 3.
        Deviation: a share of the weights, not a threshold.
    """
    check.fraction("sparsity", sparsity, one=False)
    check.one_of("scope", scope, SCOPES)
    leaves, structure = jax.tree.flatten(params)
    kernels = [np.abs(np.asarray(x)).ravel() for x in leaves if x.ndim >= 2]
    pools = [kernels] if scope == "global" else [[kernel] for kernel in kernels]
    keeps = iter([keep for pool in pools for keep in _largest(pool, sparsity)])
    masks = [next(keeps).reshape(x.shape) if x.ndim >= 2 else np.ones(x.shape) for x in leaves]
    return jax.tree.unflatten(structure, [jnp.asarray(mask, jnp.float32) for mask in masks])


def _largest(sizes: list[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """Which entries of several vectors stay, the share taken of them together; the largest of each always does."""
    order = np.concatenate([np.zeros(0), *sizes])
    starts = np.cumsum([0, *(len(size) for size in sizes)])
    for start, size in zip(starts, sizes, strict=False):
        if len(size):
            order[start + np.argmax(size)] = np.inf
    keep = np.ones(len(order), bool)
    num = min(num_removed(sparsity, max(len(order), 1)), int(np.isfinite(order).sum()))
    keep[np.argsort(order, kind="stable")[:num]] = False
    return np.split(keep, starts[1:-1])
