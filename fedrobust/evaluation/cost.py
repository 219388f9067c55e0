"""What a model costs: parameters, bytes on disk, arithmetic, time."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrobust import check, trace, trees
from fedrobust.types import Params

Apply = Callable[[Params, jax.Array], jax.Array]


class Cost(NamedTuple):
    """The cost of one model.

    Attributes:
        parameters: number of scalars.
        bytes: size of its file.
        flops: floating-point operations for one image.
        latency_ms: warm time for one batch, in milliseconds, median over repeats.
    """

    parameters: int
    bytes: int
    flops: float
    latency_ms: float


def cost(
    apply: Apply,
    params: Params,
    *,
    image_shape: tuple[int, int, int],
    file_bytes: int,
    batch_size: int,
    num_repeats: int = 15,
) -> Cost:
    """Measures one model on the default device.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`.
        params: its parameters.
        image_shape: (H, W, C).
        file_bytes: size of the model's file.
        batch_size: images per timed call >= 1.
        num_repeats: timed calls >= 1.

    Returns:
        `Cost`. Only `latency_ms` varies from call to call; compare two models with `latencies` in one run.

    Raises:
        ValueError: batch_size or num_repeats < 1.
    """
    (latency_ms,) = latencies((apply, params), image_shape=image_shape, batch_size=batch_size, num_repeats=num_repeats)
    flops = trace.flops(apply, params, jnp.zeros((1, *image_shape)))
    return Cost(trees.size(params), file_bytes, flops, latency_ms)


def latencies(
    *models: tuple[Apply, Params], image_shape: tuple[int, int, int], batch_size: int, num_repeats: int = 15
) -> list[float]:
    """Warm time of a batch for several models, timed in turn so that a busy machine slows all of them alike.

    Args:
        *models: `(apply, params)` each.
        image_shape: (H, W, C).
        batch_size: images per call >= 1.
        num_repeats: timed rounds over all models >= 1.

    Returns:
        Milliseconds per call, median over rounds, one per model. Compilation is not part of it.

    Raises:
        ValueError: batch_size or num_repeats < 1.
    """
    check.at_least("batch_size", batch_size, 1)
    check.at_least("num_repeats", num_repeats, 1)
    image = jnp.zeros((batch_size, *image_shape))
    programs = [jax.jit(apply).lower(params, image).compile() for apply, params in models]

    def milliseconds(index: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(programs[index](models[index][1], image))
        return 1e3 * (time.perf_counter() - start)

    rounds = [[milliseconds(i) for i in range(len(models))] for _ in range(num_repeats + 1)]
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]  # the first round warms up
