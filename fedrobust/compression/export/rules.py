"""What each primitive is in ONNX. A rule is `(graph, context, *inputs) -> names of the outputs`."""

import numpy as np
from jax import lax
from onnx import helper

from fedrobust.compression.export.graph import Context, Graph, Length, Rule, Value, require_known
from fedrobust.compression.export.windows import convolution, cut, pad, pooling, product, require_fixed

_INT_MIN = -(2**63) + 1


def _node(operator: str) -> Rule:
    """The same operation under another name."""
    return lambda graph, context, *inputs: [graph.add(operator, *map(graph.use, inputs))]


def _composed(*operators: str) -> Rule:
    """Operations of one operand, one after the other."""

    def rule(graph: Graph, context: Context, x: Value) -> list[str]:
        name = graph.use(x)
        for operator in operators:
            name = graph.add(operator, name)
        return [name]

    return rule


def _with_scalar(operator: str, scalar: float, *, first: bool = False, before: str = "", after: str = "") -> Rule:
    """`after(operator(before(x), scalar))`, the scalar on the left if `first`."""

    def rule(graph: Graph, context: Context, x: Value) -> list[str]:
        name = graph.add(before, graph.use(x)) if before else graph.use(x)
        constant = graph.store(np.asarray(scalar, x.dtype))
        name = graph.add(operator, *((constant, name) if first else (name, constant)))
        return [graph.add(after, name) if after else name]

    return rule


def _same(graph: Graph, context: Context, *inputs: Value) -> list[str]:
    return [graph.use(x) for x in inputs]


def _square(graph: Graph, context: Context, x: Value) -> list[str]:
    return [graph.add("Mul", graph.use(x), graph.use(x))]


def _integer_pow(graph: Graph, context: Context, x: Value) -> list[str]:
    exponent = context.settings["y"]
    if exponent == 2:
        return _square(graph, context, x)
    return [graph.add("Pow", graph.use(x), graph.store(np.asarray(exponent, x.dtype)))]


def _maximum(operator: str) -> Rule:
    """Larger or smaller one; truth values as the operations that ONNX has for those."""

    def rule(graph: Graph, context: Context, *inputs: Value) -> list[str]:
        logical = {"Max": "Or", "Min": "And"}[operator]
        return [graph.add(logical if inputs[0].dtype == bool else operator, *map(graph.use, inputs))]

    return rule


def _clamp(graph: Graph, context: Context, low: Value, x: Value, high: Value) -> list[str]:
    return [graph.add("Min", graph.add("Max", graph.use(x), graph.use(low)), graph.use(high))]


def _select(graph: Graph, context: Context, which: Value, *cases: Value) -> list[str]:
    fits = which.dtype == bool and len(cases) == 2
    require_known(fits, "a choice among more than two cases")
    return [graph.add("Where", *map(graph.use, (which, cases[1], cases[0])))]


def _round(graph: Graph, context: Context, x: Value) -> list[str]:
    method = context.settings["rounding_method"]
    require_known(method == lax.RoundingMethod.TO_NEAREST_EVEN, f"a {method}")
    return [graph.add("Round", graph.use(x))]


def _cast(graph: Graph, context: Context, x: Value) -> list[str]:
    return [graph.add("Cast", graph.use(x), to=helper.np_dtype_to_tensor_dtype(context.dtypes[0]))]


def _reshape(graph: Graph, context: Context, x: Value) -> list[str]:
    return [graph.reshape(graph.use(x), context.shapes[0])]


def _transpose(graph: Graph, context: Context, x: Value) -> list[str]:
    return [graph.use(x, context.settings["permutation"])]


def _broadcast(graph: Graph, context: Context, x: Value, *_: Value) -> list[str]:
    shape, places = context.shapes[0], context.settings["broadcast_dimensions"]
    spread = [Length(0, 1)] * len(shape)
    for length, place in zip(x.shape, places, strict=True):
        spread[place] = length
    name = graph.use(x) if tuple(spread) == x.shape else graph.reshape(graph.use(x), spread)
    return [name if tuple(spread) == shape else graph.add("Expand", name, graph.shape(shape))]


def _concatenate(graph: Graph, context: Context, *inputs: Value) -> list[str]:
    return [graph.add("Concat", *map(graph.use, inputs), axis=context.settings["dimension"])]


def _stack(graph: Graph, context: Context, *inputs: Value) -> list[str]:
    axis = context.settings["axis"]
    wide = [graph.add("Unsqueeze", graph.use(x), graph.ints(axis)) for x in inputs]
    return [graph.add("Concat", *wide, axis=axis)]


def _tile(graph: Graph, context: Context, x: Value) -> list[str]:
    return [
        graph.add(
            "Tile", graph.use(x), graph.shape([_quotient(*n) for n in zip(context.shapes[0], x.shape, strict=True)])
        )
    ]


