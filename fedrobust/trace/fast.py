"""The same function with faster convolutions, for models written without `fedrobust.ops`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from fedrobust.trace.program import binder, channels_last_convolution, is_channels_last

# What is looked into, and the setting that holds the equations. Functions with a derivative rule of their own stay
# whole: `fedrobust.ops.conv` is one of them.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "core_call": "call_jaxpr", "closed_call": "call_jaxpr"}
_CHECKPOINTS = {"checkpoint": "jaxpr", "remat2": "jaxpr"}
_LOOPS = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}


def fast_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with every plain channels-last convolution replaced by `fedrobust.ops.conv`.

    For models written with `flax.linen.Conv`, `haiku.Conv2D` or `jax.lax`, whose weight gradients are slow inside loops
    and under `vmap` on a CPU: a Flax net of four convolutions, batch 64, its clipped gradient in microbatches of 16:
    1960 ms, so 35 (2 busy x86 cores, jax 0.10.2, 2026-11-23).

    Convolutions inside jitted functions, `jax.checkpoint`, scans, while loops and branches are replaced as well. Left
    alone are those inside functions with a `custom_jvp` or `custom_vjp`, those in another layout, transposed ones, and
    input gradients of strided ones that the function itself takes (an attack inside a loss: wrap the model it sees).

    Args:
        function: a pure function of pytrees: a model, a loss.

    Returns:
        A function of the same arguments and results. It takes positional arguments only.

    Guarantees:
        A function without a plain convolution is called as it is. Otherwise values and derivatives of every order are
        the same up to rounding, derivative rules given by an author included.
    """

    def fast(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        if not any(map(_is_slow, closed.jaxpr.eqns)):
            return function(*args)
        return jax.tree.unflatten(jax.tree.structure(shape), _run(closed, jax.tree.leaves(args)))

    return fast


def fast_inference(model: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """The same model with its forward pass in the fast form that `fedrobust.ops.conv` takes under derivatives.

    Not differentiated, `ops.conv` is one plain `lax` convolution, for whoever reads it, and on a CPU that keeps one
    core busy: ResNet-9 of width 16 on 28 x 28, 64 images, 455 us each, so 270 (2 x86 cores, jax 0.10.2, 2026-11-25).

    Args:
        model: image [B,H,W,C] -> any pytree of arrays [B, ...].

    Returns:
        A model of the same argument and results up to rounding. One that knows no `vmap` (a callback) runs as it is.
    """
    # Under a vmap, here over an axis of one, every convolution becomes its contraction.
    batched = jax.vmap(fast_convolutions(model))

    def fast(image: jax.Array) -> Any:
        try:
            jax.eval_shape(batched, image[None])
        except NotImplementedError:
            return model(image)
        return jax.tree.map(lambda x: x[0], batched(image[None]))

    return fast


def _run(closed: Any, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr, open or closed, with fast convolutions."""
    jaxpr = getattr(closed, "jaxpr", closed)
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env |= zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True)

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        apply = _replacement if _is_slow(eqn) else _as_it_is
        env |= zip(eqn.outvars, apply(eqn, [value(atom) for atom in eqn.invars]), strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _as_it_is(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    return binder(eqn)(*inputs)


def _replacement(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        return [channels_last_convolution(eqn.params, *inputs)]
    if name in _CALLS:
        return _run(eqn.params[_CALLS[name]], inputs)
    if name in _CHECKPOINTS:
        settings = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
        body = eqn.params[_CHECKPOINTS[name]]
        return jax.checkpoint(lambda *args: _run(body, args), **settings)(*inputs)
    changes = {}
    for key in _LOOPS[name]:
        bodies = eqn.params[key]
        changes[key] = tuple(map(_rewritten, bodies)) if isinstance(bodies, tuple) else _rewritten(bodies)
    return binder(eqn)(*inputs, **changes)


def _rewritten(closed: Any) -> Any:
    """The same closed jaxpr with fast convolutions."""
    return jax.make_jaxpr(lambda *args: _run(closed, args))(*(var.aval for var in closed.jaxpr.invars))


def _is_slow(eqn: Any) -> bool:
    """Whether an equation is, or holds, a convolution to replace."""
    if eqn.primitive.name == "conv_general_dilated":
        return is_channels_last(eqn.params, *(atom.aval for atom in eqn.invars))
    return any(_is_slow(inner) for body in _bodies(eqn) for inner in getattr(body, "jaxpr", body).eqns)


def _bodies(eqn: Any) -> Iterator[Any]:
    name = eqn.primitive.name
    found = {**_CALLS, **_CHECKPOINTS}.get(name)
    for key in (found,) if found else _LOOPS.get(name, ()):
        bodies = eqn.params[key]
        yield from bodies if isinstance(bodies, tuple) else (bodies,)
