"""A model as an ONNX file that onnxruntime runs, checked there before it is kept."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import helper

from fedrobust import trace
from fedrobust.compression.artifact import guarantee_text, write
from fedrobust.compression.export.graph import SIZES, Graph, Length, Value, Weight, fixed, require_known
from fedrobust.compression.export.rules import RULES
from fedrobust.compression.integer import layers_of
from fedrobust.compression.quantization import Quantized, dequantize, is_weight
from fedrobust.compression.ranges import Ranges
from fedrobust.types import Params

OPSET, IR_VERSION = 19, 9
_UNSEALED = "0" * 32
TOLERANCE = 1e-4
"""Largest difference between logits here and in onnxruntime, over the largest logit or 1, at which a file is kept."""

Apply = Callable[[Params, jax.Array], jax.Array]


def save_onnx(
    path: str | os.PathLike[str],
    apply: Apply,
    params: Params | Quantized,
    *,
    image_shape: tuple[int, int, int],
    guarantee: Mapping[str, Any],
    ranges: Ranges | None = None,
) -> int:
    """Writes a model for onnxruntime, whole or not at all: input `image` [B,H,W,C] float32, output `logits` [B,L].

    Args:
        path: the file; its folder must exist. An older file of that name is replaced.
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, such as the small function that `shrink` returned.
        params: its parameters in float32, or as `quantize` returned them: then every weight is stored as int8 (one in 4
            bits too) behind a DequantizeLinear of its channels, a quarter of the bytes.
        image_shape: [H,W,C].
        guarantee: what the training guarantees, as JSON types; {} where nothing. It travels in the file's metadata.
        ranges: what `calibrate` returned, or a part: the input of these layers is rounded by a QuantizeLinear and
            DequantizeLinear.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: a model with an operation that ONNX or this export does not know or with logits that are not [B,L],
            ranges of another model, a guarantee that is not JSON.
        RuntimeError: onnxruntime computes other logits than the model; nothing is written. With `ranges` the two are
            not compared: the caller compares labels with its own integer model.

    Guarantees:
        The file fits every batch size. It holds no code and names no path.
    """
    values = dequantize(params) if isinstance(params, Quantized) else params
    programs = [trace.read(apply, values, _example(size, image_shape)) for size in SIZES]
    mappings = {
        output: (layer.scale, layer.zero) for output, (layer, _) in layers_of(programs[0], ranges or {}).items()
    }
    image = Value((Length(1, 0), *fixed(image_shape)), np.dtype(np.float32), name="image")
    graph = Graph(RULES, image.name)
    [logits] = graph.write((programs[0], programs[1]), [*_parameters(params), image], mappings)
    fits = len(logits.shape) == 2 and logits.shape[0] == Length(1, 0)
    require_known(fits, f"logits of {len(logits.shape)} axes that are not [B,L]")
    model = _model(graph, graph.use(logits), image_shape, logits.shape[1].plus, guarantee)
    data = _sealed(model)
    if not ranges:
        _require_equal(path, data, apply, values, image_shape)
    write(Path(path), data)
    return len(data)


def load_onnx(path: str | os.PathLike[str]) -> Callable[[Any], np.ndarray]:
    """A model that runs from a file in onnxruntime, on the host.

    Args:
        path: a file that `save_onnx` wrote.

    Returns:
        `image[B,H,W,C] float32 -> logits[B,L]`, NumPy arrays.

    Raises:
        ValueError: one line naming the file, if it is damaged, truncated, or not such a file.
        OSError: if it cannot be read at all.
    """
    data = Path(path).read_bytes()
    if not _is_sealed(data):
        raise ValueError(f"{os.fspath(path)}: damaged, or not an ONNX file that save_onnx wrote")
    return _runner(data)


def _example(size: int, image_shape: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *image_shape), jnp.float32)


def _parameters(params: Params | Quantized) -> list[Value]:
    """The leaves as the graph takes them: weights in 8 bits by themselves, the others as float32 constants."""
    if not isinstance(params, Quantized):
        arrays = [np.asarray(x, np.float32) for x in jax.tree.leaves(params)]
        return [Value(fixed(x.shape), x.dtype, constant=x) for x in arrays]
    zeros = [np.int8(0)] * len(jax.tree.leaves(params.value)) if params.zero is None else jax.tree.leaves(params.zero)
    return [_leaf(*each) for each in zip(*map(jax.tree.leaves, (params.value, params.scale)), zeros, strict=True)]


def _leaf(value: Any, scale: Any, zero: Any) -> Value:
    stored, float32 = np.asarray(value), np.dtype(np.float32)
    if not is_weight(stored):
        return Value(fixed(stored.shape), float32, constant=stored.astype(float32))
    scale = np.asarray(scale, float32)
    weight = Weight(stored.astype(np.int8), scale, np.broadcast_to(np.asarray(zero, np.int8), scale.shape))
    return Value(fixed(stored.shape), float32, weight=weight)


def _model(
    graph: Graph, logits: str, image_shape: tuple[int, int, int], num_classes: int, guarantee: Mapping[str, Any]
) -> onnx.ModelProto:
    last = helper.make_node("Identity", [logits], ["logits"])
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("image", image_shape), ("logits", (num_classes,)))
    ]
    nodes, tensors = graph.needed_by(last)
    body = helper.make_graph(nodes, "model", ends[:1], ends[1:], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name = "fedrobust"
    helper.set_model_props(model, {"guarantee": guarantee_text(guarantee)})
    onnx.checker.check_model(model, full_check=True)
    return model


def _sealed(model: onnx.ModelProto) -> bytes:
    """The file: the model, with the digest of its own bytes (zeros in the digest's place) in its metadata."""
    entry = model.metadata_props.add()
    entry.key, entry.value = "digest", _UNSEALED
    data = model.SerializeToString()
    return _with_last(data, _UNSEALED, _digest(data))


def _is_sealed(data: bytes) -> bool:
    """Whether a file's bytes are those that were written."""
    try:
        found = {entry.key: entry.value for entry in onnx.ModelProto.FromString(data).metadata_props}
    except DecodeError:
        return False
    digest = found.get("digest", "")
    return len(digest) == len(_UNSEALED) and digest == _digest(_with_last(data, digest, _UNSEALED))


def _with_last(data: bytes, old: str, new: str) -> bytes:
    """The last `old` replaced: metadata come after the weights, which may hold any bytes."""
    return new.encode().join(data.rsplit(old.encode(), 1))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[: len(_UNSEALED)]


def _runner(data: bytes) -> Callable[[Any], np.ndarray]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"image": np.asarray(image, np.float32)})[0]


def _require_equal(path: Any, data: bytes, apply: Apply, params: Params, image_shape: tuple[int, int, int]) -> None:
    """Compares both sides on random images, a batch and its first image alone, sizes that the model was not read at."""
    run = _runner(data)
    image = np.random.default_rng(0).uniform(size=(4, *image_shape)).astype(np.float32)
    here = np.asarray(jax.jit(apply)(params, image))
    difference = max(float(np.max(np.abs(here[:num] - run(image[:num])))) for num in (1, 4))
    if not difference <= TOLERANCE * max(1.0, float(np.max(np.abs(here)))):
        raise RuntimeError(f"{os.fspath(path)}: onnxruntime's logits differ by {difference:.2g} from the model's")
