"""What each operation does to the ids of its operands' axes (see `fedrobust.trace.coupling`).

A rule is `(context, *operands) -> axes of the outputs`. An operation without a rule is opaque: it freezes what it
touches.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedrobust.trace import moves
from fedrobust.trace.axes import FROZEN, Axes, Axis, Context, Graph, fixed, merge, opaque, tiled

Rule = Callable[..., list[Axes]]


def elementwise(context: Context, *operands: Axes) -> list[Axes]:
    """Operands that are scalars or have one shape, up to axes of length 1."""
    zero = _zero_rule(context, [len(operand) > 0 or not context.shape for operand in operands])
    arrays = [operand for operand in operands if operand]
    out = tuple(
        merge(context.graph, list(axes), zero)._replace(uniform=_is_uniform(axes)) for axes in zip(*arrays, strict=True)
    )
    if not arrays and context.equation.name == "convert_element_type" and context.literal(0) is not None:
        context.literals[context.equation.outputs[0]] = context.literal(0)
    return [out]


def _is_uniform(axes: tuple[Axis, ...]) -> bool:
    size = max(len(axis.id) for axis in axes)
    return all(axis.uniform or len(axis.id) < size or axis.is_zero() for axis in axes)


def _zero_rule(context: Context, is_array: list[bool]) -> Callable[[list[np.ndarray]], np.ndarray]:
    """From what is known of the zeros of the array operands to the zeros of an elementwise result."""
    name = context.equation.name
    if name in ("mul", "and"):
        return np.logical_or.reduce
    if name in ("div", "rem") and is_array[0]:
        return lambda zeros: zeros[0]
    if name == "select_n":
        first = int(is_array[0])  # the condition, where it is not a scalar, says nothing about the cases
        return lambda zeros: np.logical_and.reduce(zeros[first:])
    keeps = name in _KEEP_ZERO and all(
        array or _is_neutral(name, context.literal(i)) for i, array in enumerate(is_array)
    )
    keeps = keeps or (name == "integer_pow" and context.settings["y"] > 0)
    return np.logical_and.reduce if keeps else lambda zeros: np.zeros_like(zeros[0])


def _is_neutral(name: str, literal: Any) -> bool:
    """Whether zero combined with this scalar is still zero."""
    if literal is None:
        return False
    return bool({"max": literal <= 0, "min": literal >= 0}.get(name, literal == 0))


def _contract(graph: Graph, a: Axis, b: Axis) -> None:
    """A sum over the products of two axes: an index may go where either factor is zero once masked."""
    graph.join(a.id, b.id)
    graph.freeze(a, ~(a.zero | b.zero))


def dot_general(context: Context, left: Axes, right: Axes) -> list[Axes]:
    """Batch axes are shared, contracted axes are summed, the rest stand side by side."""
    (left_sum, right_sum), (left_batch, right_batch) = context.settings["dimension_numbers"]
    for i, j in zip(left_sum, right_sum, strict=True):
        _contract(context.graph, left[i], right[j])
    batch = [
        merge(context.graph, [left[i], right[j]], np.logical_or.reduce)
        for i, j in zip(left_batch, right_batch, strict=True)
    ]
    rest = [axis for i, axis in enumerate(left) if i not in (*left_sum, *left_batch)]
    rest += [axis for j, axis in enumerate(right) if j not in (*right_sum, *right_batch)]
    return [(*batch, *rest)]


def convolution(context: Context, image: Axes, kernel: Axes) -> list[Axes]:
    """Input channels pair with the kernel's, output channels are the kernel's.

    Of several groups, whole groups go, each with its inputs and outputs; or else, in all such convolutions of the
    model, every group loses the same of its inputs, and the same of its outputs.
    """
    settings, graph = context.settings, context.graph
    if settings["batch_group_count"] != 1:
        return opaque(context, image, kernel)
    (batch, channel, *space), (out, into, *window), spec = settings["dimension_numbers"]
    for axis in [image[i] for i in space] + [kernel[i] for i in window]:
        graph.freeze(axis)
    groups, size = settings["feature_group_count"], len(kernel[into].id)
    if groups == 1:
        _contract(graph, image[channel], kernel[into])
        made = kernel[out]
    elif size > 1 and graph.choose("groups", 2, image[channel]):
        _contract(graph, image[channel], tiled(kernel[into], groups))
        rows = kernel[out].id.reshape(groups, -1)
        graph.join(rows, rows[:1])
        made = kernel[out]
    else:
        graph.freeze(kernel[into])
        rows = np.concatenate([image[channel].id.reshape(groups, -1), kernel[out].id.reshape(groups, -1)], axis=1)
        graph.join(rows, rows[:, :1])
        made = Axis(np.repeat(rows.min(axis=1), len(kernel[out].id) // groups), kernel[out].zero)
    result = [fixed(n) for n in context.shape]
    result[spec[0]], result[spec[1]] = image[batch], made
    return [tuple(result)]


def reduce_sum(context: Context, operand: Axes) -> list[Axes]:
    """A sum may lose the entries that are zero, and those of one value, which `resize` adds as often as it is gone.

    The divisor, if it is a mean, stays what it was.
    """
    across = [operand[i] for i in context.settings["axes"]]
    is_alone = sum((axis.id != FROZEN).any() for axis in across) == 1
    for axis in across:
        if not (axis.uniform and is_alone):
            context.graph.freeze(axis, ~axis.zero)
    return [tuple(axis for i, axis in enumerate(operand) if i not in context.settings["axes"])]


def reduce_across(context: Context, operand: Axes) -> list[Axes]:
    """A maximum, or anything else in which an entry counts even if it is zero."""
    for i in context.settings["axes"]:
        context.graph.freeze(operand[i])
    keeps = context.equation.name in ("reduce_max", "reduce_min")
    rest = [axis for i, axis in enumerate(operand) if i not in context.settings["axes"]]
    return [tuple(axis._replace(zero=axis.zero & keeps) for axis in rest)]


def reduce_window(context: Context, operand: Axes) -> list[Axes]:
    """Windows of length 1 leave an axis alone; others look across it."""
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    static = zip(*(context.settings[name] for name in names), context.settings["padding"], strict=True)
    out = []
    for axis, steps, size in zip(operand, static, context.shape, strict=True):
        if steps == (1, 1, 1, 1, (0, 0)):
            out.append(axis)
        else:
            context.graph.freeze(axis)
            out.append(fixed(size))
    return [tuple(out)]


def cumulative(context: Context, operand: Axes) -> list[Axes]:
    """Looks across one axis."""
    along = context.settings["axis"]
    context.graph.freeze(operand[along])
    rest = [a._replace(zero=a.zero & (context.equation.name != "cumlogsumexp")) for a in operand]
    return [tuple(fixed(len(a.id)) if i == along else a for i, a in enumerate(rest))]


# fmt: off
_KEEP_ZERO = frozenset((
    "abs", "add", "add_any", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy",
    "erf", "erf_inv", "expm1", "floor", "log1p", "max", "min", "neg", "reduce_precision", "round", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
))
ELEMENTWISE = _KEEP_ZERO | frozenset((
    "acos", "acosh", "and", "atan2", "cos", "cosh", "digamma", "div", "eq", "erfc", "exp", "exp2", "ge", "gt",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log2", "logistic", "lt", "mul", "ne", "nextafter", "not",
    "one_minus_square", "or", "polynomial", "pow", "rem", "rsqrt", "select_n", "xor",
))
# fmt: on
FOLLOWED = ELEMENTWISE | {"broadcast_in_dim"}
"""The operations through which `resize` computes what a removed entry would be."""
_ACROSS = ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "broadcast_in_dim": moves.broadcast_in_dim,
    "reshape": moves.reshape,
    "transpose": moves.transpose,
    "squeeze": moves.squeeze,
    "concatenate": moves.concatenate,
    "stack": moves.stack,
    "unstack": moves.unstack,
    "tile": moves.tile,
    "slice": moves.slice_,
    "gather": moves.gather,
    "dynamic_slice": moves.dynamic_slice,
    "split": moves.split,
    "pad": moves.pad,
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "reduce_sum": reduce_sum,
    **dict.fromkeys(_ACROSS, reduce_across),
    **dict.fromkeys(_WINDOWS, reduce_window),
    **dict.fromkeys(_CUMULATIVE, cumulative),
    "rev": moves.rev,
    "iota": moves.iota,
}
