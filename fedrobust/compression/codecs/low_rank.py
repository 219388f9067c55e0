"""A codec that sends matrices as products of thin ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.compression.codecs.wire import assemble
from fedrobust.types import Codec, Key, Params


class Factors(NamedTuple):
    """A matrix [n, m] of low rank. Attributes: left: [n, r], orthonormal columns; right: [m, r]; both float32."""

    left: Any
    right: Any


def power_sgd(like: Params, *, rank: int) -> Codec:
    """One step of power iteration per update: each matrix as `left @ right.T`, the rest as it is.

    A kernel [.., n_in, n_out] is a matrix [(.. n_in), n_out]. Where factors would be no smaller, and for vectors, the
    numbers are sent themselves.

    Args:
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the updates' shapes.
        rank: r >= 1.

    Returns:
        A `Codec`, to be used with `error_feedback`. Its state is each matrix' `right`, with which the next iteration
        starts, so that over updates that change little the factors become the best of that rank.

    Raises:
        ValueError: rank out of range.

    Guarantees:
        |C(x) - x| <= |x|: C projects onto r columns. A matrix of rank <= r arrives whole, up to rounding, unless the
        last `right` is orthogonal to it. Biased. An update that is not finite leaves no trace in the state, nor does
        one of zeros.

    Source: Vogels, Karimireddy, Jaggi, PowerSGD, 2019, https://arxiv.org/abs/1905.13727, algorithm 1. Deviations: each
        client has factors of its own, where the paper averages them between the steps; columns are made orthonormal by
        QR, not Gram-Schmidt.
    """
    check.at_least("rank", rank, 1)
    leaves, structure = jax.tree.flatten(like)
    sizes = [_matrix(x.shape) for x in leaves]
    is_factored = [rank * (n + m) < n * m for n, m in sizes]

    def init(params: Params) -> list[jax.Array]:
        del params
        keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), len(sizes))
        return [
            jax.random.normal(key, (m, rank)) for key, (_, m), yes in zip(keys, sizes, is_factored, strict=True) if yes
        ]

    def encode(key: Key, state: list[jax.Array], update: Params) -> tuple[list[Any], list[jax.Array]]:
        del key
        last, code = iter(state), []
        for x, size, yes in zip(jax.tree.leaves(update), sizes, is_factored, strict=True):
            x = x.astype(jnp.float32)
            code.append(_factors(x.reshape(size), next(last)) if yes else x)
        right = [part.right for part, yes in zip(code, is_factored, strict=True) if yes]
        return code, [_remembered(new, old) for new, old in zip(right, state, strict=True)]

    def decode(code: list[Any]) -> Params:
        whole = [
            (part.left @ part.right.T if yes else part).reshape(x.shape).astype(x.dtype)
            for part, x, yes in zip(code, leaves, is_factored, strict=True)
        ]
        return jax.tree.unflatten(structure, whole)

    def shape_of(x: Any, size: tuple[int, int], yes: bool) -> Any:
        if not yes:
            return jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return Factors(*(jax.ShapeDtypeStruct((n, rank), jnp.float32) for n in size))

    shape = [shape_of(*each) for each in zip(leaves, sizes, is_factored, strict=True)]
    return assemble(init, encode, decode, shape)


def _factors(matrix: jax.Array, start: jax.Array) -> Factors:
    left, _ = jnp.linalg.qr(matrix @ start)
    return Factors(left, matrix.T @ left)


def _remembered(new: jax.Array, old: jax.Array) -> jax.Array:
    """What the next iteration starts with: a column of zeros would never find anything again."""
    return jnp.where(jnp.all(jnp.isfinite(new)) & jnp.any(new != 0, axis=0), new, old)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns; a vector or a scalar is one row."""
    columns = shape[-1] if shape else 1
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return rows, columns
