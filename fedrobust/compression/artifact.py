"""A model in a file: safetensors, with what is needed to run it and the guarantee it was trained under."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialize

from fedrobust import check, trace
from fedrobust.compression import packing
from fedrobust.compression.integer import integer_apply
from fedrobust.compression.pruning import Channels, find_channels, kept_units, shrink_apply, slice_shapes
from fedrobust.compression.quantization import Quantized, dequantize
from fedrobust.compression.ranges import Ranges, integer_layers
from fedrobust.types import Params

VERSION = "2"

Apply = Callable[[Params, jax.Array], jax.Array]


class Stored(NamedTuple):
    """What a file holds.

    Attributes:
        params: as they were given to `save`: float32, or `Quantized`.
        apply: the model of float32 parameters of these shapes, `(params, image[B,H,W,C]) -> logits[B,L]`.
        ranges: of the activations that are rounded; None where none are.
    """

    params: Params | Quantized
    apply: Apply
    ranges: dict[int, tuple[float, int]] | None


def save(
    path: str | os.PathLike[str],
    params: Params | Quantized,
    *,
    channels: Channels | None = None,
    masks: Params | None = None,
    ranges: Ranges | None = None,
    guarantee: Mapping[str, Any],
) -> int:
    """Writes a model, whole or not at all.

    Args:
        path: the file; its folder must exist. An older file of that name is replaced.
        params: the parameters to run with, as float32 or as `quantize` returned them: of the full model, or of the
            shrunk one if `channels` and `masks` say how it was shrunk.
        channels: the full model's units, if it was shrunk.
        masks: the masks it was shrunk with.
        ranges: what `calibrate` returned, if activations are rounded to 8 bits; only with quantized parameters.
        guarantee: what the training guarantees (epsilon, delta, unit, radius...), as JSON types; {} where nothing.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: parameters that are not finite or do not belong to `channels` and `masks`, one of those without the
            other, ranges without quantized parameters, or a guarantee that is not JSON.
    """
    check.require((channels is None) == (masks is None), "channels and masks", "one of the two", "given together")
    quantized = ranges is None or isinstance(params, Quantized)
    check.require(quantized, "params", "float", "quantized where there are ranges")
    values = params.value if isinstance(params, Quantized) else params
    shapes = [x.shape for x in jax.tree.leaves(values)]
    keep = "" if channels is None else np.packbits(kept_units(channels, masks)).tobytes().hex()
    if channels is not None:
        expected = slice_shapes(channels, kept_units(channels, masks))
        check.require(shapes == expected, "params shapes", shapes, f"{expected}, as channels and masks say")
    metadata = {
        "fedrobust": VERSION,
        "model": _fingerprint(packing.names(values), shapes, channels if keep else None),  # nothing to keep: no units
        "kept": keep,
        "guarantee": guarantee_text(guarantee),
    }
    tensors = packing.pack(params)
    if ranges is not None:
        tensors[packing.RANGES] = np.array([(i, *mapping) for i, mapping in sorted(ranges.items())], np.float32)
    for name, tensor in tensors.items():
        check.require(bool(np.isfinite(tensor).all()), f"params {name}", "not finite", "finite")
    data = serialize(tensors, {**metadata, "digest": _digest(tensors, metadata)})
    write(Path(path), data)
    return len(data)


def load(path: str | os.PathLike[str], apply: Apply, params: Params, image: Any) -> tuple[Params, Apply]:
    """A model that runs from a file.

    Args:
        path: a file that `save` wrote.
        apply: the full model, `(params, image[B,H,W,C]) -> logits[B,L]`.
        params: the full model's parameters or their shapes, such as `jax.eval_shape(model.init, key, image)`.
        image: an example [1,H,W,C] or its `jax.ShapeDtypeStruct`.

    Returns:
        `(small params, small apply)`: float32 parameters, bit-equal to what was saved (dequantized), and the function
        that runs on them. Where activations are rounded: `Quantized` parameters and the function of `integer_apply`.

    Raises:
        ValueError: one line naming the file, if it is damaged, truncated, not such a file, or of a model whose
            parameters have other names or shapes, or other units where it was shrunk.
        OSError: if it cannot be read at all.
    """
    found = stored(path, apply, params, image)
    if found.ranges is not None:
        return found.params, integer_apply(found.apply, found.ranges)
    return dequantize(found.params) if isinstance(found.params, Quantized) else found.params, found.apply


def stored(path: str | os.PathLike[str], apply: Apply, params: Params, image: Any) -> Stored:
    """The parts of a model in a file, for whoever runs it in another way than `load`.

    Args:
        path: as of `load`.
        apply: as of `load`.
        params: as of `load`.
        image: as of `load`.

    Returns:
        The parameters in the bits they are stored in, the function of their float32 twins, and the ranges.

    Raises:
        ValueError: as of `load`.
        OSError: as of `load`.
    """
    tensors, metadata = _read(Path(path))
    shapes = [x.shape for x in jax.tree.leaves(params)]
    channels = find_channels(apply, params, image) if metadata["kept"] else None
    same = metadata["model"] == _fingerprint(packing.names(params), shapes, channels)
    _require(path, same, "holds a model with other parameters")
    if channels is not None:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(metadata["kept"]), np.uint8))
        keep = bits[: len(channels.group)].astype(bool)
        apply, shapes = shrink_apply(apply, channels, params, keep), slice_shapes(channels, keep)
    found = packing.unpack(tensors, params, shapes)
    _require(path, found is not None, "holds tensors of other shapes")
    if packing.RANGES not in tensors:
        return Stored(found, apply, None)
    ranges = {int(number): (float(scale), int(zero)) for number, scale, zero in tensors[packing.RANGES]}
    like = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    program = trace.read(apply, jax.tree.unflatten(jax.tree.structure(params), like), image)
    same = set(ranges) <= set(range(len(integer_layers(program, len(shapes)))))
    _require(path, same, "holds a model with other layers")
    return Stored(found, apply, ranges)


def guarantee(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the training of the model in a file guarantees, as it was saved.

    Args:
        path: a file that `save` wrote.

    Returns:
        The dict given to `save`.

    Raises:
        ValueError: one line naming the file, if it is damaged, truncated or not such a file.
    """
    return json.loads(_read(Path(path))[1]["guarantee"])


