"""Axes whose indices carry ids, and the graph that ties the ids together."""

from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fedrobust.trace.program import Equation

FROZEN = 0


class Axis(NamedTuple):
    """One axis of one value.

    Attributes:
        id: [n] int, the id of each index; 0 is never removed.
        zero: [n] bool, whether masking the id's unit makes this slice exactly zero (given that all values are finite).
        free: whether the axis only repeats one slice, so that nothing is lost when others decide about it.
        uniform: whether all masked slices hold one value, which follows from the operands of the operation that made
            the axis: a broadcast, or elementwise operations on such.
    """

    id: np.ndarray
    zero: np.ndarray
    free: bool = False
    uniform: bool = False

    def is_zero(self) -> bool:
        """Whether every slice that can go at all is zero once masked."""
        return bool((self.zero | (self.id == FROZEN)).all())


Axes = tuple[Axis, ...]


class Option(NamedTuple):
    """A place where an axis can be cut in more than one way, each of them right.

    Attributes:
        num_ways: how many.
        ids: of the axes that met the place.
    """

    num_ways: int
    ids: list[np.ndarray]


class Graph:
    """Ids and the edges between them.

    Args:
        choices: place -> way, for the places where the way is not 0.
    """

    def __init__(self, choices: Mapping[Hashable, int] = MappingProxyType({})):
        self.num_ids = 1
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.unknown: list[str] = []
        self.choices = choices
        self.options: dict[Hashable, Option] = {}

    def choose(self, place: Hashable, num_ways: int, axis: Axis) -> int:
        """The way taken at a place; that there was a choice is remembered."""
        self.options.setdefault(place, Option(num_ways, [])).ids.append(axis.id)
        return self.choices.get(place, 0)

    def fresh(self, size: int, zero: bool = False, free: bool = False) -> Axis:
        """An axis of new ids."""
        ids = np.arange(self.num_ids, self.num_ids + size)
        self.num_ids += size
        return Axis(ids, np.full(size, zero), free)

    def join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Ties ids pairwise."""
        a, b = np.broadcast_arrays(a, b)
        self.edges.append((a.ravel(), b.ravel()))

    def freeze(self, axis: Axis, where: np.ndarray | None = None) -> None:
        """Ties an axis, or the part of it where the [n] bool array holds, to what is never removed."""
        self.join(axis.id if where is None else axis.id[where], np.asarray(FROZEN))

    def components(self) -> np.ndarray:
        """[num_ids] int, the smallest id of each id's component."""
        a = np.concatenate([np.zeros(0, int), *(a for a, _ in self.edges)])
        b = np.concatenate([np.zeros(0, int), *(b for _, b in self.edges)])
        matrix = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(self.num_ids, self.num_ids))
        _, label = connected_components(matrix, directed=False)
        first = np.full(label.max() + 1, self.num_ids)
        np.minimum.at(first, label, np.arange(self.num_ids))
        return first[label]


def fixed(size: int) -> Axis:
    """An axis that is never cut."""
    return Axis(np.full(size, FROZEN), np.zeros(size, bool))


def merge(graph: Graph, axes: list[Axis], zero: Callable[[list[np.ndarray]], np.ndarray]) -> Axis:
    """Axes that are one axis from here on; `zero` combines what is known of their zeros.

    An axis of length 1 beside longer ones repeats its slice, and says nothing of the others' ids.
    """
    size = max(len(axis.id) for axis in axes)
    full = [axis for axis in axes if len(axis.id) == size]
    for axis in axes:
        if len(axis.id) == size:
            graph.join(full[0].id, axis.id)
        else:
            graph.freeze(axis)
    zeros = [axis.zero if len(axis.id) == size else np.zeros(size, bool) for axis in axes]
    return Axis(np.minimum.reduce([axis.id for axis in full]), zero(zeros), all(axis.free for axis in full))


