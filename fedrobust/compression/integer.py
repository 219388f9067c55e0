"""A model that computes in integers: 8-bit activations times 8- or 4-bit weights, summed in 32 bits."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, trace
from fedrobust.compression.quantization import Quantized, dequantize
from fedrobust.compression.ranges import HIGH, LOW, Ranges, integer_layers
from fedrobust.trace.program import apply_equation
from fedrobust.types import Params

_EXACT = 2**24  # float32 holds every integer up to here
_EVERY_PRODUCT = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)  # none replaced by others, none shortened


class Layer(NamedTuple):
    """One convolution or matrix product in integers.

    Attributes:
        equation: the operation.
        scale: of its first operand, float > 0.
        zero: the zero point of its first operand, in [-128, 127].
    """

    equation: trace.Equation
    scale: float
    zero: int


def integer_apply(
    apply: Callable[[Params, jax.Array], jax.Array],
    ranges: Ranges,
    *,
    straight_through: bool = False,
    arithmetic: str = "float32",
) -> Callable[[Quantized, jax.Array], jax.Array]:
    """The same model with its convolutions and matrix products in integers.

    A layer in `ranges` rounds its input x to q = clip(round(x / scale) + zero, -128, 127), adds up
    (q - zero) * (value - weight zero) in integers, padding with the zero point, and gives that sum times
    scale * weight scale in float32. All else stays float32: norms, activations, pooling, kernels that are computed from
    parameters or whose last axis is not the output's, layers inside loops.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, the model in float32.
        ranges: what `calibrate` returned for it, or a part; layers left out stay float32.
        straight_through: the same values with slope 1 at each rounding inside the range, 0 outside it: for attacks.
            Otherwise the derivative is that of the integers, zero.
        arithmetic: "float32" adds the integers up in float32 where no sum can exceed 2^24 and splits the input channels
            where one can; "int8" multiplies int8 by int8 into int32. The sums are the same integers; which is faster
            depends on platform and shape: 64 x 28 x 28 x 16 by 3 x 3 to 16 channels takes 10 and 52 ms, 64 x 14 x 14 x
            64 to 64 channels 24 and 2 ms (2 x86 cores, jax 0.10.2, 2026-11-28).

    Returns:
        `(quantized params, image[B,H,W,C]) -> logits[B,L]`.

    Raises:
        ValueError: unknown arithmetic, or derivatives of int8. When called: ranges of another model, more than 33 025
            products in a sum (which could exceed 2^31).

    Guarantees:
        The sums are exact, on a CPU in either arithmetic; on an accelerator "float32" is exact if its convolutions of
        the highest precision add up products (no Winograd, no Fourier transform). Where the float operations in between
        round differently (another batch size, another compiler) an input on the edge between two integers may fall to
        the other.

    Source: Jacob et al. 2018 (arXiv 1712.05877), equations 1 to 7. Deviation: sums are scaled in float32.
    """
    check.one_of("arithmetic", arithmetic, ("float32", "int8"))
    check.require(not (straight_through and arithmetic == "int8"), "arithmetic", arithmetic, "float32, for derivatives")

    def on_integers(quantized: Quantized, image: jax.Array) -> jax.Array:
        params = dequantize(quantized)
        program = trace.read(apply, params, image)
        values, scales = jax.tree.leaves(quantized.value), jax.tree.leaves(quantized.scale)
        zeros = [None] * len(values) if quantized.zero is None else jax.tree.leaves(quantized.zero)
        layers = layers_of(program, ranges)

        def emit(equation: trace.Equation, *arrays: Any) -> list[Any]:
            if equation.outputs[0] not in layers:
                return apply_equation(equation, *arrays)
            layer, leaf = layers[equation.outputs[0]]
            total = accumulate(
                layer, arrays[0], values[leaf], zeros[leaf],
                straight_through=straight_through, arithmetic=arithmetic,
            )  # fmt: skip
            step = np.float32(layer.scale) * scales[leaf].astype(jnp.float32)
            return [total.astype(jnp.float32) * along_outputs(equation, step)]

        (logits,) = trace.evaluate(program, jax.tree.leaves((params, image)), emit)
        return logits

    return on_integers


def accumulate(
    layer: Layer,
    x: jax.Array,
    value: jax.Array,
    weight_zero: jax.Array | None,
    *,
    straight_through: bool = False,
    arithmetic: str = "float32",
) -> jax.Array:
    """The integer sums of one layer.

    Args:
        layer: the operation and how its input is rounded.
        x: float32, its input.
        value: its kernel, int8 or int4, the last axis that of the output channels.
        weight_zero: [Cout] int8, the kernel's zero points; None for 0.
        straight_through: as of `integer_apply`.
        arithmetic: as of `integer_apply`.

    Returns:
        The sums, int32, or float32: equal integers up to 2^24, beyond it the nearest float32.
    """
    num = _num_products(layer.equation, value.shape)
    check.require(num * 255**2 < 2**31, "the number of products in a sum", num, "at most 33025")
    centred = round_input(layer, x, straight_through_round if straight_through else jnp.round)
    if arithmetic == "int8":
        return _in_int8(layer, (centred + layer.zero).astype(jnp.int8), value.astype(jnp.int8), weight_zero)
    kernel = value.astype(jnp.float32) - (0 if weight_zero is None else weight_zero.astype(jnp.float32))
    largest = max(HIGH - layer.zero, layer.zero - LOW) * _largest_weight(value, weight_zero)
    return _in_float32(layer.equation, centred, kernel, largest)


def round_input(layer: Layer, x: jax.Array, rounding: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """A layer's input in steps of its scale, q - zero: whole numbers in float32.

    Args:
        layer: how its input is rounded.
        x: float32, the input.
        rounding: `jnp.round`, or one with another slope.
    """
    # Clipped half a step outside the range and not after rounding: what lies on its end keeps its slope.
    steps = jnp.clip(x * np.float32(1 / np.float32(layer.scale)), LOW - layer.zero - 0.49, HIGH - layer.zero + 0.49)
    return rounding(steps)


def layers_of(program: trace.Program, ranges: Ranges) -> dict[int, tuple[Layer, int]]:
    """The layers with ranges, by the number of their output, and the number of the leaf that is their kernel.

    Raises:
        ValueError: ranges of another model.
    """
    found = integer_layers(program, len(program.inputs) - 1)
    check.require(set(ranges) <= set(range(len(found))), "ranges", sorted(ranges), f"of the {len(found)} layers")
    return {
        equation.outputs[0]: (Layer(equation, *ranges[number]), leaf)
        for number, (equation, leaf) in enumerate(found)
        if number in ranges
    }


def _in_float32(equation: trace.Equation, x: jax.Array, w: jax.Array, largest: int) -> jax.Array:
    """Sums of products up to `largest` in float32, over so few input channels at a time that each is exact."""
    axis, kernel_axis = _summed_axis(equation)
    size = w.shape[kernel_axis]
    per_channel = largest * _num_products(equation, w.shape) // size
    at_once = _EXACT // per_channel
    if at_once >= size:
        return apply_equation(equation, x, w, precision=_EVERY_PRODUCT)[0]
    whole = equation.settings.get("feature_group_count", 1) == 1 and at_once >= 1
    check.require(whole, "a sum in float32", size * per_channel, f"at most {_EXACT}, or a sum over groups below that")
    parts = []
    for first in range(0, size, at_once):
        last = min(first + at_once, size)
        some = jax.lax.slice_in_dim(x, first, last, axis=axis), jax.lax.slice_in_dim(w, first, last, axis=kernel_axis)
        parts += apply_equation(equation, *some, precision=_EVERY_PRODUCT)
    return _exact_sum(parts)


def _in_int8(layer: Layer, x: jax.Array, w: jax.Array, weight_zero: jax.Array | None) -> jax.Array:
    """Sums of int8 times int8 in int32, the zero points taken out afterwards."""
    equation = layer.equation
    changes: dict[str, Any] = {"preferred_element_type": jnp.dtype(jnp.int32)}
    axes: tuple[int, ...] = tuple(range(w.ndim - 1))
    if equation.name == "conv_general_dilated":
        pairs, holes = equation.settings["padding"], equation.settings["lhs_dilation"]
        spatial = equation.settings["dimension_numbers"].lhs_spec[2:]
        padding = [(0, 0, 0)] * x.ndim
        for dim, (before, after), hole in zip(spatial, pairs, holes, strict=True):
            padding[dim] = (before, after, hole - 1)
        x = jax.lax.pad(x, np.int8(layer.zero), padding)
        changes |= {"padding": ((0, 0),) * len(pairs), "lhs_dilation": (1,) * len(pairs)}
    else:
        axes = tuple(equation.settings["dimension_numbers"][0][1])
    (product,) = equation.bind(x, w, **changes)
    of_weights = jnp.sum(w.astype(jnp.int32), axis=axes)
    total = product - layer.zero * (along_outputs(equation, of_weights) if of_weights.ndim == 1 else of_weights)
    if weight_zero is None:
        return total
    (of_inputs,) = equation.bind(x, jnp.ones_like(w), **changes)
    num = _num_products(equation, w.shape)
    return total - along_outputs(equation, weight_zero.astype(jnp.int32)) * (of_inputs - num * layer.zero)


def along_outputs(equation: trace.Equation, vector: jax.Array) -> jax.Array:
    """A vector over the output channels, to be multiplied with a layer's result."""
    if equation.name == "dot_general":
        return vector
    dimensions = equation.settings["dimension_numbers"].out_spec
    return vector.reshape([-1 if dim == dimensions[1] else 1 for dim in range(len(dimensions))])