def guarantee_text(guarantee: Mapping[str, Any]) -> str:
    """A guarantee as JSON.

    Raises:
        ValueError: it is not JSON types, or holds a number that is not finite.
    """
    try:
        return json.dumps(dict(guarantee), allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"guarantee is {guarantee!r}: must be of JSON types, numbers finite") from error


def _fingerprint(names: Sequence[str], shapes: packing.Shapes, channels: Channels | None) -> str:
    """32 bits, as hexadecimal, of a full model: names and shapes of its parameters, its units where it was shrunk."""
    full = shapes if channels is None else channels.shapes
    digest = hashlib.sha256(repr([*zip(names, map(tuple, full), strict=True)]).encode())
    if channels is not None:
        for axes in channels.unit:
            for axis in axes:
                digest.update(np.asarray(axis, "<i8").tobytes())
    return digest.hexdigest()[:8]


def _digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()[:32]


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, through a temporary one beside it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    data = path.read_bytes()
    try:
        tensors = parse(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        digest, version = metadata.pop("digest"), metadata["fedrobust"]
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, or not a model file of this library") from error
    _require(path, version == VERSION, f"has format {version!r}, this library reads {VERSION!r}")
    _require(path, digest == _digest(tensors, metadata), "is damaged: its contents do not match its digest")
    return tensors, metadata


def _require(path: str | os.PathLike[str], condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(f"{os.fspath(path)}: {problem}")
