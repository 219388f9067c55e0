"""The parameters of a model as the few tensors of its file, and back.

Matrices and kernels in float32 and int8 are named tensors, readable by any safetensors tool. All vectors lie end to end
in one tensor, all scales in another, all zero points in a third: a header entry takes about 75 bytes, more than a short
vector in 16 bits. So do weights in 4 bits, two to a byte, a type that the format does not have.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check
from fedrobust.compression.quantization import Quantized, is_weight
from fedrobust.types import Params

_VECTORS, _SCALES, _ZEROS, _NIBBLES = ":vectors", ":scales", ":zeros", ":nibbles"
RANGES = ":ranges"
"""Holds the ranges that `artifact.save` was given: [n,3] float32, number of a layer, scale, zero point."""
_RESERVED = (_VECTORS, _SCALES, _ZEROS, _NIBBLES, RANGES)

Shapes = Sequence[tuple[int, ...]]


def pack(params: Params | Quantized) -> dict[str, np.ndarray]:
    """The tensors that hold a model.

    Args:
        params: float arrays, stored as float32, or what `quantize` returned.

    Returns:
        name -> array.

    Raises:
        ValueError: two parameters of one name, or one with a name that is used here.
    """
    if not isinstance(params, Quantized):
        leaves = [np.asarray(x, np.float32) for x in jax.tree.leaves(params)]
        return {_VECTORS: _end_to_end(leaves, False, np.float32), **_named(params, leaves)}
    leaves = [np.asarray(x) for x in jax.tree.leaves(params.value)]
    tensors = {_VECTORS: _end_to_end(leaves, False, np.float16)}
    if any(x.dtype == jnp.int4 for x in leaves):
        tensors[_NIBBLES] = _to_nibbles(_end_to_end(leaves, True, np.int8))
        names(params.value)
    else:
        tensors |= _named(params.value, leaves)
    for name, tree, kind in ((_SCALES, params.scale, np.float16), (_ZEROS, params.zero, np.int8)):
        if tree is not None:
            own = [x for x, w in zip(jax.tree.leaves(tree), leaves, strict=True) if is_weight(w)]
            tensors[name] = np.concatenate([np.zeros(0, kind), *map(np.asarray, own)])
    return tensors


def unpack(tensors: Mapping[str, np.ndarray], like: Params, shapes: Shapes) -> Params | Quantized | None:
    """The parameters that tensors hold.

    Args:
        tensors: what `pack` returned.
        like: a pytree of the same structure.
        shapes: of its leaves.

    Returns:
        What was given to `pack`, bit by bit, or None if the tensors are not those of such parameters.
    """
    scales = tensors.get(_SCALES)
    of_weights = [shape for shape in shapes if len(shape) >= 2]
    vectors = _cut(tensors.get(_VECTORS), [shape for shape in shapes if len(shape) < 2])
    weights = _weights(tensors, names(like), shapes)
    if vectors is None or weights is None:
        return None

    def merged(of_weight: Sequence[np.ndarray], of_vector: Sequence[np.ndarray]) -> Params:
        own, other = iter(of_weight), iter(of_vector)
        leaves = [jnp.asarray(next(own) if len(shape) >= 2 else next(other)) for shape in shapes]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    value = merged(weights, vectors)
    if scales is None:
        return value
    last = [shape[-1:] for shape in of_weights]
    scale, zero = _cut(scales, last), _cut(tensors[_ZEROS], last) if _ZEROS in tensors else []
    if scale is None or zero is None:
        return None
    scale_tree = merged(scale, [np.ones((), np.float16)] * len(vectors))
    if _ZEROS not in tensors:
        return Quantized(value, scale_tree)
    return Quantized(value, scale_tree, merged(zero, [np.zeros((), np.int8)] * len(vectors)))


def names(tree: Params) -> list[str]:
    """The name of each leaf: its path, with slashes.

    Raises:
        ValueError: two of one name, or one that is used here.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    found = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    check.require(len({*found, *_RESERVED}) == len(found) + len(_RESERVED), "params names", found, "all different")
    return found


def _named(tree: Params, leaves: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(x) for name, x in zip(names(tree), leaves, strict=True) if is_weight(x)}


def _end_to_end(leaves: Sequence[np.ndarray], weights: bool, kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, kind), *(x.ravel().astype(kind) for x in leaves if is_weight(x) == weights)])


def _to_nibbles(values: np.ndarray) -> np.ndarray:
    """[n] int8 in [-8, 7] -> [ceil(n / 2)] uint8, the first of a pair in the lower half; an odd end is filled up."""
    pairs = np.pad(values, (0, len(values) % 2)).reshape(-1, 2).astype(np.uint8) & 15
    return pairs[:, 0] | pairs[:, 1] << 4


def _from_nibbles(packed: np.ndarray, num: int) -> np.ndarray:
    """The first `num` of the pairs, [num] int8 in [-8, 7]."""
    halves = np.stack([packed & 15, packed >> 4], axis=1).ravel()[:num].astype(np.int8)
    return (halves ^ 8) - np.int8(8)


def _weights(tensors: Mapping[str, np.ndarray], every: Sequence[str], shapes: Shapes) -> list[np.ndarray] | None:
    expected = {name: shape for name, shape in zip(every, shapes, strict=True) if len(shape) >= 2}
    found = {name: tensor.shape for name, tensor in tensors.items() if name not in _RESERVED}
    if _NIBBLES not in tensors:
        return [tensors[name] for name in expected] if found == expected else None
    num = sum(int(np.prod(shape)) for shape in expected.values())
    if found or tensors[_NIBBLES].shape != ((num + 1) // 2,):
        return None
    cut = _cut(_from_nibbles(tensors[_NIBBLES], num), list(expected.values()))
    return cut and [x.astype(jnp.int4) for x in cut]


def _cut(flat: np.ndarray | None, shapes: Shapes) -> list[np.ndarray] | None:
    """Arrays that lie end to end, or None if their sizes do not add up."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    if flat is None or flat.shape != (sum(sizes),):
        return None
    parts = np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
