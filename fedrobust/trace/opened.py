"""Gradients of convolution kernels taken out of a function before they are written out."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.extend import core

from fedrobust.ops import KernelGradients
from fedrobust.trace.program import binder

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr"}


def with_open_kernels(function: Callable[..., Any], choose: Callable[[KernelGradients], bool]) -> Callable[..., Any]:
    """The same function, some of its results left as the two factors of a contraction.

    A per-example gradient of a convolution's kernel by `vmap(grad(loss))` is a stack of contractions of an image with
    an output gradient; whoever only wants its norms and its weighted sum need not write the stack out. Opened are
    results that are such a stack, read by nothing else, and that `choose` wants open. A kernel used twice, or
    transposed on its way, is a result as it was.

    Args:
        function: a pure function of pytrees of arrays.
        choose: tells of each `fedrobust.ops.KernelGradients` whether it stays open; it sees shapes only.

    Returns:
        A function of the same arguments whose results hold a `KernelGradients` in the place of each opened array.
    """

    def opened(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        found = _run(closed, jax.tree.leaves(args), range(len(closed.jaxpr.outvars)), choose)
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    return opened


def _run(
    closed: Any, inputs: Sequence[Any], openable: Collection[int], choose: Callable[[KernelGradients], bool]
) -> list[Any]:
    """Evaluates a closed jaxpr; the results with a number in `openable` may be left open."""
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.invars, inputs, strict=True)) | dict(zip(jaxpr.constvars, closed.consts, strict=True))
    reads = Counter(atom for eqn in (*jaxpr.eqns, jaxpr) for atom in _read_by(eqn))
    free = {v for i, v in enumerate(jaxpr.outvars) if i in openable and reads[v] == 1}

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        arrays = [value(atom) for atom in eqn.invars]
        places = [i for i, var in enumerate(eqn.outvars) if var in free]
        results = None
        if eqn.primitive.name in _CALLS and places:
            results = _run(eqn.params[_CALLS[eqn.primitive.name]], arrays, places, choose)
        elif places and KernelGradients.is_made_by(eqn.primitive.name, eqn.params):
            gradients = KernelGradients(eqn.params["geometry"], *arrays)
            results = [gradients] if choose(gradients) else None
        env.update(zip(eqn.outvars, binder(eqn)(*arrays) if results is None else results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _read_by(eqn_or_jaxpr: Any) -> list[Any]:
    atoms = getattr(eqn_or_jaxpr, "invars", ()) if hasattr(eqn_or_jaxpr, "primitive") else eqn_or_jaxpr.outvars
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]
