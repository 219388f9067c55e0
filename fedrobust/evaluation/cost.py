"""What a model costs: parameters, bytes on disk, arithmetic, memory, time."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, trace, trees
from fedrobust.types import Params

Apply = Callable[[Params, jax.Array], jax.Array]


class Latency(NamedTuple):
    """Warm time of one call, in milliseconds.

    Attributes:
        median_ms: over the calls.
        p95_ms: what 95 % of the calls stayed within, interpolated.
    """

    median_ms: float
    p95_ms: float


class Cost(NamedTuple):
    """The cost of one model.

    Attributes:
        parameters: number of scalars.
        bytes: size of its file.
        flops: floating-point operations for one image.
        peak_bytes: batch size -> memory of one call as compiled: parameters, images, logits and all that lies between.
        latency: batch size -> time of one call.
    """

    parameters: int
    bytes: int
    flops: int
    peak_bytes: Mapping[int, int]
    latency: Mapping[int, Latency]


def costs(
    *models: tuple[Apply, Params, int],
    image_shape: tuple[int, int, int],
    batch_sizes: Sequence[int] = (1, 64),
    num_repeats: int = 25,
) -> list[Cost]:
    """Measures several models on the default device, timed in turns in the same minutes.

    Args:
        *models: `(apply, params, size of the file in bytes)` each, `apply` being
            `(params, image[B,H,W,C]) -> logits[B,L]`.
        image_shape: (H, W, C).
        batch_sizes: images per call, each >= 1.
        num_repeats: timed rounds over all models >= 1, for each batch size.

    Returns:
        One `Cost` per model. Only latencies vary from call to call; compare them within one call only.

    Raises:
        ValueError: a batch size or num_repeats < 1.

    Guarantees:
        `peak_bytes` is what the compiler planned for one call, an upper bound on what the call holds at once, and the
        same in every run. It leaves out the compiled code and what the runtime holds for itself.
    """
    pairs = [(apply, params) for apply, params, _ in models]
    measured = {size: _measured(pairs, image_shape, size, num_repeats) for size in batch_sizes}
    one = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return [
        Cost(
            trees.size(params),
            file_bytes,
            trace.flops(apply, params, one),
            {size: peak[i] for size, (peak, _) in measured.items()},
            {size: latency[i] for size, (_, latency) in measured.items()},
        )
        for i, (apply, params, file_bytes) in enumerate(models)
    ]


def latencies(
    *models: tuple[Apply, Params], image_shape: tuple[int, int, int], batch_size: int, num_repeats: int = 15
) -> list[Latency]:
    """Warm time of a batch for several models, timed in turn so that a busy machine slows all of them alike.

    Args:
        *models: `(apply, params)` each.
        image_shape: (H, W, C).
        batch_size: images per call >= 1.
        num_repeats: timed rounds over all models >= 1.

    Returns:
        One `Latency` per model. Compilation is not part of it.

    Raises:
        ValueError: batch_size or num_repeats < 1.
    """
    return _measured(models, image_shape, batch_size, num_repeats)[1]


def _measured(
    models: Sequence[tuple[Apply, Params]], image_shape: tuple[int, int, int], batch_size: int, num_repeats: int
) -> tuple[list[int], list[Latency]]:
    """Bytes that a call takes, and its time, of each model."""
    check.at_least("batch_size", batch_size, 1)
    check.at_least("num_repeats", num_repeats, 1)
    image = jnp.zeros((batch_size, *image_shape))
    programs = [jax.jit(apply).lower(params, image).compile() for apply, params in models]

    def milliseconds(index: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(programs[index](models[index][1], image))
        return 1e3 * (time.perf_counter() - start)

    rounds = [[milliseconds(i) for i in range(len(models))] for _ in range(num_repeats + 1)]
    # The first round warms up.
    times = [Latency(float(np.median(t)), float(np.quantile(t, 0.95))) for t in zip(*rounds[1:], strict=True)]
    return [_peak_bytes(program) for program in programs], times


def _peak_bytes(program: jax.stages.Compiled) -> int:
    memory: Any = program.memory_analysis()
    taken = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(taken - memory.alias_size_in_bytes)
