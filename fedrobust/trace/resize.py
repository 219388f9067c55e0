"""Running a model with fewer channels than it was written for."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust.trace.coupling import Coupling, Layout, couple
from fedrobust.trace.program import Equation, Program, apply_equation, evaluate
from fedrobust.types import Params

Keep = Sequence[Sequence[np.ndarray]]
"""For each parameter leaf and each of its axes, [n] bool: which indices stay."""


def resize(
    apply: Callable[[Params, jax.Array], jax.Array], params: Params, keep: Keep
) -> Callable[[Params, jax.Array], jax.Array]:
    """The same model for parameters of which some slices are gone.

    The model is read again for every new image shape and then evaluated with every size that followed from the removed
    slices made smaller. Derivatives of `custom_jvp` functions are kept; every channels-last convolution becomes
    `fedrobust.ops.conv`.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, any pure function.
        params: the full parameters, or their shapes.
        keep: which indices of which axes stay.

    Returns:
        `(small params, image) -> logits`, a pure function that composes with `jit`, `grad`, `vmap` and this function.

    Raises:
        ValueError: (on calling it) the removed slices are not whole units, or the parameters have other shapes.
    """
    shapes = [x.shape for x in jax.tree.leaves(params)]
    small_shapes = [tuple(int(k.sum()) for k in axes) for axes in keep]
    known: dict[Any, tuple[Coupling, np.ndarray]] = {}

    def prepare(treedef: Any, leaves: list[Any], image: Any) -> tuple[Coupling, np.ndarray]:
        """Reading takes a second, so the result is kept for calls outside `jit`, unless it captured traced values."""
        where = (treedef, tuple(x.dtype for x in leaves), image.shape, image.dtype)
        if where in known:
            return known[where]
        full = [jax.ShapeDtypeStruct(shape, x.dtype) for shape, x in zip(shapes, leaves, strict=True)]
        coupling = couple(apply, treedef.unflatten(full), jax.ShapeDtypeStruct(image.shape, image.dtype))
        prepared = coupling, _kept_ids(coupling, keep)
        if not any(isinstance(c, jax.core.Tracer) for c in coupling.program.constants.values()):
            known[where] = prepared
        return prepared

    def small_apply(small_params: Params, image: jax.Array) -> jax.Array:
        leaves, treedef = jax.tree.flatten(small_params)
        if [x.shape for x in leaves] != small_shapes:
            raise ValueError(f"params have shapes {[x.shape for x in leaves]}: must be {small_shapes}")
        coupling, kept = prepare(treedef, leaves, image)
        [logits] = _run(coupling.program, coupling.layout, kept, [*leaves, image])
        return logits

    return small_apply


def _kept_ids(coupling: Coupling, keep: Keep) -> np.ndarray:
    """[num_ids] bool from the parameters' indices that stay."""
    axes = coupling.leaf_axes()
    component = np.concatenate([np.zeros(0, int), *(c for leaf in axes for c in leaf)])
    stays = np.concatenate([np.zeros(0, bool), *(np.asarray(k, bool) for leaf in keep for k in leaf)])
    removed = np.zeros(len(coupling.component), bool)
    removed[component[~stays]] = True
    if (removed[component] == stays).any():
        raise ValueError("the removed channels are not whole units of this model at this image shape")
    return ~removed[coupling.component]


def _run(program: Program, layout: Layout, kept: np.ndarray, inputs: Sequence[Any]) -> list[Any]:
    seen: dict[int, Any] = {}

    def mask(number: int) -> list[np.ndarray]:
        return [kept[axis.id] for axis in layout.axes[number]]

    def emit(equation: Equation, *arrays: Any) -> list[Any]:
        seen.update(zip(equation.inputs, arrays, strict=True))
        before = [mask(i) for i in equation.inputs]
        after = [mask(i) for i in equation.outputs]
        if all(m.all() for masks in (*before, *after) for m in masks):
            return apply_equation(equation, *arrays)
        if equation.rule is not None and equation.body is not None:
            return _custom_jvp(equation, *layout.inner[equation.outputs[0]], kept)(*arrays)
        if equation.name == "iota":
            return [_take(x, m) for x, m in zip(apply_equation(equation), after, strict=True)]
        changes = RESIZE.get(equation.name, lambda *_: {})(equation.settings, arrays, before, after)
        results = apply_equation(equation, *arrays, **changes)
        if equation.name == "reduce_sum":
            return [results[0] + x for x in _lost(program, layout, equation, before[0], seen)] or results
        return results

    constants = {n: _take(c, mask(n)) for n, c in program.constants.items()}
    return evaluate(program._replace(constants=constants), inputs, emit)


