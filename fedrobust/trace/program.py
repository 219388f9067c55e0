"""A function as a flat list of equations, and its re-evaluation. The only module that sees a jaxpr.

Values are numbered in the order they appear: the inputs first, then constants and results. Nested calls are inlined, so
whoever reads a program meets plain operations only, plus two kinds of equation that stay whole: those with a derivative
of their own (`rule` then holds that derivative) and those nobody here understands (scan, cond, custom_vjp).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from fedrobust import ops

_INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "core_call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_vmap_call": "call",
}

_PRECISIONS = (None, *((precision, precision) for precision in jax.lax.Precision))


class Equation(NamedTuple):
    """One operation.

    Attributes:
        name: the primitive's name, such as "dot_general".
        inputs: the numbers of the values it reads.
        outputs: the numbers of the values it makes.
        settings: its static parameters.
        bind: `(*arrays, **changed settings) -> list of arrays`, the operation itself.
        body: what a `custom_jvp_call` computes, else None.
        rule: its derivative `(*primals, *tangents) -> (*outputs, *output tangents)`, else None.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    settings: dict[str, Any]
    bind: Callable[..., list[jax.Array]]
    body: "Program | None" = None
    rule: "Program | None" = None


class Program(NamedTuple):
    """A function, read.

    Attributes:
        inputs: the numbers of its inputs, in the order of the flattened arguments.
        outputs: the numbers of its outputs, in the order of the flattened result.
        constants: number -> array or scalar, for literals and captured arrays.
        equations: in an order in which they can be evaluated.
        values: the shape and dtype of every value, by number.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    constants: dict[int, Any]
    equations: tuple[Equation, ...]
    values: tuple[jax.ShapeDtypeStruct, ...]


def read(function: Callable[..., Any], *args: Any) -> Program:
    """Traces a pure function and flattens what it does.

    Args:
        function: any function that `jax.jit` accepts with these arguments.
        *args: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes matter.

    Returns:
        The program; its inputs are `jax.tree.leaves(args)`.
    """
    return _flatten(jax.make_jaxpr(function)(*args), keep_rules=True)


def evaluate(program: Program, inputs: Sequence[Any], emit: Callable[..., list[Any]] | None = None) -> list[Any]:
    """Runs a program equation by equation.

    Args:
        program: what `read` returned.
        inputs: one array for each input.
        emit: `(equation, *arrays) -> list of arrays`, what to do for each equation; None applies it as it was written,
            except that convolutions go through `fedrobust.ops.conv`.

    Returns:
        The outputs, as a list.
    """
    emit = emit or apply_equation
    env = {**program.constants, **dict(zip(program.inputs, inputs, strict=True))}
    for equation in program.equations:
        results = emit(equation, *(env[i] for i in equation.inputs))
        env.update(zip(equation.outputs, results, strict=True))
    return [env[i] for i in program.outputs]


def apply_equation(equation: Equation, *arrays: Any, **changes: Any) -> list[Any]:
    """Applies one equation, some settings changed; a channels-last convolution becomes `fedrobust.ops.conv`."""
    settings = {**equation.settings, **changes}
    if equation.name == "conv_general_dilated" and is_channels_last(settings, *arrays):
        return [channels_last_convolution(settings, *arrays)]
    return equation.bind(*arrays, **changes)


def nested(equation: Equation) -> list[Program]:
    """The programs inside an equation that was not inlined, such as the body of a scan or the branches of a cond."""
    if equation.body is not None:
        return [equation.body]
    found = []
    for value in equation.settings.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (core.Jaxpr, core.ClosedJaxpr)):
                found.append(_flatten(item, keep_rules=False))
    return found


def is_channels_last(settings: dict[str, Any], image: Any, kernel: Any) -> bool:
    """Whether a `conv_general_dilated` of these settings and shapes can be a `fedrobust.ops.conv`."""
    last = image.ndim - 1
    dims = settings["dimension_numbers"]
    return (
        last >= 2
        and tuple(dims.lhs_spec) == tuple(dims.out_spec) == (0, last, *range(1, last))
        and set(settings["lhs_dilation"]) == {1}
        and settings["batch_group_count"] == 1
        and settings["precision"] in _PRECISIONS
        and settings["preferred_element_type"] in (None, image.dtype)
        and image.dtype == kernel.dtype
    )


def channels_last_convolution(settings: dict[str, Any], image: Any, kernel: Any) -> jax.Array:
    """The same convolution by `fedrobust.ops.conv`, its kernel transposed where the layout asks for it."""
    outputs, inputs, *window = settings["dimension_numbers"].rhs_spec
    order = (*window, inputs, outputs)
    return ops.conv(
        image,
        kernel if order == tuple(range(kernel.ndim)) else jax.numpy.transpose(kernel, order),
        strides=settings["window_strides"],
        padding=settings["padding"],
        kernel_dilation=settings["rhs_dilation"],
        groups=settings["feature_group_count"],
        precision=settings["precision"] and settings["precision"][0],
    )


class _Builder:
    """Collects the numbered values, constants and equations of a program while jaxprs are inlined into it."""

    def __init__(self, keep_rules: bool):
        self.keep_rules = keep_rules
        self.values: list[jax.ShapeDtypeStruct] = []
        self.constants: dict[int, Any] = {}
        self.equations: list[Equation] = []

    def number(self, aval: Any) -> int:
        self.values.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return len(self.values) - 1

    def constant(self, aval: Any, value: Any) -> int:
        number = self.number(aval)
        self.constants[number] = value
        return number

    def inline(self, closed: Any, inputs: Sequence[int]) -> list[int]:
        """Adds a jaxpr's equations; returns the numbers of its outputs. `closed` may also be an open jaxpr."""
        jaxpr = getattr(closed, "jaxpr", closed)
        env = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
            env[var] = self.constant(var.aval, value)

        def find(atom: Any) -> int:
            return self.constant(atom.aval, atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outputs = self.add(eqn, [find(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [find(atom) for atom in jaxpr.outvars]

    def add(self, eqn: Any, inputs: list[int]) -> list[int]:
        name = eqn.primitive.name
        if name in _INLINED:
            return self.inline(eqn.params[_INLINED[name]], inputs)
        body = rule = None
        if name in ("custom_jvp_call", "custom_vjp_call"):
            body = _flatten(eqn.params["call_jaxpr"], keep_rules=False)
            # A derivative rule around one bare convolution is there for speed, and `apply_equation` brings it back.
            if not self.keep_rules or [e.name for e in body.equations] == ["conv_general_dilated"]:
                return self.inline(eqn.params["call_jaxpr"], inputs)
            rule = _derivative(eqn) if name == "custom_jvp_call" else None
        outputs = [self.number(var.aval) for var in eqn.outvars]
        self.equations.append(Equation(name, tuple(inputs), tuple(outputs), eqn.params, binder(eqn), body, rule))
        return outputs


def _flatten(closed: Any, keep_rules: bool) -> Program:
    builder = _Builder(keep_rules)
    inputs = [builder.number(var.aval) for var in getattr(closed, "jaxpr", closed).invars]
    outputs = builder.inline(closed, inputs)
    return Program(tuple(inputs), tuple(outputs), builder.constants, tuple(builder.equations), tuple(builder.values))


def binder(eqn: Any) -> Callable[..., list[jax.Array]]:
    """A jaxpr's equation as a function `(*arrays, **changed settings) -> list of arrays`."""

    def bind(*arrays: Any, **changes: Any) -> list[jax.Array]:
        result = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params({**eqn.params, **changes}))
        return list(result) if eqn.primitive.multiple_results else [result]

    return bind


def _derivative(eqn: Any) -> Program | None:
    """The derivative rule of a `custom_jvp_call`; calls inside the rule are inlined, which ends the recursion."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    if not all(jax.numpy.issubdtype(s.dtype, jax.numpy.inexact) for s in shapes):
        return None
    bind = binder(eqn)
    rule = jax.make_jaxpr(lambda primals, tangents: jax.jvp(bind, primals, tangents))(shapes, shapes)
    return _flatten(rule, keep_rules=False)