def _quotient(new: Length, old: Length) -> Length:
    """How many times the old length fits into the new one."""
    if old.times:
        return Length(0, new.times // old.times)
    return Length(new.times // old.plus, new.plus // old.plus)


def _slice(graph: Graph, context: Context, x: Value) -> list[str]:
    starts, limits = context.settings["start_indices"], context.settings["limit_indices"]
    steps = context.settings["strides"] or (1,) * len(starts)
    whole = [length == out and step == 1 for length, out, step in zip(x.shape, context.shapes[0], steps, strict=True)]
    axes = [i for i, is_whole in enumerate(whole) if not is_whole]
    if not axes:
        return [graph.use(x)]
    require_fixed("slices", [x.shape[i] for i in axes])
    starts, limits, steps = ([values[i] for i in axes] for values in (starts, limits, steps))
    return [cut(graph, graph.use(x), starts, limits, axes, steps)]


def _split(graph: Graph, context: Context, x: Value) -> list[str]:
    axis, names, begin = context.settings["axis"], [], 0
    for length in context.settings["sizes"]:
        names.append(cut(graph, graph.use(x), [begin], [begin + length], [axis], [1]))
        begin += length
    return names


def _rev(graph: Graph, context: Context, x: Value) -> list[str]:
    axes = list(context.settings["dimensions"])
    return [cut(graph, graph.use(x), [-1] * len(axes), [_INT_MIN] * len(axes), axes, [-1] * len(axes))]


def _reduce(operator: str) -> Rule:
    def rule(graph: Graph, context: Context, x: Value) -> list[str]:
        axes = context.settings["axes"]
        if not axes:
            return [graph.use(x)]  # ONNX would reduce all of them
        return [graph.add(operator, graph.use(x), graph.ints(*axes), keepdims=0)]

    return rule


def _logical_reduce(operator: str) -> Rule:
    def rule(graph: Graph, context: Context, x: Value) -> list[str]:
        number = graph.add("Cast", graph.use(x), to=helper.np_dtype_to_tensor_dtype(np.dtype(np.int32)))
        found = graph.add(operator, number, graph.ints(*context.settings["axes"]), keepdims=0)
        return [graph.add("Cast", found, to=helper.np_dtype_to_tensor_dtype(np.dtype(bool)))]

    return rule


def _arg(operator: str) -> Rule:
    def rule(graph: Graph, context: Context, x: Value) -> list[str]:
        found = graph.add(operator, graph.use(x), axis=context.settings["axes"][0], keepdims=0)
        return [graph.add("Cast", found, to=helper.np_dtype_to_tensor_dtype(context.dtypes[0]))]

    return rule


def _cumulative(graph: Graph, context: Context, x: Value) -> list[str]:
    axis, reverse = context.settings["axis"], int(context.settings["reverse"])
    return [graph.add("CumSum", graph.use(x), graph.store(np.asarray(axis, np.int64)), reverse=reverse)]


_TWO: dict[str, str] = {
    "add": "Add",
    "add_any": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}
_ONE: dict[str, tuple[str, ...]] = {
    "neg": ("Neg",),
    "exp": ("Exp",),
    "log": ("Log",),
    "sqrt": ("Sqrt",),
    "rsqrt": ("Sqrt", "Reciprocal"),
    "tanh": ("Tanh",),
    "logistic": ("Sigmoid",),
    "erf": ("Erf",),
    "abs": ("Abs",),
    "sign": ("Sign",),
    "floor": ("Floor",),
    "ceil": ("Ceil",),
    "sin": ("Sin",),
    "cos": ("Cos",),
    "not": ("Not",),
}

RULES: dict[str, Rule] = {
    **{name: _node(operator) for name, operator in _TWO.items()},
    **{name: _composed(*operators) for name, operators in _ONE.items()},
    "and": _node("And"),
    "or": _node("Or"),
    "ne": lambda graph, context, *inputs: [graph.add("Not", graph.add("Equal", *map(graph.use, inputs)))],
    "max": _maximum("Max"),
    "min": _maximum("Min"),
    "square": _square,
    "integer_pow": _integer_pow,
    "erfc": _with_scalar("Sub", 1.0, first=True, before="Erf"),
    "log1p": _with_scalar("Add", 1.0, after="Log"),
    "expm1": _with_scalar("Sub", 1.0, before="Exp"),
    "exp2": _with_scalar("Pow", 2.0, first=True),
    "clamp": _clamp,
    "select_n": _select,
    "round": _round,
    "convert_element_type": _cast,
    **dict.fromkeys(("stop_gradient", "copy", "copy_p", "optimization_barrier"), _same),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "stack": _stack,
    "tile": _tile,
    "slice": _slice,
    "split": _split,
    "rev": _rev,
    "pad": pad,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_and": _logical_reduce("ReduceMin"),
    "reduce_or": _logical_reduce("ReduceMax"),
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "cumsum": _cumulative,
    "reduce_window_max": pooling("MaxPool"),
    "reduce_window_sum": pooling("AveragePool"),
    "conv_general_dilated": convolution,
    "dot_general": product,
}
