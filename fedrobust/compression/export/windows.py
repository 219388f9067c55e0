"""What convolutions, products, pooling and padding are in ONNX: rules as in `fedrobust.compression.export.rules`."""

from collections.abc import Sequence

import numpy as np

from fedrobust.compression.export.graph import Context, Graph, Length, Rule, Value, require_known


def pooling(operator: str) -> Rule:
    """Over the axes with a window, which come last, two of them at least, as ONNX pools.

    Args:
        operator: "MaxPool", or "AveragePool", times the size of the window, for a sum.
    """

    def rule(graph: Graph, context: Context, x: Value) -> list[str]:
        settings, rank = context.settings, len(x.shape)
        window = settings["window_dimensions"]
        inside = [i for i in range(rank) if window[i] > 1 or settings["window_strides"][i] > 1]
        plain = set(settings["base_dilation"]) == {1} and rank >= 3 and len(inside) <= rank - 2
        require_known(plain, "a pooling of another kind than over images")
        order = [i for i in range(rank) if i not in inside]
        spatial = sorted(inside + order[2:])
        order = [i for i in range(rank) if i not in spatial] + spatial
        low, high = zip(*(settings["padding"][i] for i in spatial), strict=True)
        name = graph.add(
            operator,
            graph.use(x, order),
            kernel_shape=[window[i] for i in spatial],
            strides=[settings["window_strides"][i] for i in spatial],
            pads=[*low, *high],
            dilations=[settings["window_dilation"][i] for i in spatial],
            **({"count_include_pad": 1} if operator == "AveragePool" else {}),
        )
        if operator == "AveragePool":
            name = graph.add("Mul", name, graph.store(np.asarray(np.prod(window), x.dtype)))
        return [graph.add("Transpose", name, perm=np.argsort(order).tolist())]

    return rule


def convolution(graph: Graph, context: Context, image: Value, kernel: Value) -> list[str]:
    """Channels first, as ONNX has them; onnxruntime takes out the transpositions that meet."""
    settings = context.settings
    dims = settings["dimension_numbers"]
    require_known(settings["batch_group_count"] == 1, "a convolution with groups of examples")
    name = _quantized(graph, context, graph.use(image, dims.lhs_spec))
    shape = [image.shape[i] for i in dims.lhs_spec]
    name = _spread(graph, name, shape, (1, 1, *settings["lhs_dilation"]))
    pads = list(settings["padding"])
    if any(edge < 0 for pair in pads for edge in pair):
        name, pads = _padded(graph, name, [(0, 0), (0, 0), *pads]), [(0, 0)] * len(pads)
    out = graph.add(
        "Conv",
        name,
        graph.use(kernel, dims.rhs_spec),
        group=settings["feature_group_count"],
        strides=list(settings["window_strides"]),
        dilations=list(settings["rhs_dilation"]),
        pads=[*(low for low, _ in pads), *(high for _, high in pads)],
    )
    order = np.argsort(dims.out_spec).tolist()
    return [graph.add("Transpose", out, perm=order)]


def product(graph: Graph, context: Context, left: Value, right: Value) -> list[str]:
    """A matrix product where it is one, an Einsum else."""
    (summed, batch) = context.settings["dimension_numbers"]
    rank = len(left.shape)
    if not batch[0] and len(right.shape) == 2 and tuple(summed[0]) == (rank - 1,):
        order = (0, 1) if tuple(summed[1]) == (0,) else (1, 0)
        name = _quantized(graph, context, graph.use(left))
        if right.weight is None:
            return [graph.add("MatMul", name, graph.use(right, order))]
        # A weight dequantized right before its product makes onnxruntime round the other operand to 8 bits unasked
        # (MatMulNBits: 0.14 of 43, version 1.32); stored the other way round it does not.
        return [graph.add("MatMul", name, graph.add("Transpose", graph.use(right, order[::-1]), perm=[1, 0]))]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    a = [next(letters) for _ in left.shape]
    b = [next(letters) for _ in right.shape]
    for places in (summed, batch):
        for i, j in zip(*places, strict=True):
            b[j] = a[i]
    used = {*summed[0], *batch[0]}, {*summed[1], *batch[1]}
    out = [a[i] for i in batch[0]]
    out += [x for i, x in enumerate(a) if i not in used[0]] + [x for j, x in enumerate(b) if j not in used[1]]
    equation = f"{''.join(a)},{''.join(b)}->{''.join(out)}"
    name = _quantized(graph, context, graph.use(left))
    return [graph.add("Einsum", name, graph.use(right), equation=equation)]


def pad(graph: Graph, context: Context, x: Value, value: Value) -> list[str]:
    """At the ends and between the entries."""
    config = context.settings["padding_config"]
    name = graph.use(x)
    if any(interior for *_, interior in config):
        name = _spread(graph, name, x.shape, [interior + 1 for *_, interior in config], graph.use(value))
    return [_padded(graph, name, [(low, high) for low, high, _ in config], graph.use(value))]


def cut(
    graph: Graph, name: str, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]
) -> str:
    """A tensor from `starts` to `ends` of some axes, in steps."""
    return graph.add("Slice", name, *(graph.ints(*values) for values in (starts, ends, axes, steps)))


def _padded(graph: Graph, name: str, pads: Sequence[tuple[int, int]], value: str = "") -> str:
    """Puts a value (zero unless given) at the ends of each axis, or cuts there."""
    if not any(low or high for low, high in pads):
        return name
    return graph.add(
        "Pad", name, graph.ints(*(low for low, _ in pads), *(high for _, high in pads)), *filter(None, [value])
    )


def _spread(graph: Graph, name: str, shape: Sequence[Length], steps: Sequence[int], value: str = "") -> str:
    """Puts `step - 1` values between the entries of each axis: pads an axis of one behind it, and folds that in."""
    for axis, step in enumerate(steps):
        if step == 1:
            continue
        require_fixed("spreads", [shape[axis]])
        length = shape[axis].plus
        wide = [*shape[: axis + 1], Length(0, 1), *shape[axis + 1 :]]
        edges = [(0, 0)] * len(wide)
        edges[axis + 1] = (0, step - 1)
        shape = [*shape[:axis], Length(0, length * step), *shape[axis + 1 :]]
        name = graph.reshape(_padded(graph, graph.reshape(name, wide), edges, value), shape)
        name = cut(graph, name, [0], [(length - 1) * step + 1], [axis], [1])
        shape = [*shape[:axis], Length(0, (length - 1) * step + 1), *shape[axis + 1 :]]
    return name


def _quantized(graph: Graph, context: Context, name: str) -> str:
    """A tensor rounded to the equation's int8 range, where it has one."""
    if context.range is None:
        return name
    scale, zero_point = (
        graph.store(np.asarray(x, t)) for x, t in zip(context.range, (np.float32, np.int8), strict=True)
    )
    return graph.add("DequantizeLinear", graph.add("QuantizeLinear", name, scale, zero_point), scale, zero_point)


def require_fixed(verb: str, lengths: Sequence[Length]) -> None:
    """Raises unless no length depends on the batch."""
    require_known(all(length.times == 0 for length in lengths), f"an operation that {verb} along the batch")
