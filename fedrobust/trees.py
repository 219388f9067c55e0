"""Arithmetic on pytrees of parameters. Sums run in float32 or wider."""

import itertools

import jax
import jax.numpy as jnp

from fedrobust.types import Params


def add(a: Params, b: Params) -> Params:
    """`a + b`, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def subtract(a: Params, b: Params) -> Params:
    """`a - b`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(tree: Params, factor: jax.Array | float) -> Params:
    """`factor * tree`, leaf by leaf, in each leaf's dtype."""
    return jax.tree.map(lambda x: (x * factor).astype(x.dtype), tree)


def multiply(a: Params, b: Params) -> Params:
    """`a * b`, leaf by leaf, in the dtype of `a`."""
    return jax.tree.map(lambda x, y: x * y.astype(x.dtype), a, b)


def zeros_like(tree: Params) -> Params:
    """Zeros of every leaf's shape and dtype."""
    return jax.tree.map(jnp.zeros_like, tree)


def where(condition: jax.Array, a: Params, b: Params) -> Params:
    """`a` where the scalar condition is true, else `b`. A NaN in the branch not taken does not leak."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def is_finite(tree: Params) -> jax.Array:
    """[] bool: whether every number is."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def norm(tree: Params) -> jax.Array:
    """The L2 norm over all leaves together, shape (), at least float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def size(tree: Params) -> int:
    """The number of scalars in all leaves."""
    return sum(x.size for x in jax.tree.leaves(tree))


def add_flat(tree: Params, flat: jax.Array) -> Params:
    """`tree + flat`, where `flat` holds one number for every scalar.

    Args:
        tree: a pytree of arrays.
        flat: [size(tree)], in the order of the leaves.

    Returns:
        The sum, in each leaf's shape and dtype.
    """
    return jax.tree.map(lambda x, piece: x + piece, tree, from_flat(tree, flat))


def to_flat(tree: Params) -> jax.Array:
    """All scalars as float32 [size(tree)], in the order of the leaves."""
    return jnp.concatenate([x.astype(jnp.float32).ravel() for x in jax.tree.leaves(tree)])


def from_flat(like: Params, flat: jax.Array) -> Params:
    """The tree of which `flat` holds the scalars.

    Args:
        like: a pytree of arrays or `jax.ShapeDtypeStruct`; values do not matter.
        flat: [size(like)], in the order of the leaves.

    Returns:
        A pytree of `like`'s structure, shapes and dtypes.
    """
    leaves, structure = jax.tree.flatten(like)
    pieces = jnp.split(flat, list(itertools.accumulate(x.size for x in leaves))[:-1])
    shaped = [piece.reshape(x.shape).astype(x.dtype) for x, piece in zip(leaves, pieces, strict=True)]
    return jax.tree.unflatten(structure, shaped)


def weighted_sum(weight: jax.Array, stacked: Params) -> Params:
    """`sum_k weight[k] * leaf[k]`.

    Args:
        weight: [K] float32. Where it is 0 the row may hold NaN or inf: it contributes exactly 0.
        stacked: a pytree whose leaves are [K, ...].

    Returns:
        The pytree without the leading axis, in each leaf's dtype.
    """

    weight = jnp.asarray(weight)

    def leaf(x: jax.Array) -> jax.Array:
        # Row by row, each read once. A matrix product of the rows without their NaN writes a copy of them first, and a
        # reduction over the leading axis is slow, too: 64 x 147 456 took 12.4 and 14.3 ms, this 1.1; 4 clients of 16
        # rows by vmap 12.0 and 1.3 (2 x86 cores, jax 0.10.2, 2026-11-23).
        x = jnp.asarray(x)
        wide = jnp.promote_types(x.dtype, jnp.float32)

        def row(i: int | jax.Array) -> jax.Array:
            return jnp.where(weight[i] == 0, 0, weight[i].astype(wide) * x[i].astype(wide))

        return jax.lax.fori_loop(1, x.shape[0], lambda i, total: total + row(i), row(0)).astype(x.dtype)

    return jax.tree.map(leaf, stacked)
