"""A model as StableHLO: what XLA compiles, parameters inside, without the Python that made it."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from fedrobust.compression.artifact import guarantee_text, write
from fedrobust.types import LogitsFn, Params

PLATFORMS = ("cpu", "cuda", "tpu")
_MAGIC = b"fedrobust stablehlo 1\n"


def save_stablehlo(
    path: str | os.PathLike[str],
    apply: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    *,
    image_shape: tuple[int, int, int],
    guarantee: Mapping[str, Any],
) -> int:
    """Writes a model that any JAX of the next years runs on CPU, GPU or TPU, whole or not at all.

    Args:
        path: the file; its folder must exist. An older file of that name is replaced.
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`.
        params: its parameters, stored in the file as they are.
        image_shape: [H,W,C].
        guarantee: what the training guarantees, as JSON types; {} where nothing.

    Returns:
        The size of the file in bytes: a line with the format, one with the digest and the guarantee, then what
        `jax.export` serialized, whose `mlir_module_serialized` other runtimes read.

    Raises:
        ValueError: a guarantee that is not JSON.

    Guarantees:
        The file fits every batch size. `jax.export` promises to read it for six months and longer.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    image = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    exported = jax.export.export(jax.jit(lambda image: apply(params, image)), platforms=PLATFORMS)(image)
    body = bytes(exported.serialize())
    text = guarantee_text(guarantee).encode()
    data = _MAGIC + _digest(text, body) + b" " + text + b"\n" + body
    write(Path(path), data)
    return len(data)


def load_stablehlo(path: str | os.PathLike[str]) -> LogitsFn:
    """A model that runs from a file; neither its source nor its parameters are needed.

    Args:
        path: a file that `save_stablehlo` wrote.

    Returns:
        `image[B,H,W,C] float32 -> logits[B,L]`, a pure function for `jit` and `vmap`, without derivatives.

    Raises:
        ValueError: one line naming the file, if it is damaged, truncated, or not such a file.
        OSError: if it cannot be read at all.
    """
    data = Path(path).read_bytes()
    head, _, body = data.removeprefix(_MAGIC).partition(b"\n")
    digest, _, text = head.partition(b" ")
    if not data.startswith(_MAGIC) or digest != _digest(text, body):
        raise ValueError(f"{os.fspath(path)}: damaged, or not a StableHLO file that save_stablehlo wrote")
    return jax.export.deserialize(bytearray(body)).call


def _digest(text: bytes, body: bytes) -> bytes:
    return hashlib.sha256(text + b"\n" + body).hexdigest()[:32].encode()
