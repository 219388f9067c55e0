"""Which slices of which parameters stand or fall together.

Every index of every axis of every value carries an id. An operation that lines two axes up draws edges between their
ids (a residual sum; a convolution's input channels and its kernel's); one that looks across an axis, or that has no
rule, ties the axis to id 0, which is never removed. The connected components are the units of pruning. The same rules
tell which slices are exactly zero once their unit is masked, or all hold one value that is still known without them: a
sum over an axis may lose such entries, and only such.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedrobust.trace.axes import FROZEN, Axes, Axis, Context, Graph, Option, fixed, opaque
from fedrobust.trace.program import Program, read
from fedrobust.trace.rules import FOLLOWED, RULES
from fedrobust.types import Params


class Layout(NamedTuple):
    """The axes of every value of a program, by number, and the layouts inside its `custom_jvp_call` equations.

    Attributes:
        axes: one tuple of `Axis` per value.
        inner: number of an equation's first output -> (layout of its body, layout of its derivative rule).
    """

    axes: tuple[Axes, ...]
    inner: dict[int, tuple["Layout", "Layout"]]


class Coupling(NamedTuple):
    """A model, read.

    Attributes:
        program: the model as equations; its inputs are the parameter leaves, then the image.
        layout: the axes of every value.
        component: [num_ids] int, equal for ids that stand or fall together; 0 for what is never removed.
        num_leaves: how many of the inputs are parameters.
        unknown: names of the operations that had no rule and froze a parameter's axis, sorted.
    """

    program: Program
    layout: Layout
    component: np.ndarray
    num_leaves: int
    unknown: tuple[str, ...]

    def leaf_axes(self) -> list[list[np.ndarray]]:
        """For each parameter leaf and each of its axes, [n] int: the component of each index."""
        leaves = self.program.inputs[: self.num_leaves]
        return [[self.component[axis.id] for axis in self.layout.axes[leaf]] for leaf in leaves]

    def num_units(self) -> int:
        """How many components can be removed."""
        return len(np.setdiff1d(self.component, FROZEN))


def couple(apply: Callable[[Params, jax.Array], jax.Array], params: Params, image: Any) -> Coupling:
    """Finds the slices of the parameters that have to be removed together for the model to keep making sense.

    The channels of the image and the logits are never removed, nor are parameters that the model does not use. Where an
    axis can be cut in several ways, such as a product that makes queries, keys and values of all heads, or the groups
    of a convolution whose output is shuffled, the first one that leaves something to remove is taken.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, any pure function.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`.
        image: [B,H,W,C], an array or a `jax.ShapeDtypeStruct`.

    Returns:
        The model's program with its components.

    Guarantees:
        Where the parameters of a component are zero, removing them does not change the logits (up to rounding), as long
        as all values are finite.
    """
    program = read(apply, params, image)
    best, options = _coupled(program, {})
    choices: dict[Hashable, int] = {}
    tried: set[Hashable] = set()
    while stuck := [place for place in options if place not in tried and _is_stuck(best, options[place])]:
        tried.add(stuck[0])
        for way in range(1, options[stuck[0]].num_ways):
            other, its_options = _coupled(program, {**choices, stuck[0]: way})
            if other.num_units() > best.num_units():
                best, options, choices = other, its_options, {**choices, stuck[0]: way}
                break
    return best


def _coupled(program: Program, choices: Mapping[Hashable, int]) -> tuple[Coupling, dict[Hashable, Option]]:
    """The components under the given choices, and where there was one."""
    graph = Graph(choices)
    leaves = program.inputs[:-1]
    used = {i for equation in program.equations for i in equation.inputs}
    inputs = [tuple(_parameter_axis(graph, n, i in used) for n in program.values[i].shape) for i in leaves]
    last = graph.num_ids
    inputs.append(tuple(fixed(n) for n in program.values[program.inputs[-1]].shape))
    layout = lay_out(graph, program, inputs)
    for output in program.outputs:
        for axis in layout.axes[output]:
            graph.freeze(axis)
    component = graph.components()
    component[component >= last] = FROZEN  # nothing that a mask on the parameters could zero
    return Coupling(program, layout, component, len(leaves), tuple(sorted(set(graph.unknown)))), graph.options


def _is_stuck(coupling: Coupling, option: Option) -> bool:
    """Whether nothing can be removed where an axis could be cut in another way."""
    return any(len(np.unique(coupling.component[ids])) == 1 for ids in option.ids)


def lay_out(graph: Graph, program: Program, inputs: Sequence[Axes]) -> Layout:
    """Follows the ids of the inputs through a program.

    Args:
        graph: grows by the ids and edges found.
        program: what to follow.
        inputs: the axes of each input.

    Returns:
        The layout of every value.
    """
    axes: list[Axes] = [()] * len(program.values)
    for number, value in zip(program.inputs, inputs, strict=True):
        axes[number] = value
    for number in program.constants:
        axes[number] = tuple(graph.fresh(n) for n in program.values[number].shape)
    literals = {n: v for n, v in program.constants.items() if np.ndim(v) == 0 and not isinstance(v, jax.core.Tracer)}
    inner = {}
    for equation in program.equations:
        operands = [axes[i] for i in equation.inputs]
        if equation.rule is not None and equation.body is not None:
            operands = _as_given(operands)
            body = lay_out(graph, equation.body, operands)
            rule = lay_out(graph, equation.rule, operands * 2)
            results = [body.axes[i] for i in equation.body.outputs]
            for out, again in zip(results * 2, equation.rule.outputs, strict=True):
                for x, y in zip(out, rule.axes[again], strict=True):
                    graph.join(x.id, y.id)
            inner[equation.outputs[0]] = (body, rule)
        else:
            context = Context(graph, equation, program.values, literals)
            results = RULES.get(equation.name, opaque)(context, *operands)
        if equation.name not in FOLLOWED:
            results = _as_given(results)
        for number, value in zip(equation.outputs, results, strict=True):
            axes[number] = value
    return Layout(tuple(axes), inner)


def _as_given(values: Sequence[Axes]) -> list[Axes]:
    """Without what is known of where the values come from."""
    return [tuple(axis._replace(uniform=False) for axis in axes) for axes in values]


def _parameter_axis(graph: Graph, size: int, is_used: bool) -> Axis:
    return graph.fresh(size, zero=True) if is_used else fixed(size)
