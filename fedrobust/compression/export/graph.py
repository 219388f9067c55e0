"""A model's equations written as an ONNX graph, for every batch size at once.

ONNX wants shapes that depend on the batch spelled out. So the model is read twice, at two batch sizes, and a length
that differs is a multiple of the batch: `Length(times, plus)`. Whatever depends on float parameters and constants alone
is computed here and stored; weights in 8 bits stay as they are, each behind its own DequantizeLinear.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedrobust.trace import Equation, Program

SIZES = (3, 5)
"""The batch sizes at which a model is read."""


class Length(NamedTuple):
    """The length of an axis: `times * batch + plus`."""

    times: int
    plus: int


class Weight(NamedTuple):
    """A parameter in few bits. Attributes: value: int8, per-channel along its last axis; scale, zero_point: [n]."""

    value: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray


@dataclass(frozen=True)
class Value:
    """What is known of a value: its shape, and one of a constant, a weight, or the name of a tensor of the graph."""

    shape: tuple[Length, ...]
    dtype: np.dtype
    name: str = ""
    constant: np.ndarray | None = None
    weight: Weight | None = None


Rule = Callable[..., list[str]]
"""`(graph, context, *inputs) -> names of the outputs`."""


class Context(NamedTuple):
    """What a rule may look at. Attributes: settings: of the equation; shapes, dtypes: of its outputs; range: of its
    first input, (scale, zero point), where that input is quantized, else None."""

    settings: dict[str, Any]
    shapes: tuple[tuple[Length, ...], ...]
    dtypes: tuple[np.dtype, ...]
    range: tuple[float, int] | None


@dataclass
class Graph:
    """Nodes and stored tensors, collected while the equations are gone through.

    Attributes:
        rules: what to do for each primitive.
        image: name of the input, whose first axis is the batch.
        nodes: in an order in which they can run.
        tensors: what is stored in the file.
    """

    rules: Mapping[str, Rule]
    image: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    _count: int = 0
    _stored: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    _batch: str = ""

    def add(self, operator: str, *inputs: str, **settings: Any) -> str:
        """Appends a node with one output and returns the name of that."""
        name = self._name()
        self.nodes.append(helper.make_node(operator, inputs, [name], **settings))
        return name

    def store(self, array: Any) -> str:
        """Stores an array, equal ones once, and returns its name."""
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._stored:
            self._stored[key] = self._name()
            self.tensors.append(
                numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), self._stored[key])
            )
        return self._stored[key]

    def ints(self, *values: int) -> str:
        """A stored vector of int64."""
        return self.store(np.array(values, np.int64))

    def use(self, value: Value, order: Sequence[int] | None = None) -> str:
        """The name of a value's tensor, its axes in another order if one is given.

        Constants and weights are stored in that order, and weights dequantized behind it.
        """
        if order is not None and tuple(order) == tuple(range(len(value.shape))):
            order = None
        if value.weight is not None:
            return self._dequantized(value.weight, order)
        if value.constant is not None:
            return self.store(value.constant if order is None else np.transpose(value.constant, order))
        return value.name if order is None else self.add("Transpose", value.name, perm=list(order))

    def shape(self, lengths: Sequence[Length]) -> str:
        """The name of a shape vector; where only one length depends on the batch, -1 stands for it, see `reshape`."""
        parts = [self.ints(n.plus) if n.times == 0 else self._length(n) for n in lengths]
        if all(n.times == 0 for n in lengths):
            return self.ints(*(n.plus for n in lengths))
        return self.add("Concat", *parts, axis=0)

    def reshape(self, name: str, lengths: Sequence[Length]) -> str:
        """A tensor in another shape of equal size."""
        if sum(n.times != 0 for n in lengths) <= 1 and all(n != Length(0, 0) for n in lengths):
            return self.add("Reshape", name, self.ints(*(-1 if n.times else n.plus for n in lengths)))
        return self.add("Reshape", name, self.shape(lengths))

    def needed_by(self, last: onnx.NodeProto) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The nodes whose results reach `last`, and it, in order, with the tensors that they read."""
        needed, kept = set(last.input), [last]
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        return kept[::-1], [tensor for tensor in self.tensors if tensor.name in needed]

    def write(
        self,
        programs: tuple[Program, Program],
        inputs: Sequence[Value],
        ranges: Mapping[int, tuple[float, int]] | None = None,
    ) -> list[Value]:
        """Goes through a program, read at both of `SIZES`.

        Args:
            programs: the same program twice.
            inputs: what is known of its inputs.
            ranges: number of the value that an equation makes -> (scale, zero point) of its first input, where that is
                to be quantized.

        Returns:
            What is known of its outputs.

        Raises:
            ValueError: an operation that ONNX or these rules do not know.
        """
        first, second = programs
        env = dict(zip(first.inputs, inputs, strict=True))
        for number, array in first.constants.items():
            env[number] = _constant(np.asarray(array, first.values[number].dtype))
        for pair in zip(first.equations, second.equations, strict=True):
            equation = pair[0]
            given = [env[i] for i in equation.inputs]
            shapes = tuple(
                _lengths(first.values[i].shape, second.values[j].shape)
                for i, j in zip(equation.outputs, pair[1].outputs, strict=True)
            )
            dtypes = tuple(np.dtype(first.values[i].dtype) for i in equation.outputs)
            if equation.body is not None and pair[1].body is not None:
                found = self.write((equation.body, pair[1].body), given)
            elif (folded := _folded(equation, given, shapes)) is not None:
                found = [_constant(array) for array in folded]
            else:
                context = Context(equation.settings, shapes, dtypes, (ranges or {}).get(equation.outputs[0]))
                names = self._rule(equation.name)(self, context, *given)
                found = [Value(*known) for known in zip(shapes, dtypes, names, strict=True)]
            env.update(zip(equation.outputs, found, strict=True))
        return [env[i] for i in first.outputs]

    def _rule(self, name: str) -> Rule:
        require_known(name in self.rules, f"the operation {name!r}")
        return self.rules[name]

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _length(self, length: Length) -> str:
        if not self._batch:
            self._batch = self.add("Shape", self.image, start=0, end=1)
        scaled = self._batch if length.times == 1 else self.add("Mul", self._batch, self.ints(length.times))
        return scaled if length.plus == 0 else self.add("Add", scaled, self.ints(length.plus))

    def _dequantized(self, weight: Weight, order: Sequence[int] | None) -> str:
        order = list(order) if order is not None else list(range(weight.value.ndim))
        axis = order.index(weight.value.ndim - 1)
        inputs = [self.store(np.transpose(weight.value, order)), self.store(weight.scale.astype(np.float32))]
        if weight.zero_point.any():
            inputs.append(self.store(weight.zero_point.astype(weight.value.dtype)))
        return self.add("DequantizeLinear", *inputs, axis=axis)


