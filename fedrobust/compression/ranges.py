"""Which values flow into a model's convolutions and matrix products, and how they are mapped to 8 bits."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, trace
from fedrobust.trace.program import apply_equation
from fedrobust.types import Params

LOW, HIGH = -128, 127

Ranges = Mapping[int, tuple[float, int]]
"""Number of a layer, in the order of `integer_layers` -> (scale, zero point) of its input: x stands for
round(x / scale) + zero point in [-128, 127]. Scales are float32 > 0; the value 0 is met exactly."""


def calibrate(
    apply: Callable[[Params, jax.Array], jax.Array], params: Params, images: Any, *, percentile: float = 100.0
) -> dict[int, tuple[float, int]]:
    """Measures the inputs of every convolution and matrix product with a parameter, on images.

    The ranges are part of the served model, so this is a look at the images: where they are private the caller charges
    its ledger for it, and no noise protects them here. Public images of the same kind cost nothing, nor does noise.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, the model in float32.
        params: what it will run with: `dequantize(quantize(params))`.
        images: [N,H,W,C], all evaluated at once; a hundred are enough.
        percentile: in (50, 100], of the values that a range must hold on either side; 100 for all of them.

    Returns:
        `Ranges` of the layers that `integer_apply` can compute in integers, see there.

    Raises:
        ValueError: a percentile out of range, no images, values that are not finite.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.1; Krishnamoorthi 2018 (arXiv 1806.08342), section 3.1.1.
    """
    check.require(50 < percentile <= 100, "percentile", percentile, "in (50, 100]")
    check.at_least("the number of images", len(images), 1)
    program = trace.read(apply, params, images)
    layers = integer_layers(program, len(program.inputs) - 1)
    at = {equation.outputs[0]: number for number, (equation, _) in enumerate(layers)}

    @jax.jit
    def observe(inputs: list[jax.Array]) -> dict[int, tuple[jax.Array, jax.Array]]:
        seen = {}

        def emit(equation: trace.Equation, *arrays: Any) -> list[Any]:
            if equation.outputs[0] in at:
                seen[at[equation.outputs[0]]] = _ends(arrays[0], percentile)
            return apply_equation(equation, *arrays)

        trace.evaluate(program, inputs, emit)
        return seen

    ends = jax.device_get(observe(jax.tree.leaves((params, images))))
    return {number: _mapping(float(low), float(high)) for number, (low, high) in sorted(ends.items())}


def integer_layers(program: trace.Program, num_leaves: int) -> list[tuple[trace.Equation, int]]:
    """The layers that can be computed in integers, the same for every batch size: what else a program holds is not.

    Args:
        program: of a model; its first inputs are the parameter leaves.
        num_leaves: how many these are.

    Returns:
        In the order of the program, each layer's equation and the number of the leaf that is its kernel: a
        convolution's or a matrix product's second operand whose last axis makes the output channels.
    """
    leaf = {number: i for i, number in enumerate(program.inputs[:num_leaves])}
    return [
        (equation, leaf[equation.inputs[1]])
        for equation in program.equations
        if equation.name in ("conv_general_dilated", "dot_general")
        and equation.inputs[1] in leaf
        and equation.inputs[0] not in leaf
        and _last_axis_is_output(equation, len(program.values[equation.inputs[1]].shape))
    ]


def _last_axis_is_output(equation: trace.Equation, ndim: int) -> bool:
    dimensions = equation.settings["dimension_numbers"]
    if equation.name == "conv_general_dilated":
        return dimensions.rhs_spec[0] == ndim - 1 and equation.settings["batch_group_count"] == 1
    (_, summed), (batch, _) = dimensions
    return ndim >= 2 and not batch and len(summed) > 0 and ndim - 1 not in summed


def _ends(x: jax.Array, percentile: float) -> tuple[jax.Array, jax.Array]:
    if percentile == 100:
        return jnp.min(x), jnp.max(x)
    return jnp.percentile(x, 100 - percentile), jnp.percentile(x, percentile)


def _mapping(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of [low, high], widened to hold 0."""
    check.require(bool(np.isfinite([low, high]).all()), "a layer's input", (low, high), "finite")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / (HIGH - LOW)))
    if scale < _LEAST:
        return 1.0, 0
    return scale, int(np.clip(np.round(LOW - low / scale), LOW, HIGH))


_LEAST = 1e-30  # 1 / scale must be a float32
