"""A code as bytes. Shapes are known to both sides, so nothing is sent but what the arrays hold, one after the other.

An array's dtype says what it holds, and so how it is written:

    float32, uint32    numbers and seeds: as they are, little-endian
    bool               signs: a bit each
    int32              places, distinct and ascending: the gaps between them, by `rice`
    uint8              sizes, small ones likely: by `rice`
    int8               levels, most of them 0: their places, signs and sizes less one
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check
from fedrobust.compression.codecs import rice
from fedrobust.types import Codec, Key, Params

KINDS = ("float32", "uint32", "bool", "int32", "uint8", "int8")
_LARGEST = {"int32": 2**31 - 1, "uint8": 255, "int8": 127}


def assemble(
    init: Callable[[Params], Any],
    encode: Callable[[Key, Any, Params], tuple[Any, Any]],
    decode: Callable[[Any], Params],
    shape: Any,
    *,
    largest: Mapping[str, int] | None = None,
) -> Codec:
    """A codec whose bytes follow from the shapes and dtypes of its code.

    Args:
        init: see `Codec`.
        encode: see `Codec`.
        decode: see `Codec`.
        shape: the code as a pytree of `jax.ShapeDtypeStruct`, dtypes as above.
        largest: by dtype, the largest place, size or level that a code may hold; what is not named is as the dtype has
            it.

    Returns:
        The `Codec`. `num_bits` reads the code alone, so it may be mapped over codes of many clients; `deserialize`
        refuses larger numbers.

    Raises:
        ValueError: an array of another dtype.
    """
    leaves, structure = jax.tree.flatten(shape)
    for leaf in leaves:
        check.one_of("dtype of a code", leaf.dtype.name, KINDS)
    limits = {**_LARGEST, **(largest or {})}

    def num_bits(code: Any) -> jax.Array:
        return jnp.asarray(8 * sum(map(_num_bytes, jax.tree.leaves(code))), jnp.int32)

    def serialize(code: Any) -> bytes:
        return b"".join(_write(np.asarray(x)) for x in jax.tree.leaves(code))

    def deserialize(data: bytes) -> Any:
        arrays = []
        for leaf in leaves:
            values, data = _read(data, int(np.prod(leaf.shape)), leaf.dtype, limits.get(leaf.dtype.name, 0))
            arrays.append(jnp.asarray(values.astype(leaf.dtype).reshape(leaf.shape)))
        check.require(not data, "bytes behind the code", len(data), "none")
        return jax.tree.unflatten(structure, arrays)

    return Codec(init, encode, decode, num_bits, shape, serialize, deserialize)


def _num_bytes(x: jax.Array) -> jax.Array | int:
    kind = x.dtype.name
    x = x.ravel()
    if kind == "bool":
        return -(-x.size // 8)
    if kind == "int32":
        return rice.num_bytes(jnp.diff(x, prepend=-1) - 1, jnp.ones(x.shape, bool))
    if kind == "uint8":
        return rice.num_bytes(x.astype(jnp.int32), jnp.ones(x.shape, bool))
    if kind == "int8":
        level = x.astype(jnp.int32)
        place = jnp.where(level != 0, jnp.arange(x.size), -1)
        last = jnp.concatenate([jnp.full(1, -1), jax.lax.cummax(place)[:-1]])  # before each, -1 at the start
        signs = (jnp.sum(level != 0) + 7) // 8
        return 4 + rice.num_bytes(place - last - 1, level != 0) + signs + rice.num_bytes(abs(level) - 1, level != 0)
    return 4 * x.size


def _write(x: np.ndarray) -> bytes:
    kind = x.dtype.name
    x = x.ravel()
    if kind == "bool":
        return np.packbits(x).tobytes()
    if kind == "int32":
        return rice.write(np.diff(x.astype(np.int64), prepend=-1) - 1)
    if kind == "uint8":
        return rice.write(x)
    if kind == "int8":
        (place,) = np.nonzero(x)
        level = x[place].astype(np.int64)
        count = np.asarray(len(place), "<u4").tobytes()
        gaps, sizes = rice.write(np.diff(place, prepend=-1) - 1), rice.write(abs(level) - 1)
        return count + gaps + np.packbits(level < 0).tobytes() + sizes
    return x.astype(x.dtype.newbyteorder("<")).tobytes()


def _read(data: bytes, size: int, dtype: np.dtype, largest: int) -> tuple[np.ndarray, bytes]:
    kind = dtype.name
    if kind == "bool":
        packed, data = _take(data, -(-size // 8))
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=size), data
    if kind == "int32":
        gaps, data = rice.read(data, size)
        place = np.cumsum(gaps + 1) - 1
        _at_most("last place", int(place[-1]) if size else 0, largest)
        return place, data
    if kind == "uint8":
        value, data = rice.read(data, size)
        _at_most("size", int(value.max(initial=0)), largest)
        return value, data
    if kind == "int8":
        return _read_levels(data, size, largest)
    packed, data = _take(data, 4 * size)
    return np.frombuffer(packed, dtype.newbyteorder("<")), data


def _read_levels(data: bytes, size: int, largest: int) -> tuple[np.ndarray, bytes]:
    packed, data = _take(data, 4)
    count = int(np.frombuffer(packed, "<u4")[0])
    _at_most("number of levels", count, size)
    gaps, data = rice.read(data, count)
    packed, data = _take(data, -(-count // 8))
    negative = np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool)
    sizes, data = rice.read(data, count)
    place = np.cumsum(gaps + 1) - 1
    _at_most("last place", int(place[-1]) if count else 0, size - 1 if count else 0)
    _at_most("size", 1 + int(sizes.max(initial=0)), largest)
    level = np.zeros(size, np.int8)
    level[place] = np.where(negative, -1 - sizes, 1 + sizes)
    return level, data


def _take(data: bytes, num: int) -> tuple[bytes, bytes]:
    check.require(len(data) >= num, "bytes left in the code", len(data), f"at least {num}")
    return data[:num], data[num:]


def _at_most(what: str, value: int, largest: int) -> None:
    check.require(value <= largest, f"{what} in the code", value, f"at most {largest}")