def _lost(
    program: Program, layout: Layout, equation: Equation, masks: Sequence[np.ndarray], seen: dict[int, Any]
) -> list[jax.Array]:
    """What a sum loses with the entries that hold one value and not zero: nothing, or one array."""
    [operand] = equation.inputs
    found = []
    for i in equation.settings["axes"]:
        if (~masks[i] & ~layout.axes[operand][i].zero).any():
            [total] = apply_equation(equation, _slice_of_removed(program, layout, operand, i, seen))
            found.append(total * int((~masks[i]).sum()))
    return found


def _slice_of_removed(program: Program, layout: Layout, number: int, axis: int, seen: dict[int, Any]) -> Any:
    """What a removed index of an axis would hold, with length 1 along that axis; see `Axis.uniform`."""
    if program.values[number].shape[axis] == 1:
        return seen[number]
    shape = tuple(1 if i == axis else n for i, n in enumerate(seen[number].shape))
    if layout.axes[number][axis].is_zero():
        return jnp.zeros(shape, seen[number].dtype)
    [equation] = [e for e in program.equations if number in e.outputs]
    if equation.name == "broadcast_in_dim":
        return apply_equation(equation, seen[equation.inputs[0]], shape=shape)[0]
    operands = [
        _slice_of_removed(program, layout, i, axis, seen) if layout.axes[i] else seen[i] for i in equation.inputs
    ]
    return apply_equation(equation, *operands)[0]


def _custom_jvp(equation: Equation, body: Layout, rule: Layout, kept: np.ndarray) -> Callable[..., list[Any]]:
    """The smaller function with the derivative its author gave it, made smaller in the same way."""
    program, derivative = equation.body, equation.rule
    assert program is not None and derivative is not None

    @jax.custom_jvp
    def function(*arrays: Any) -> list[Any]:
        return _run(program, body, kept, arrays)

    @function.defjvp
    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
        both = _run(derivative, rule, kept, [*primals, *tangents])
        return function(*primals), both[len(equation.outputs) :]

    return function


def _take(array: Any, masks: Sequence[np.ndarray]) -> Any:
    for axis, mask in enumerate(masks):
        if not mask.all():
            array = jnp.take(array, np.flatnonzero(mask), axis=axis)
    return array


def _sizes(masks: Sequence[np.ndarray]) -> tuple[int, ...]:
    return tuple(int(m.sum()) for m in masks)


def _slice(settings: dict, arrays: Any, before: Any, after: Any) -> dict[str, Any]:
    starts = [int(m[:start].sum()) for m, start in zip(before[0], settings["start_indices"], strict=True)]
    limits = [int(m[:limit].sum()) for m, limit in zip(before[0], settings["limit_indices"], strict=True)]
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _pad(settings: dict, arrays: Any, before: Any, after: Any) -> dict[str, Any]:
    config = []
    for (low, high, inner), mask in zip(settings["padding_config"], after[0], strict=True):
        if not mask.all():
            low, high = int(mask[:low].sum()), int(mask[len(mask) - high :].sum())
        config.append((low, high, inner))
    return {"padding_config": tuple(config)}


def _slice_sizes(settings: dict, arrays: Any, before: Any, after: Any) -> dict[str, Any]:
    """A gather or a dynamic slice may only have lost part of an axis that it reads whole."""
    pairs = zip(before[0], settings["slice_sizes"], strict=True)
    return {"slice_sizes": tuple(size if mask.all() else int(mask.sum()) for mask, size in pairs)}


def _tile(settings: dict, arrays: Any, before: Any, after: Any) -> dict[str, Any]:
    lengths = zip(_sizes(before[0]), _sizes(after[0]), strict=True)
    return {"reps": tuple(many // one for one, many in lengths)}


def _convolution(settings: dict, arrays: Any, before: Any, after: Any) -> dict[str, Any]:
    image, kernel = arrays
    dims = settings["dimension_numbers"]
    return {"feature_group_count": image.shape[dims.lhs_spec[1]] // kernel.shape[dims.rhs_spec[1]]}


RESIZE: dict[str, Callable[..., dict[str, Any]]] = {
    "reshape": lambda settings, arrays, before, after: {"new_sizes": _sizes(after[0])},
    "broadcast_in_dim": lambda settings, arrays, before, after: {"shape": _sizes(after[0])},
    "split": lambda settings, arrays, before, after: {
        "sizes": tuple(_sizes(masks)[settings["axis"]] for masks in after)
    },
    "slice": _slice,
    "tile": _tile,
    "gather": _slice_sizes,
    "dynamic_slice": _slice_sizes,
    "pad": _pad,
    "conv_general_dilated": _convolution,
}
"""`(settings, arrays, masks of the inputs, masks of the outputs) -> the settings that change`, for what names sizes."""
