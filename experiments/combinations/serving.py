"""The model as it is served: in as many bits as the study says, from its file."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.combinations.federation import Apply
from experiments.combinations.pruning import require_equal
from experiments.combinations.settings import MC
from experiments.combinations.training import Trained
from fedrobust import compression, threads
from fedrobust.types import LogitsFn, Model, Params


class Final(NamedTuple):
    """The model that is served.

    Attributes:
        apply: its function; where activations are rounded, with a straight-through slope for attacks.
        params: what it runs with: float32, dequantized where only weights are rounded, else `Quantized`.
        bytes: of its file.
        twin: `image[B,H,W,C] -> logits[B,L]`, its weights on activations that are not rounded; None where none is.
    """

    apply: Apply
    params: Params
    bytes: int
    twin: LogitsFn | None


def as_served(trained: Trained, settings: MC, images: np.ndarray) -> compression.Stored:
    """A trained model in the bits it is served in: float32 where nothing was pruned.

    Args:
        trained: the model.
        settings: how many bits.
        images: [B,H,W,C], on which ranges of activations are measured; looked at only where those are rounded.
    """
    if trained.masks is None:
        return compression.Stored(trained.params, trained.apply, None)
    params = compression.quantize(trained.params, bits=settings.bits, symmetric=settings.symmetric)
    ranges = None
    if settings.activations == "int8":
        ranges = compression.calibrate(trained.apply, compression.dequantize(params), images)
    return compression.Stored(params, trained.apply, ranges)


def runnable(served: compression.Stored) -> tuple[Apply, Params]:
    """What is attacked and measured: a function and its parameters."""
    if served.ranges is not None:
        return _on_integers(served.apply, tuple(served.ranges.items())), served.params
    quantized = isinstance(served.params, compression.Quantized)
    return served.apply, compression.dequantize(served.params) if quantized else served.params


@threads.cached(maxsize=16)  # one function for equal models: what is compiled for it is found again
def _on_integers(apply: Apply, ranges: tuple[tuple[int, tuple[float, int]], ...]) -> Apply:
    """The values are those of the integers; the slope lets attacks and their gate through the rounding."""
    return compression.integer_apply(apply, dict(ranges), straight_through=True)


def finish(
    model: Model,
    trained: Trained,
    served: compression.Stored,
    path: Path,
    guarantee: dict[str, Any] | None,
    image: np.ndarray,
) -> Final:
    """Writes the model's file, and reads back what everything is measured on.

    Args:
        model: the full architecture.
        trained: the model.
        served: its bits.
        path: of the file.
        guarantee: what its training guarantees.
        image: [B,H,W,C], on which the file's model must say what the measured one says.

    Raises:
        RuntimeError: the model that runs from the file and the one measured differ in their logits on `image`.
    """
    size = compression.save(
        path, served.params, channels=trained.channels, masks=trained.masks, ranges=served.ranges,
        guarantee={"privacy": guarantee},
    )  # fmt: skip
    in_file = from_file(model, path, image)
    # One function for all models of a shape shares what is compiled for it; the file's own must agree with it.
    apply, _ = runnable(served)
    of_file, measured = (jax.jit(function)(in_file.params, image) for function in (in_file.apply, apply))
    require_equal(of_file, measured, str(path))
    return in_file._replace(apply=apply, bytes=size)


def from_file(model: Model, path: Path, image: np.ndarray) -> Final:
    """The model in a file that `finish` wrote.

    Args:
        model: the full architecture.
        path: of the file.
        image: [B,H,W,C], of the shape the model is asked about.

    Raises:
        ValueError: no such file, or not of this architecture.
    """
    full = jax.eval_shape(model.init, jax.random.key(0), image[:1])
    found = compression.stored(path, model.apply, full, image[:1])
    return Final(*runnable(found), path.stat().st_size, _twin(found))


def _twin(served: compression.Stored) -> LogitsFn | None:
    if served.ranges is None:
        return None
    apply, params = served.apply, compression.dequantize(served.params)
    return lambda image: apply(params, image)
