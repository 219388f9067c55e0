"""As little pruning as a budget allows: of arithmetic, parameters, bytes, time, whatever can be measured."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedrobust import check, trace, trees
from fedrobust.compression.artifact import save
from fedrobust.compression.pruning import Apply, Channels, masks_from_units, shrink
from fedrobust.compression.quantization import quantize
from fedrobust.compression.selection import choose, scored
from fedrobust.types import Key, Params

Measure = Callable[[Apply, Params], float]
"""`(apply, params) -> cost`, any positive number; smaller models should cost less."""


def masks_within(
    apply: Apply,
    channels: Channels,
    params: Params,
    *,
    measure: Measure,
    budget: float,
    score: str | Any = "l2",
    scope: str = "uniform",
    multiple_of: int = 1,
    key: Key | None = None,
) -> Params:
    """The masks of the lowest sparsity at which the shrunk model costs at most a share of the dense one.

    Every sparsity at which one more unit goes is a candidate; bisection measures about log2(number of units) of the
    shrunk models, and the dense one.

    Args:
        apply: the model that `channels` was read from.
        channels: its units.
        params: its parameters, concrete.
        measure: `(small apply, small params) -> cost`, such as `measure_flops(image)`, `measure_parameters`,
            `measure_bytes`, or a time: `lambda *model: fedrobust.evaluation.latencies(model, ...)[0].median_ms`.
        budget: in (0, 1], the share of the dense model's cost.
        score: as for `masks`, and so on to `key`.
        scope: likewise.
        multiple_of: likewise.
        key: likewise.

    Returns:
        Masks, as `masks` returns them.

    Raises:
        ValueError: a setting out of range as for `masks`, or a budget below what the sparsest model costs.

    Guarantees:
        The very model that is returned was measured within the budget. It is the largest such one where the cost falls
        with the sparsity; a measured time, which is noisy, may end a unit or two away from it.
    """
    check.fraction("budget", budget, zero=False)
    scores = scored(channels, params, score, key)

    def chosen(sparsity: float) -> Params:
        keep = choose(channels, scores, sparsity=sparsity, scope=scope, multiple_of=multiple_of)
        return masks_from_units(channels, keep)

    def share(masks: Params) -> float:
        small, small_apply = shrink(apply, channels, params, masks, verify=False)  # it would compile each one
        return measure(small_apply, small) / dense

    if budget == 1:
        return chosen(0.0)
    dense = measure(apply, params)
    candidates = _sparsities(channels, scope)
    within = chosen(candidates[-1])
    lowest = share(within)
    check.require(lowest <= budget, "budget", budget, f">= {lowest:.4g}, what the sparsest model costs")
    low, high = -1, len(candidates) - 1
    while high - low > 1:
        middle = (low + high) // 2
        masks = chosen(candidates[middle])
        if share(masks) <= budget:
            high, within = middle, masks
        else:
            low = middle
    return within


def measure_flops(image: Any) -> Measure:
    """Measures the floating-point operations of one call; see `fedrobust.trace.flops`.

    Args:
        image: an example [1,H,W,C] or its `jax.ShapeDtypeStruct`.
    """
    return lambda apply, params: float(trace.flops(apply, params, image))


def measure_parameters(apply: Apply, params: Params) -> float:
    """Measures the number of scalars."""
    return float(trees.size(params))


def measure_bytes(apply: Apply, params: Params) -> float:
    """Measures the size of the int8 model's file, but for the few bytes that say which units were kept."""
    # The size follows from the shapes; to quantize for it would compile once more for every size of the model.
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(quantize, params))
    with tempfile.TemporaryDirectory() as folder:
        return float(save(Path(folder) / "model.safetensors", zeros, guarantee={}))


def _sparsities(channels: Channels, scope: str) -> list[float]:
    """Where one more unit goes, in ascending order, in [0, 1)."""
    sizes = [len(channels.group)] if scope == "global" else np.bincount(channels.group)
    return sorted({0.0, *(int(k) / int(n) for n in sizes for k in range(1, n))})
