"""Codecs that send some of the numbers: the largest ones, or a random set."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrobust import check, trees
from fedrobust.compression.codecs.wire import assemble
from fedrobust.types import Codec, Key, Params


class Chosen(NamedTuple):
    """Some of D numbers. Attributes: place: [k] int32, ascending; value: [k] float32."""

    place: Any
    value: Any


class Drawn(NamedTuple):
    """Some of D numbers, whose places follow from the seed. Attributes: seed: [] uint32; value: [k] float32."""

    seed: Any
    value: Any


def top_k(like: Params, *, share: float) -> Codec:
    """The numbers largest in absolute value over the whole update, each with its place.

    Args:
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the updates' shapes.
        share: in (0, 1], of the numbers; at least one is sent.

    Returns:
        A `Codec` without state. A place costs about log2(1 / share) + 1.5 bits, a number 32: see `quantized`.

    Raises:
        ValueError: share out of range.

    Guarantees:
        A contraction, as needed for `error_feedback`: |C(x) - x|^2 <= (1 - k / D) |x|^2. Biased.

    Source: Stich, Cordonnier, Jaggi, Sparsified SGD with Memory, 2018, https://arxiv.org/abs/1809.07599,
        definition 2.1.
    """
    check.fraction("share", share, zero=False)
    size = trees.size(like)
    num = max(1, round(share * size))

    def encode(key: Key, state: Any, update: Params) -> tuple[Chosen, Any]:
        del key
        flat = trees.to_flat(update)
        place = jnp.sort(jax.lax.top_k(jnp.abs(flat), num)[1])
        return Chosen(place, flat[place]), state

    def decode(code: Chosen) -> Params:
        return trees.from_flat(like, jnp.zeros(size).at[code.place].set(code.value, mode="drop"))

    shape = Chosen(jax.ShapeDtypeStruct((num,), jnp.int32), jax.ShapeDtypeStruct((num,), jnp.float32))
    return assemble(_nothing, encode, decode, shape, largest={"int32": size - 1})


def random_k(like: Params, *, share: float, unbiased: bool) -> Codec:
    """Numbers at random places, which sender and receiver draw from one seed: places cost four bytes in all.

    Args:
        like: a pytree of arrays or `jax.ShapeDtypeStruct`, of the updates' shapes.
        share: in (0, 1], of the numbers; at least one is sent.
        unbiased: whether to send the numbers times D / k, so that the mean over keys is the update. False for
            `error_feedback`, which needs a contraction.

    Returns:
        A `Codec` without state.

    Raises:
        ValueError: share out of range.

    Guarantees:
        Unbiased: E C(x) = x, E |C(x) - x|^2 = (D / k - 1) |x|^2. Else: E |C(x) - x|^2 = (1 - k / D) |x|^2.

    Source: Stich, Cordonnier, Jaggi 2018, https://arxiv.org/abs/1809.07599, definition 2.1; unbiased: Konečný et al.
        2016, https://arxiv.org/abs/1610.05492, section 2.
    """
    check.fraction("share", share, zero=False)
    size = trees.size(like)
    num = max(1, round(share * size))
    factor = size / num if unbiased else 1.0

    def places(seed: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.key(seed, impl="threefry2x32"), size)[:num]

    def encode(key: Key, state: Any, update: Params) -> tuple[Drawn, Any]:
        seed = jax.random.bits(key, (), jnp.uint32)
        return Drawn(seed, factor * trees.to_flat(update)[places(seed)]), state

    def decode(code: Drawn) -> Params:
        return trees.from_flat(like, jnp.zeros(size).at[places(code.seed)].set(code.value))

    shape = Drawn(jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct((num,), jnp.float32))
    return assemble(_nothing, encode, decode, shape)


def identity(like: Params) -> Codec:
    """The update as it is, 32 bits a number.

    Args:
        like: a pytree of float32 arrays or `jax.ShapeDtypeStruct`, of the updates' shapes.

    Raises:
        ValueError: an array of another dtype.
    """
    for leaf in jax.tree.leaves(like):
        check.require(leaf.dtype == jnp.float32, "dtype of an update", leaf.dtype.name, "float32")
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), like)
    return assemble(_nothing, lambda key, state, update: (update, state), lambda code: code, shape)


def _nothing(params: Params) -> tuple[()]:
    del params
    return ()