def segments(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """The finest grouping of axes longer than 1 in which both sides have equal products."""
    sources = [i for i, n in enumerate(old) if n > 1]
    targets = [i for i, n in enumerate(new) if n > 1]
    found = []
    while sources:
        left, right = [sources.pop(0)], [targets.pop(0)]
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(sources.pop(0))
                a *= old[left[-1]]
            else:
                right.append(targets.pop(0))
                b *= new[right[-1]]
        found.append((left, right))
    return found


def flattened(graph: Graph, axes: list[Axis]) -> Axis:
    """One axis out of several. Only one of them can still be cut: the last that carries channels of its own."""
    if len(axes) == 1:
        return axes[0]
    cut = [i for i, axis in enumerate(axes) if (axis.id != FROZEN).any()]
    own = [i for i in cut if not axes[i].free]
    carrier = (own or cut or [0])[-1]
    for i in cut:
        if i != carrier:
            graph.freeze(axes[i])
    shape = [len(axis.id) for axis in axes]
    across = [-1 if i == carrier else 1 for i in range(len(axes))]
    ids, zero = (np.broadcast_to(x.reshape(across), shape).ravel() for x in (axes[carrier].id, axes[carrier].zero))
    return Axis(ids, zero, axes[carrier].free)


def split_axis(graph: Graph, axis: Axis, shape: list[int]) -> list[Axis]:
    """Several axes out of one. The one that can still be cut is the one along which the ids vary.

    Where they vary along more than one, as when channels become (groups, channels per group), it is by default the
    first: each group stands or falls as a whole.
    """
    if len(shape) == 1:
        return [axis]
    ids = axis.id.reshape(shape)
    varying = _varying(ids)
    if len(varying) > 1 and graph.choices:  # what was tied across the groups of a convolution has ids of its own still
        varying = _varying(graph.components()[ids])
    way = graph.choose(("split", *shape), len(varying), axis) if len(varying) > 1 else 0
    carrier = varying[way] if varying else 0
    rows = np.moveaxis(ids, carrier, 0).reshape(shape[carrier], -1)
    zero = np.logical_and.reduce(np.moveaxis(axis.zero.reshape(shape), carrier, 0).reshape(shape[carrier], -1), axis=1)
    graph.join(rows, rows[:, :1])
    out = [fixed(n) for n in shape]
    out[carrier] = Axis(rows.min(axis=1), zero, axis.free)
    return out


def _varying(ids: np.ndarray) -> list[int]:
    return [d for d in range(ids.ndim) if (ids != ids.take([0], axis=d)).any()]


def part(axis: Axis, index: slice) -> Axis:
    """Some of an axis's indices."""
    return Axis(axis.id[index], axis.zero[index], axis.free)


def tiled(axis: Axis, repeats: int) -> Axis:
    """The indices of an axis again and again."""
    return Axis(np.tile(axis.id, repeats), np.tile(axis.zero, repeats), axis.free)


class Context(NamedTuple):
    """What a rule may look at beside the axes of the operands.

    Attributes:
        graph: takes new ids and edges.
        equation: the operation.
        values: shape and dtype of every value.
        literals: number -> scalar, for the values known now.
    """

    graph: Graph
    equation: Equation
    values: tuple[jax.ShapeDtypeStruct, ...]
    literals: dict[int, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """The operation's static parameters."""
        return self.equation.settings

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.values[self.equation.outputs[0]].shape

    def literal(self, operand: int) -> Any:
        """The known scalar value of an operand, or None."""
        return self.literals.get(self.equation.inputs[operand])


def opaque(context: Context, *operands: Axes) -> list[Axes]:
    """An operation without a rule: all it touches stays as it is, and its name is kept for the user."""
    touched = [axis for operand in operands for axis in operand if (axis.id != FROZEN).any()]
    if touched:
        context.graph.unknown.append(context.equation.name)
    for axis in touched:
        context.graph.freeze(axis)
    return [tuple(fixed(n) for n in context.values[i].shape) for i in context.equation.outputs]
