"""Where a model's gradient is cut, and the same model with a gradient there."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedrobust.trace.program import Equation, Program, apply_equation, evaluate, nested, read

_STEPS = ("round", "floor", "ceil", "sign")
_CASTS = ("convert_element_type", "bitcast_convert_type")
_STOPS = ("stop_gradient",)
_CHOICE = "choice"


def interruptions(function: Callable[[jax.Array], jax.Array], image: Any) -> tuple[str, ...]:
    """What stands between an image and a model's logits and lets no gradient, or a wrong one, through.

    Args:
        function: `image[B,H,W,C] -> logits[B,L]`, its parameters inside.
        image: an example, or its shape and dtype.

    Returns:
        The names, each once, in the order they are met: "round", "floor", "ceil", "sign", "stop_gradient", "cast to
        integer" and "cast from integer" (of what depends on the image, a comparison's outcome included), "bitcast",
        "pure_callback" and other calls to the host; "choice" of a constant, by a comparison or an index such as an
        argmax. A maximum, a choice between values that depend on the image themselves, and a derivative rule given by
        an author are none of these. An empty tuple is no proof: gradients can also vanish by saturation.
    """
    found: dict[str, None] = {}
    program = read(function, image)
    _visit(program, [True] * len(program.inputs), found)
    return tuple(found)


def _visit(program: Program, from_image: Sequence[bool], found: dict[str, None]) -> list[bool]:
    """Collects the names of a program, some of whose inputs depend on the image; returns which outputs do."""
    reached = {number for number, flag in zip(program.inputs, from_image, strict=True) if flag}
    used = _leading_to_outputs(program)
    for equation in program.equations:
        if not reached.intersection(equation.inputs):
            continue
        reached.update(equation.outputs)
        if not used.intersection(equation.outputs):
            continue
        name = _interruption(equation, program, reached)
        if name:
            found.setdefault(name)
        if equation.rule is None:  # an author's derivative stands for what is inside
            for body in nested(equation):
                _visit(body, _inputs_of(equation, body, [i in reached for i in equation.inputs]), found)
    return [number in reached for number in program.outputs]


def _inputs_of(equation: Equation, body: Program, from_image: list[bool]) -> list[bool]:
    """Which inputs of a body depend on the image: known of a scan and a cond, taken to be all elsewhere."""
    if equation.name == "cond":
        return from_image[1:]
    if equation.name != "scan":
        return [True] * len(body.inputs)
    first, count = equation.settings["num_consts"], equation.settings["num_carry"]
    flags, before = list(from_image), None
    while flags != before:  # what a step leaves in the carry, the next one starts from
        before = list(flags)
        for j, out in enumerate(_visit(body, flags, {})[:count]):
            flags[first + j] |= out
    return flags


def _interruption(equation: Equation, program: Program, reached: set[int]) -> str | None:
    name = equation.name
    if name in _STEPS or name in _STOPS:
        return name
    if name == "bitcast_convert_type":
        return "bitcast"
    if "callback" in name:
        return name
    if name == "convert_element_type" and equation.inputs[0] in reached:
        before, after = (_is_float(program, i) for i in (equation.inputs[0], equation.outputs[0]))
        if before != after:
            return "cast to integer" if before else "cast from integer"
        return None
    return _CHOICE if _is_choice(equation, program, reached) else None


def _is_choice(equation: Equation, program: Program, reached: set[int]) -> bool:
    """Whether its floats depend on the image through comparisons and indices alone."""
    from_image = [i for i in equation.inputs if i in reached]
    whole = equation.name == "cond" or not nested(equation)  # inside of other bodies the equations answer themselves
    floats = any(_is_float(program, i) for i in equation.outputs)
    return whole and floats and not any(_is_float(program, i) for i in from_image)


def _is_float(program: Program, number: int) -> bool:
    return jnp.issubdtype(program.values[number].dtype, jnp.inexact)


def _leading_to_outputs(program: Program) -> set[int]:
    used = set(program.outputs)
    for equation in reversed(program.equations):
        if used.intersection(equation.outputs):
            used.update(equation.inputs)
    return used


def straight_through(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, differentiated as if it did not round: a twin that can be attacked.

    Rounding and casts to integers keep their values and get the derivative 1, `stop_gradient` goes, and what is
    computed in integers is computed in float32, exactly up to 2^24. Equations inside a scan, a while loop or a cond
    stay as they are.

    Args:
        function: a pure function of pytrees of arrays, such as a model on integers.

    Returns:
        A function of the same arguments and values (float32 where they were integers), to be differentiated.

    Raises:
        ValueError: when called: something inside a loop or a branch cuts the gradient.

    Source: Bengio, Leonard, Courville 2013 (arXiv 1308.3432), section 4, "straight-through"; as an attack: Athalye,
    Carlini, Wagner 2018 (arXiv 1802.00420), section 4.1.1.
    """

    def twin(*args: Any) -> Any:
        program = read(function, *args)
        shape = jax.eval_shape(function, *args)
        found = evaluate(program, jax.tree.leaves(args), _emit)
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return twin


def _emit(equation: Equation, *arrays: Any) -> list[Any]:
    if equation.rule is None and (names := _cut_inside(equation)):
        inside = f"{', '.join(names)} inside {equation.name!r}"
        raise ValueError(f"function has {inside}: must be outside of loops and branches")
    if equation.name in _STOPS:
        return [arrays[0]]
    if equation.name in _STEPS:
        return [_with_slope_one(arrays[0], equation.bind(arrays[0])[0])]
    carries_float = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in arrays]
    if equation.name == "convert_element_type" and carries_float[0]:
        target = equation.settings["new_dtype"]
        if jnp.issubdtype(target, jnp.inexact):
            return equation.bind(arrays[0])
        if jnp.issubdtype(target, jnp.integer):
            return [_with_slope_one(arrays[0], jnp.trunc(arrays[0]))]
    if any(carries_float) and not all(carries_float) and equation.name in _ARITHMETIC:
        arrays = tuple(jnp.asarray(x, jnp.float32) for x in arrays)
    changes = {}
    if any(carries_float) and "preferred_element_type" in equation.settings:
        wanted = equation.settings["preferred_element_type"]
        if wanted is not None and jnp.issubdtype(wanted, jnp.integer):
            changes["preferred_element_type"] = jnp.dtype(jnp.float32)
    return apply_equation(equation, *arrays, **changes)


def _cut_inside(equation: Equation) -> list[str]:
    """What cuts the gradient inside an equation; a cast or choice by an integer, such as a counter, does not."""
    found: dict[str, None] = {}
    for body in nested(equation):
        _visit(body, [True] * len(body.inputs), found)
    return [name for name in found if name not in ("cast from integer", _CHOICE)]


_ARITHMETIC = ("add", "sub", "mul", "div", "max", "min", "dot_general", "conv_general_dilated", "clamp", "pad")


def _with_slope_one(x: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(jnp.asarray(value, x.dtype)) + (x - jax.lax.stop_gradient(x))
