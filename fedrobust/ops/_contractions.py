"""The three contractions behind a convolution, as JAX primitives.

A convolution is a trilinear form in image, kernel and output: its value, its input gradient and its kernel
gradient are the three contractions that each leave one of them open, and every derivative of any order is again
one of the three. They are primitives, not `jax.custom_vjp` and `custom_vmap`, for one reason: only a primitive
knows at once how to batch and how to transpose. A custom VJP under `grad(vmap(loss))` computes one kernel gradient
per example and sums them afterwards; these fold the examples into the batch first.

What runs on which platform is decided at the end of this module, and only there.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_zip = partial(zip, strict=True)
_ROLES = ("image", "kernel", "output")
_PRIMITIVES = {role: Primitive(f"convolution_{role}") for role in _ROLES}


class Geometry(NamedTuple):
    """The static half of a convolution, one entry per spatial axis.

    Attributes:
        image: spatial sizes of the image.
        window: spatial sizes of the kernel.
        strides: steps between outputs.
        padding: zeros before and after each axis; negative crops.
        dilation: steps between kernel entries.
        groups: independent groups of channels.
    """

    image: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


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


def plain(geometry: Geometry, image: jax.Array, kernel: jax.Array, *, roomy: bool = False) -> jax.Array:
    """The convolution as one `lax.conv_general_dilated`; `roomy`: see `_lax_conv`."""
    return _lax_conv(
        image,
        kernel,
        geometry,
        strides=geometry.strides,
        padding=geometry.padding,
        image_dilation=(1,) * len(geometry.image),
        kernel_dilation=geometry.dilation,
        roomy=roomy,
    )


def _lax_conv(
    image: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    *,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    image_dilation: Sequence[int],
    kernel_dilation: Sequence[int],
    roomy: bool,
) -> jax.Array:
    """`lax.conv_general_dilated`, channels last; `roomy`: an image smaller than the window is padded beforehand.

    Otherwise XLA for the CPU takes a naive kernel: 64 x 2 x 2 x 48 -> 48 channels, window 3 x 3, 1.9 ms, so 0.19;
    64 x 2 x 2 x 128 -> 128, 10.3 and 0.77 (2 x86 cores, jax 0.10.2, 2026-11-23). Images of one entry are fine.
    """
    sizes = [d * (n - 1) + 1 for d, n in _zip(image_dilation, image.shape[1:-1])]
    reach = [d * (k - 1) + 1 for d, k in _zip(kernel_dilation, kernel.shape[:-2])]
    if roomy and any(1 < n < r for n, r in _zip(sizes, reach)):
        edges = [(low, high, d - 1) for d, (low, high) in _zip(image_dilation, padding)]
        image = lax.pad(image, jnp.zeros((), image.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
        image = lax.optimization_barrier(image)  # or XLA folds the padding back into the convolution
        padding, image_dilation = [(0, 0)] * len(padding), [1] * len(padding)
    spatial = tuple(range(1, image.ndim - 1))
    image_axes = (0, image.ndim - 1, *spatial)
    kernel_axes = (image.ndim - 1, image.ndim - 2, *(axis - 1 for axis in spatial))
    return lax.conv_general_dilated(
        image,
        kernel,
        strides,
        padding,
        image_dilation,
        kernel_dilation,
        lax.ConvDimensionNumbers(image_axes, kernel_axes, image_axes),
        geometry.groups,
    )


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


def _on_cpu(role: str, first: jax.Array, second: jax.Array, *, geometry: Geometry, stacked: bool) -> jax.Array:
    """Convolutions in the one layout that XLA's CPU path is fast for, and a loop over kernels.

    A loop, because `vmap` over both operands makes a grouped convolution. Gradient of ResNet-9 for 4 clients of 16
    images with their own weights, CPU time: grouped 879 ms, in a loop 322, one batch of 64 for comparison 338.
    Per-example kernel gradients, too, cost within 30 % of one for all. (2 x86 cores, jax 0.10.2,
    2026-11-23.) Other platforms, not measured, run what `lax` does.
    """
    # With one slice there is nothing to gather: a 1 x 1 window on 64 x 28 x 28 x 64 -> 128 sliced 25 ms, swapped 46.
    is_sliced = geometry.groups > 1 or prod(geometry.window) == 1
    forward: Callable[..., jax.Array] = partial(plain, roomy=True)
    ways = {"output": forward, "image": _flipped, "kernel": _sliced if is_sliced else _swapped}
    one = partial(ways[role], geometry)
    return lax.map(lambda pair: one(*pair), (first, second)) if stacked else one(first, second)


def _flipped(geometry: Geometry, kernel: jax.Array, output: jax.Array) -> jax.Array:
    """The input gradient as a convolution of the spread output with the flipped kernel, its channels swapped.

    `lax` leaves the swap to dimension numbers. XLA for the CPU puts those right outside loops only; inside it falls
    back to a naive kernel: 64 x 28 x 28 x 64 -> 32 channels in a loop 109 ms, this 21 (2 x86 cores, jax 0.10.2,
    2026-11-23).
    """
    kernel = jnp.flip(kernel, range(len(geometry.window)))
    kernel = kernel.reshape(*kernel.shape[:-1], geometry.groups, -1)
    kernel = jnp.swapaxes(kernel, -1, -3).reshape(*geometry.window, kernel.shape[-1], -1)
    before = [d * (k - 1) - low for d, k, (low, _) in _zip(geometry.dilation, geometry.window, geometry.padding)]
    after = [
        size - 1 - s * (n - 1) + low
        for size, s, n, (low, _) in _zip(geometry.image, geometry.strides, output.shape[1:-1], geometry.padding)
    ]
    ones = (1,) * len(before)
    padding = list(_zip(before, after))
    return _lax_conv(
        output,
        kernel,
        geometry,
        strides=ones,
        padding=padding,
        image_dilation=geometry.strides,
        kernel_dilation=geometry.dilation,
        roomy=True,
    )


def _swapped(geometry: Geometry, image: jax.Array, output: jax.Array) -> jax.Array:
    """The kernel gradient as a convolution with channels for examples, for one group.

    As above: `lax`'s own is this convolution with permuted dimension numbers, 15 to 190 times slower inside a loop.
    """
    image = jnp.swapaxes(image, 0, -1)
    output = jnp.moveaxis(output, 0, -2)
    reach = [
        d * (k - 1) + s * (n - 1) + 1
        for d, k, s, n in _zip(geometry.dilation, geometry.window, geometry.strides, output.shape[:-2])
    ]
    padding = [(low, r - size - low) for r, size, (low, _) in _zip(reach, geometry.image, geometry.padding)]
    kernel = _lax_conv(
        image,
        output,
        geometry,
        strides=geometry.dilation,
        padding=padding,
        image_dilation=(1,) * len(padding),
        kernel_dilation=geometry.strides,
        roomy=True,
    )
    return jnp.moveaxis(kernel, 0, -2)


def _sliced(geometry: Geometry, image: jax.Array, output: jax.Array) -> jax.Array:
    """The kernel gradient as one matrix product of the shifted slices of the image with the output."""
    edges = ((0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0))
    padded = lax.pad(image, jnp.zeros((), image.dtype), edges)
    slices = []
    for place in product(*map(range, geometry.window)):
        start = [p * d for p, d in _zip(place, geometry.dilation)]
        stop = [a + (n - 1) * s + 1 for a, n, s in _zip(start, output.shape[1:-1], geometry.strides)]
        limits = (image.shape[0], *stop, image.shape[-1])
        slices.append(lax.slice(padded, (0, *start, 0), limits, (1, *geometry.strides, 1)))
    columns = jnp.stack(slices, axis=-2)
    columns = columns.reshape(-1, len(slices), geometry.groups, image.shape[-1] // geometry.groups)
    output = output.reshape(columns.shape[0], geometry.groups, -1)
    kernel = jnp.einsum("pkgc,pgd->kcgd", columns, output)
    return kernel.reshape(*geometry.window, columns.shape[-1], -1)


def _abstract(role: str, first, second, *, geometry: Geometry, stacked: bool):
    return jax.make_jaxpr(partial(_by_lax, role, geometry=geometry, stacked=stacked))(first, second).out_avals[0]


for _role, _primitive in _PRIMITIVES.items():
    _primitive.def_impl(jax.jit(_primitive.bind, static_argnames=("geometry", "stacked")))
    _primitive.def_abstract_eval(partial(_abstract, _role))
    ad.defbilinear(_primitive, *(partial(_transpose, _role, _wanted) for _wanted in _others(_role)))
    batching.primitive_batchers[_primitive] = partial(_batch, _role)
    mlir.register_lowering(_primitive, mlir.lower_fun(partial(_by_lax, _role), multiple_results=False))
    mlir.register_lowering(_primitive, mlir.lower_fun(partial(_on_cpu, _role), multiple_results=False), platform="cpu")