def _num_products(equation: trace.Equation, kernel: tuple[int, ...]) -> int:
    """How many products an output adds up, at most."""
    if equation.name == "conv_general_dilated":
        return math.prod(kernel[:-1])
    return math.prod(kernel[axis] for axis in equation.settings["dimension_numbers"][0][1])


def _summed_axis(equation: trace.Equation) -> tuple[int, int]:
    """An axis that is summed over, of the input and of the kernel."""
    dimensions = equation.settings["dimension_numbers"]
    if equation.name == "conv_general_dilated":
        return dimensions.lhs_spec[1], dimensions.rhs_spec[1]
    (of_input, of_kernel), _ = dimensions
    return of_input[0], of_kernel[0]


def _largest_weight(value: jax.Array, weight_zero: jax.Array | None) -> int:
    low = 128 if value.dtype == jnp.int8 else 8
    return low if weight_zero is None else 2 * low - 1


@jax.custom_jvp
def straight_through_round(x: jax.Array) -> jax.Array:
    """`jnp.round` with slope 1."""
    return jnp.round(x)


@jax.custom_jvp
def _exact_sum(parts: list[jax.Array]) -> jax.Array:
    """The sum of float32 integers, which may exceed 2^24, to the nearest float32."""
    return functools.reduce(jnp.add, [part.astype(jnp.int32) for part in parts]).astype(jnp.float32)


straight_through_round.defjvp(lambda primals, tangents: (straight_through_round(*primals), *tangents))
_exact_sum.defjvp(lambda primals, tangents: (_exact_sum(*primals), functools.reduce(jnp.add, tangents[0])))
