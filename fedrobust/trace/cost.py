"""What a model costs to run, from its equations."""

import math
from collections.abc import Callable
from typing import Any

from fedrobust.trace.program import Equation, Program, nested, read

_CONTRACTIONS = {
    "convolution_image": lambda found: (found[0], found[1]),
    "convolution_kernel": lambda found: (found[2], found[1]),
    "convolution_output": lambda found: (found[1], found[2]),
}
"""Primitive of `fedrobust.ops` -> which of its first operand, second operand and result are (kernel, output)."""


def flops(apply: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of one call: two for each multiply-add of a convolution or a matrix product.

    Elementwise operations, reductions and pooling count nothing, as usual in the literature on compression. What
    `fedrobust.ops.conv` becomes where it is differentiated or under a `vmap` counts as the convolution it is.
    Multiplications with padding count. The body of a scan counts once per step, a while loop's once, a cond's as its
    dearest branch.

    Args:
        apply: a pure function, such as a model.
        *args: its arguments, arrays or `jax.ShapeDtypeStruct`; give one image, [1,H,W,C], for the cost of one image.

    Returns:
        The number of operations.

    >>> import jax.numpy as jnp
    >>> flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
    60
    """
    return _program(read(apply, *args))


def _program(program: Program) -> int:
    return sum(_equation(program, equation) for equation in program.equations)


def _equation(program: Program, equation: Equation) -> int:
    if equation.name in _CONTRACTIONS:
        return _contraction(program, equation)
    if equation.name == "conv_general_dilated":
        kernel = program.values[equation.inputs[1]].shape
        taps = math.prod(kernel) // kernel[equation.settings["dimension_numbers"].rhs_spec[0]]
        groups = equation.settings["batch_group_count"]
        return 2 * math.prod(program.values[equation.outputs[0]].shape) * taps // groups
    if equation.name == "dot_general":
        left = program.values[equation.inputs[0]].shape
        summed = math.prod(left[i] for i in equation.settings["dimension_numbers"][0][0])
        return 2 * math.prod(program.values[equation.outputs[0]].shape) * summed
    inner = [_program(body) for body in nested(equation)]
    if equation.name == "cond":
        return max(inner)
    return equation.settings.get("length", 1) * sum(inner) if equation.name == "scan" else sum(inner)


def _contraction(program: Program, equation: Equation) -> int:
    """Every entry of the output goes with every tap of its window, whichever of the three is left open."""
    shapes = [program.values[i].shape for i in (*equation.inputs, *equation.outputs)]
    kernel, output = _CONTRACTIONS[equation.name](shapes)
    return 2 * math.prod(output) * math.prod(kernel[int(equation.settings["stacked"]) : -1])
