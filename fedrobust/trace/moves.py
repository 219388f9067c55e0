"""Rules of operations that move entries and compute nothing (see `fedrobust.trace.rules`)."""

import numpy as np

from fedrobust.trace.axes import (
    FROZEN,
    Axes,
    Axis,
    Context,
    Graph,
    fixed,
    flattened,
    merge,
    opaque,
    part,
    segments,
    split_axis,
    tiled,
)


def broadcast_in_dim(context: Context, operand: Axes) -> list[Axes]:
    """New axes, and axes of length 1 that grow, only repeat one slice: any part of them may go."""
    is_zero = context.literal(0) is not None and context.literal(0) == 0
    out = [context.graph.fresh(n, zero=is_zero, free=True)._replace(uniform=True) for n in context.shape]
    for axis, dimension in zip(operand, context.settings["broadcast_dimensions"], strict=True):
        if len(axis.id) == context.shape[dimension]:
            out[dimension] = axis._replace(uniform=False)
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
            out.append(tiled(axis, repeats))
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


def gather(context: Context, operand: Axes, index: Axes) -> list[Axes]:
    """An axis that is read whole at every index is what it was; one that is picked from stays as it is."""
    dims, sizes = context.settings["dimension_numbers"], context.settings["slice_sizes"]
    keeps = context.settings["fill_value"] in (None, 0)  # None stands for NaN
    for axis in index:
        context.graph.freeze(axis)
    out = [fixed(n) for n in context.shape]
    gone = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    kept = [i for i in range(len(operand)) if i not in gone]
    for i, target in zip(kept, dims.offset_dims, strict=True):
        axis = _whole(context.graph, operand[i], sizes[i])
        out[target] = axis._replace(zero=axis.zero & keeps)
    for i in gone:
        context.graph.freeze(operand[i])
    return [tuple(out)]


def dynamic_slice(context: Context, operand: Axes, *starts: Axes) -> list[Axes]:
    """A part that starts where only the run will tell; an axis that is read whole is what it was."""
    del starts
    pairs = zip(operand, context.settings["slice_sizes"], strict=True)
    return [tuple(_whole(context.graph, axis, size) for axis, size in pairs)]


def _whole(graph: Graph, axis: Axis, size: int) -> Axis:
    if size == len(axis.id):
        return axis
    graph.freeze(axis)
    return fixed(size)


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


def rev(context: Context, operand: Axes) -> list[Axes]:
    """Reversed axes."""
    turned = context.settings["dimensions"]
    return [tuple(part(a, slice(None, None, -1)) if i in turned else a for i, a in enumerate(operand))]


def iota(context: Context) -> list[Axes]:
    """Counting: like a captured array, it can be cut anywhere."""
    return [tuple(context.graph.fresh(n) for n in context.shape)]
