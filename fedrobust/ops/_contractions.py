"""The three contractions behind a convolution, as JAX primitives.

A convolution is a trilinear form in image, kernel and output: its value, its input gradient and its kernel
gradient are the three contractions that each leave one of them open, and every derivative of any order is again
one of the three. They are primitives, not `jax.custom_vjp` and `custom_vmap`, for one reason: only a primitive
knows at once how to batch and how to transpose. A custom VJP under `grad(vmap(loss))` computes one kernel gradient
per example and sums them afterwards; these fold the examples into the batch first.

What runs on which platform is decided at the end of this module, and only there.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fedrobust.ops import _cpu
from fedrobust.ops._geometry import Geometry, plain

_zip = partial(zip, strict=True)
_ROLES = ("image", "kernel", "output")
_PRIMITIVES = {role: Primitive(f"convolution_{role}") for role in _ROLES}


def contract(role: str, geometry: Geometry, first: jax.Array, second: jax.Array) -> jax.Array:
    """Contracts two of image [B,*image,Cin], kernel [*window,Cin//groups,Cout] and output [B,*output,Cout].

    Args:
        role: the one that is left open, "image", "kernel" or "output".
        geometry: the static settings.
        first: the earlier of the other two, in the order above.
        second: the later one.

    Returns:
        An array of the shape of `role`.
    """
    return _bind(role, first, second, geometry=geometry, stacked=False)


def _bind(role: str, first: jax.Array, second: jax.Array, *, geometry: Geometry, stacked: bool) -> jax.Array:
    first, second = _vary_like(first, second), _vary_like(second, first)
    return _PRIMITIVES[role].bind(first, second, geometry=geometry, stacked=stacked)


def _vary_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, marked as varying over the mesh axes of `other`: `lax` does so by itself, primitives do not."""
    missing = tuple(jax.typeof(other).mat.varying - jax.typeof(x).mat.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def _others(role: str) -> list[str]:
    return [name for name in _ROLES if name != role]


def _transpose(role: str, wanted: str, cotangent, first, second, *, geometry: Geometry, stacked: bool) -> jax.Array:
    known = dict(_zip(_others(role), (first, second))) | {role: cotangent}
    return _bind(wanted, *(known[name] for name in _others(wanted)), geometry=geometry, stacked=stacked)


def _batch(role: str, operands: Sequence[jax.Array], axes: Sequence, *, geometry: Geometry, stacked: bool):
    size = next(x.shape[a] for x, a in _zip(operands, axes) if a is not None)
    bind = partial(_bind, role, geometry=geometry)
    if role != "kernel" and axes[_others(role).index("kernel")] is None:
        # Only the data is batched: more examples of the same contraction.
        axis = int(stacked)
        folded = [
            x if a is None else (y := jnp.moveaxis(x, a, axis)).reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
            for x, a in _zip(operands, axes)
        ]
        out = bind(*folded, stacked=stacked)
        return out.reshape(*out.shape[:axis], size, -1, *out.shape[axis + 1 :]), axis
    piled = [
        jnp.broadcast_to(x, (size, *x.shape)) if a is None else jnp.moveaxis(x, a, 0) for x, a in _zip(operands, axes)
    ]
    if not stacked:
        return bind(*piled, stacked=True), 0
    out = bind(*(x.reshape(-1, *x.shape[2:]) for x in piled), stacked=True)
    return out.reshape(size, -1, *out.shape[1:]), 0


def _by_lax(role: str, first: jax.Array, second: jax.Array, *, geometry: Geometry, stacked: bool) -> jax.Array:
    """What `lax` itself does, gradients included."""
    if stacked:
        return jax.vmap(partial(_by_lax, role, geometry=geometry, stacked=False))(first, second)
    if role == "output":
        return plain(geometry, first, second)
    if role == "image":
        shape = (second.shape[0], *geometry.image, first.shape[-2] * geometry.groups)
        value = partial(plain, geometry, kernel=first)
    else:
        shape = (*geometry.window, first.shape[-1] // geometry.groups, second.shape[-1])
        value = partial(plain, geometry, first)
    zeros = _vary_like(jnp.zeros(shape, second.dtype), second)
    return jax.vjp(value, zeros)[1](second)[0]


def _abstract(role: str, first, second, *, geometry: Geometry, stacked: bool):
    return jax.make_jaxpr(partial(_by_lax, role, geometry=geometry, stacked=stacked))(first, second).out_avals[0]


for _role, _primitive in _PRIMITIVES.items():
    _primitive.def_impl(jax.jit(_primitive.bind, static_argnames=("geometry", "stacked")))
    _primitive.def_abstract_eval(partial(_abstract, _role))
    ad.defbilinear(_primitive, *(partial(_transpose, _role, _wanted) for _wanted in _others(_role)))
    batching.primitive_batchers[_primitive] = partial(_batch, _role)
    # Other platforms than the CPU were not measured: they run what `lax` does.
    mlir.register_lowering(_primitive, mlir.lower_fun(partial(_by_lax, _role), multiple_results=False))
    _on_cpu = mlir.lower_fun(partial(_cpu.contract, _role), multiple_results=False)
    mlir.register_lowering(_primitive, _on_cpu, platform="cpu")
