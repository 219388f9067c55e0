"""Codecs that send every number in one of few levels, with a scale per leaf."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrobust import check, trees
from fedrobust.compression.codecs.wire import assemble
from fedrobust.types import Codec, Key, Params


class Levels(NamedTuple):
    """D numbers on a grid. Attributes: scale: [leaves] float32 >= 0, one per leaf; level: [D] int8."""

    scale: Any
    level: Any


class Signs(NamedTuple):
    """D numbers of one size per leaf. Attributes: scale: [leaves] float32 >= 0; negative: [D] bool."""

    scale: Any
    negative: Any


def qsgd(like: Params, *, num_levels: int) -> Codec:
    """Each number at random on one of the two nearest multiples of its leaf's L2 norm / num_levels.

    Of a leaf of n numbers about sqrt(n) * num_levels are not zero, and zeros cost little.

    Args:
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the updates' shapes.
        num_levels: in [1, 127], multiples from 0 up to the norm.

    Returns:
        A `Codec` without state.

    Raises:
        ValueError: num_levels out of range.

    Guarantees:
        E C(x) = x; for each leaf of n numbers E |C(x) - x|^2 <= min(n / s^2, sqrt(n) / s) |x|^2, s = num_levels. Where
        a leaf's norm is below 1e-18, zeros may arrive, and NaN where it is above 1e18: float32 holds no such squares.

    Source: Alistarh et al., QSGD, 2017, https://arxiv.org/abs/1610.02132, section 3.1 and lemma 3.1. Deviation: a leaf
        is a bucket; Golomb codes where the paper has Elias'.
    """
    check.at_least("num_levels", num_levels, 1)
    check.require(num_levels <= 127, "num_levels", num_levels, "in [1, 127]")
    return _stochastic(like, lambda x: jnp.sqrt(jnp.sum(jnp.square(x))), num_levels)


def terngrad(like: Params) -> Codec:
    """Each number at random to 0 or to plus or minus its leaf's largest.

    Args:
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the updates' shapes.

    Returns:
        A `Codec` without state.

    Guarantees:
        E C(x) = x; for each leaf E |C(x) - x|^2 = max|x| |x|_1 - |x|^2.

    Source: Wen et al., TernGrad, 2017, https://arxiv.org/abs/1705.07878, equations (3) and (4), a scale per leaf as in
        section 4. Deviation: nothing is clipped, which would be a bias.
    """
    return _stochastic(like, lambda x: jnp.max(jnp.abs(x), initial=0.0), 1)


def sign(like: Params) -> Codec:
    """The sign of each number, times the mean size of its leaf: 1 bit a number.

    Args:
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the updates' shapes.

    Returns:
        A `Codec` without state, to be used with `error_feedback`.

    Guarantees:
        A contraction: for each leaf of n numbers |C(x) - x|^2 = |x|^2 - |x|_1^2 / n. Biased.

    Source: Karimireddy, Rebjock, Stich, Jaggi, Error Feedback Fixes SignSGD, 2019, https://arxiv.org/abs/1901.09847,
        algorithm 1 with example 2's scaled sign, per leaf as in its section 6. sign(0) = 1.
    """

    def encode(key: Key, state: Any, update: Params) -> tuple[Signs, Any]:
        del key
        scale = jnp.stack([jnp.mean(jnp.abs(x)).astype(jnp.float32) for x in jax.tree.leaves(update)])
        return Signs(scale, trees.to_flat(update) < 0), state

    def decode(code: Signs) -> Params:
        return _scaled(like, code.scale, jnp.where(code.negative, -1, 1))

    return assemble(lambda params: (), encode, decode, Signs(*_shapes(like, jnp.bool_)))


def _stochastic(like: Params, scale_of: Callable[[jax.Array], jax.Array], num_levels: int) -> Codec:
    def encode(key: Key, state: Any, update: Params) -> tuple[Levels, Any]:
        leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(update)]
        scale = jnp.stack([scale_of(x) for x in leaves])
        step = jnp.where(scale > 0, scale, 1) / num_levels
        size = jnp.concatenate([(jnp.abs(x) / s).ravel() for x, s in zip(leaves, step, strict=True)])
        raised = jnp.floor(size + jax.random.uniform(key, size.shape))  # up with the chance of what floor cuts off
        level = jnp.sign(trees.to_flat(update)) * jnp.minimum(raised, num_levels)
        return Levels(scale, level.astype(jnp.int8)), state

    def decode(code: Levels) -> Params:
        return _scaled(like, code.scale / num_levels, code.level)

    shape = Levels(*_shapes(like, jnp.int8))
    return assemble(lambda params: (), encode, decode, shape, largest={"int8": num_levels})


def _scaled(like: Params, scale: jax.Array, level: jax.Array) -> Params:
    """Each leaf's part of `level` times its scale."""
    leaves, structure = jax.tree.flatten(trees.from_flat(jax.tree.map(_as_float, like), level))
    scaled = [s * x for s, x in zip(scale, leaves, strict=True)]
    return jax.tree.map(lambda x, y: x.astype(y.dtype), jax.tree.unflatten(structure, scaled), like)


def _as_float(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _shapes(like: Params, dtype: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    num_leaves = len(jax.tree.leaves(like))
    return jax.ShapeDtypeStruct((num_leaves,), jnp.float32), jax.ShapeDtypeStruct((trees.size(like),), dtype)