def require_known(condition: bool, what: str) -> None:
    """Raises unless `condition` holds: the model has something that cannot be exported."""
    if not condition:
        raise ValueError(f"apply has {what}: cannot be written as ONNX")


def fixed(shape: Sequence[int]) -> tuple[Length, ...]:
    """A shape that is the same for every batch."""
    return tuple(Length(0, int(n)) for n in shape)


def _constant(array: np.ndarray) -> Value:
    return Value(fixed(array.shape), array.dtype, constant=array)


def _lengths(first: Sequence[int], second: Sequence[int]) -> tuple[Length, ...]:
    """From the same shape at both of `SIZES`."""
    found = []
    for a, b in zip(first, second, strict=True):
        times = (b - a) // (SIZES[1] - SIZES[0])
        found.append(Length(times, a - times * SIZES[0]))
    return tuple(found)


def _folded(equation: Equation, inputs: Sequence[Value], shapes: Sequence[Sequence[Length]]) -> list[np.ndarray] | None:
    """The results of an equation that depends on constants alone, or None."""
    known = all(value.constant is not None for value in inputs)
    if not known or any(n.times for shape in shapes for n in shape):
        return None
    with jax.ensure_compile_time_eval():
        return [np.asarray(x) for x in equation.bind(*(value.constant for value in inputs))]
