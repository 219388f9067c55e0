"""What each operation does to the ids of its operands' axes (see `fedrobust.trace.coupling`).

A rule is `(context, *operands) -> axes of the outputs`. An operation without a rule is opaque: it freezes what it
touches.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedrobust.trace.axes import FROZEN, Axes, Axis, Context, Graph, fixed, flattened, merge, part, segments, split_axis

Rule = Callable[..., list[Axes]]


def opaque(context: Context, *operands: Axes) -> list[Axes]:
    """An operation without a rule: all it touches stays as it is, and its name is kept for the user."""
    touched = [axis for operand in operands for axis in operand if (axis.id != FROZEN).any()]
    if touched:
        context.graph.unknown.append(context.equation.name)
    for axis in touched:
        context.graph.freeze(axis)
    return [tuple(fixed(n) for n in context.values[i].shape) for i in context.equation.outputs]


def elementwise(context: Context, *operands: Axes) -> list[Axes]:
    """Operands that are scalars or have one shape, up to axes of length 1."""
    zero = _zero_rule(context, [len(operand) > 0 or not context.shape for operand in operands])
    arrays = [operand for operand in operands if operand]
    out = tuple(merge(context.graph, list(axes), zero) for axes in zip(*arrays, strict=True))
    if not arrays and context.equation.name == "convert_element_type" and context.literal(0) is not None:
        context.literals[context.equation.outputs[0]] = context.literal(0)
    return [out]


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


def broadcast_in_dim(context: Context, operand: Axes) -> list[Axes]:
    """New axes, and axes of length 1 that grow, only repeat one slice: any part of them may go."""
    is_zero = context.literal(0) is not None and context.literal(0) == 0
    out = [context.graph.fresh(n, zero=is_zero, free=True) for n in context.shape]
    for axis, dimension in zip(operand, context.settings["broadcast_dimensions"], strict=True):
        if len(axis.id) == context.shape[dimension]:
            out[dimension] = axis
        else:
            context.graph.freeze(axis)
    return [tuple(fixed(1) if len(a.id) == 1 and a.free else a for a in out)]


def reshape(context: Context, operand: Axes) -> list[Axes]:
    """Splits and merges of neighbouring axes, group by group; axes of length 1 come and go."""
    old, new = [len(axis.id) for axis in operand], context.shape
    if 0 in old or context.settings["dimensions"] is not None:
        return opaque(context, operand)
    for axis in operand:
        if len(axis.id) == 1:
            context.graph.freeze(axis)
    out = [fixed(n) for n in new]
    for sources, targets in segments(old, list(new)):
        flat = flattened(context.graph, [operand[i] for i in sources])
        for i, axis in zip(targets, split_axis(context.graph, flat, [new[i] for i in targets]), strict=True):
            out[i] = axis
    return [tuple(out)]


def transpose(context: Context, operand: Axes) -> list[Axes]:
    """Permuted axes."""
    return [tuple(operand[i] for i in context.settings["permutation"])]


def squeeze(context: Context, operand: Axes) -> list[Axes]:
    """Axes of length 1 go."""
    dropped = context.settings["dimensions"]
    for i in dropped:
        context.graph.freeze(operand[i])
    return [tuple(axis for i, axis in enumerate(operand) if i not in dropped)]


def concatenate(context: Context, *operands: Axes) -> list[Axes]:
    """Ids one after another along one axis; the other axes are shared."""
    out = []
    for i, axes in enumerate(zip(*operands, strict=True)):
        if i == context.settings["dimension"]:
            out.append(Axis(np.concatenate([a.id for a in axes]), np.concatenate([a.zero for a in axes])))
        else:
            out.append(merge(context.graph, list(axes), np.logical_and.reduce))
    return [tuple(out)]


def stack(context: Context, *operands: Axes) -> list[Axes]:
    """A new axis, of fixed length, over operands that share their own."""
    shared = [merge(context.graph, list(axes), np.logical_and.reduce) for axes in zip(*operands, strict=True)]
    return [(*shared[: context.settings["axis"]], fixed(len(operands)), *shared[context.settings["axis"] :])]


def unstack(context: Context, operand: Axes) -> list[Axes]:
    """One axis becomes as many outputs, and stays as it is."""
    along = context.settings["axis"]
    context.graph.freeze(operand[along])
    return [(*operand[:along], *operand[along + 1 :]) for _ in context.equation.outputs]


def tile(context: Context, operand: Axes) -> list[Axes]:
    """Every copy of an index goes with it; an axis of length 1 only repeats one slice, as in a broadcast."""
    out = []
    for axis, repeats in zip(operand, context.settings["reps"], strict=True):
        if len(axis.id) == 1 < repeats:
            context.graph.freeze(axis)
            out.append(context.graph.fresh(repeats, free=True))
        else:
            out.append(Axis(np.tile(axis.id, repeats), np.tile(axis.zero, repeats), axis.free))
    return [tuple(out)]


def slice_(context: Context, operand: Axes) -> list[Axes]:
    """Part of each axis; an axis read with a stride stays as it is."""
    settings = context.settings
    strides = settings["strides"] or (1,) * len(operand)
    out = []
    for axis, start, limit, stride in zip(
        operand, settings["start_indices"], settings["limit_indices"], strides, strict=True
    ):
        if stride > 1:
            context.graph.freeze(axis)
        out.append(part(axis, slice(start, limit, stride)))
    return [tuple(out)]


def split(context: Context, operand: Axes) -> list[Axes]:
    """Consecutive parts along one axis."""
    along = context.settings["axis"]
    ends = np.cumsum(context.settings["sizes"])
    pieces = [part(operand[along], slice(end - n, end)) for n, end in zip(context.settings["sizes"], ends, strict=True)]
    return [(*operand[:along], piece, *operand[along + 1 :]) for piece in pieces]


def pad(context: Context, operand: Axes, value: Axes) -> list[Axes]:
    """Padding at the ends takes new ids, so that padded channels can go where the channels they meet go."""
    del value
    is_zero = context.literal(1) is not None and context.literal(1) == 0
    out = []
    for axis, (low, high, inner), size in zip(operand, context.settings["padding_config"], context.shape, strict=True):
        if (low, high, inner) == (0, 0, 0):
            out.append(Axis(axis.id, axis.zero & is_zero))
        elif min(low, high) < 0 or inner or (axis.id == FROZEN).all():
            context.graph.freeze(axis)
            out.append(fixed(size))
        else:
            parts = [context.graph.fresh(low, is_zero), axis, context.graph.fresh(high, is_zero)]
            out.append(Axis(np.concatenate([a.id for a in parts]), np.concatenate([a.zero for a in parts])))
    return [tuple(out)]


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
    """Input channels pair with the kernel's, output channels are the kernel's; whole groups stay together."""
    settings, graph = context.settings, context.graph
    if settings["batch_group_count"] != 1:
        return opaque(context, image, kernel)
    (batch, channel, *space), (out, into, *window), spec = settings["dimension_numbers"]
    for axis in [image[i] for i in space] + [kernel[i] for i in window]:
        graph.freeze(axis)
    groups = settings["feature_group_count"]
    if groups == 1:
        _contract(graph, image[channel], kernel[into])
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
    """A sum may lose the entries that are zero; its divisor, if it is a mean, stays what it was."""
    for i in context.settings["axes"]:
        context.graph.freeze(operand[i], ~operand[i].zero)
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
    return [tuple(fixed(len(a.id)) if i == along else a for i, a in enumerate(operand))]


def rev(context: Context, operand: Axes) -> list[Axes]:
    """Reversed axes."""
    turned = context.settings["dimensions"]
    return [tuple(part(a, slice(None, None, -1)) if i in turned else a for i, a in enumerate(operand))]


def iota(context: Context) -> list[Axes]:
    """Counting: like a captured array, it can be cut anywhere."""
    return [tuple(context.graph.fresh(n) for n in context.shape)]


# fmt: off
_KEEP_ZERO = frozenset((
    "abs", "add", "add_any", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "clamp", "convert_element_type", "copy",
    "erf", "erf_inv", "expm1", "floor", "log1p", "max", "min", "neg", "reduce_precision", "round", "sign", "sin",
    "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
))
_ELEMENTWISE = _KEEP_ZERO | frozenset((
    "acos", "acosh", "and", "atan2", "cos", "cosh", "digamma", "div", "eq", "erfc", "exp", "exp2", "ge", "gt",
    "integer_pow", "is_finite", "le", "lgamma", "log", "log2", "logistic", "lt", "mul", "ne", "nextafter", "not",
    "one_minus_square", "or", "polynomial", "pow", "rem", "rsqrt", "select_n", "xor",
))
# fmt: on
_ACROSS = ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    "broadcast_in_dim": broadcast_in_dim,
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "slice": slice_,
    "split": split,
    "pad": pad,
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "reduce_sum": reduce_sum,
    **dict.fromkeys(_ACROSS, reduce_across),
    **dict.fromkeys(_WINDOWS, reduce_window),
    **dict.fromkeys(_CUMULATIVE, cumulative),
    "rev": rev,
    "iota": iota,
}
