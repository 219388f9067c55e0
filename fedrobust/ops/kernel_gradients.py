"""The kernel gradients of many examples at once, not written out: their norms and their weighted sum."""

from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedrobust.ops._contractions import contract
from fedrobust.ops._geometry import Geometry

_zip = partial(zip, strict=True)

# Of what the sum of products would be if nothing in it cancelled: an upper bound on its rounding error.
_ROUNDING = 1e-6


class KernelGradients(NamedTuple):
    """B gradients of one convolution's kernel, each the contraction of images with their output gradients.

    Attributes:
        geometry: the static settings of the convolution.
        image: [B,V,*image,Cin]; V images make one example.
        output: [B,V,*output,Cout], the gradient of the loss in the convolution's output.
    """

    geometry: Geometry
    image: jax.Array
    output: jax.Array

    @staticmethod
    def is_made_by(name: str, settings: dict[str, Any]) -> bool:
        """Whether an equation of this name and settings makes such a stack, out of `(image, output)`."""
        return name == "convolution_kernel" and settings["stacked"]

    @property
    def num_entries(self) -> int:
        """Entries of one gradient."""
        return prod(self.geometry.window) * self.image.shape[-1] // self.geometry.groups * self.output.shape[-1]

    @property
    def num_products(self) -> int:
        """Multiplications that `square_norms` takes for one example."""
        grid, views = _grid(self.geometry), self.image.shape[1]
        images = (views * grid.num_places) ** 2 * self.image.shape[-1]
        return images + (views * grid.num_starts) ** 2 * self.output.shape[-1]

    def square_norms(self) -> tuple[jax.Array, jax.Array]:
        """The squared L2 norms, from the products between the places of each example.

            |g|^2 = sum over places p, q of <output_p, output_q> * sum over window entries k of <image_p+k, image_q+k>

        Returns:
            The squares [B], and bounds [B] that the exact squares do not exceed: where the sum cancels, its rounding
            error is relative to what it would be without. Both are inf or NaN where an entry is, or the norm overflows.

        Source: Goodfellow 2015 (arXiv 1510.01799) for dense layers, Rochette et al. 2019 (arXiv 1912.06015) and Bu et
        al. 2022 (arXiv 2205.10683) for convolutions. Deviation: on one padded grid, so that no patch is written out.
        """
        # Largest entries 1: products of four factors leave float32 long before the gradient does.
        image, image_unit = _scaled(self.image)
        output, output_unit = _scaled(self.output)
        grid, (size, views) = _grid(self.geometry), image.shape[:2]
        image, output = _on_grid(self.geometry, grid, image, output)
        num_starts = (views - 1) * grid.num_places + grid.num_starts
        image, output = (x.reshape(size, views * grid.num_places, self.geometry.groups, -1) for x in (image, output))
        of_image = jnp.einsum("bpgc,bqgc->bgpq", image, image)
        of_output = jnp.einsum("bpgc,bqgc->bgpq", output[:, :num_starts], output[:, :num_starts])
        of_patches = jnp.zeros_like(of_output)
        for k in grid.offsets:
            of_patches += of_image[:, :, k : k + num_starts, k : k + num_starts]
        square = jnp.maximum(jnp.sum(of_output * of_patches, axis=(1, 2, 3)), 0)
        lengths = jnp.sqrt(_diagonal(of_output) * _diagonal(of_patches))
        uncancelled = jnp.sum(jnp.square(jnp.sum(lengths, axis=2)), axis=1)
        unit = jnp.square(image_unit * output_unit)
        return unit * square, unit * (square + _ROUNDING * uncancelled)

    def weighted_sum(self, weight: jax.Array) -> jax.Array:
        """`sum_b weight[b] * gradient[b]`, one contraction for the whole stack.

        Args:
            weight: [B] float32. Where it is 0 the example may hold NaN or inf: it contributes exactly 0.

        Returns:
            [*window,Cin//groups,Cout].
        """
        weight = weight.reshape(-1, *(1,) * (self.image.ndim - 1))
        output = jnp.where(weight == 0, 0, weight.astype(self.output.dtype) * self.output)
        image = jnp.where(weight == 0, 0, self.image)
        image, output = (x.reshape(-1, *x.shape[2:]) for x in (image, output))
        return contract("kernel", self.geometry, image, output)


class _Grid(NamedTuple):
    sizes: tuple[int, ...]  # of the image, padded or cropped to what the windows cover
    num_places: int  # of the grid, flattened
    num_starts: int  # places up to the last one where a window may start
    offsets: tuple[int, ...]  # from a window's start to each of its entries


def _grid(geometry: Geometry) -> _Grid:
    reach = [d * (k - 1) + 1 for d, k in _zip(geometry.dilation, geometry.window)]
    padded = [n + low + high for n, (low, high) in _zip(geometry.image, geometry.padding)]
    sizes = tuple((n - r) // s * s + r for n, r, s in _zip(padded, reach, geometry.strides))
    offsets = [0]
    for axis, (d, k) in enumerate(_zip(geometry.dilation, geometry.window)):
        step = d * prod(sizes[axis + 1 :])
        offsets = [offset + i * step for offset in offsets for i in range(k)]
    return _Grid(sizes, prod(sizes), prod(sizes) - max(offsets), tuple(offsets))


def _on_grid(geometry: Geometry, grid: _Grid, image: jax.Array, output: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both with the grid's places, each output where its window starts."""
    around, between = [], []
    for axis, size in enumerate(grid.sizes):
        low, stride, count = geometry.padding[axis][0], geometry.strides[axis], output.shape[2 + axis]
        around.append((low, size - geometry.image[axis] - low, 0))
        between.append((0, size - stride * (count - 1) - 1, stride - 1))
    whole, zero = (0, 0, 0), jnp.zeros((), image.dtype)
    return lax.pad(image, zero, (whole, whole, *around, whole)), lax.pad(output, zero, (whole, whole, *between, whole))


def _scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each example over its largest entry, and that entry, [B], in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)))
    unit = jnp.where(largest == 0, 1, largest)
    return x / unit.reshape(-1, *(1,) * (x.ndim - 1)), unit


def _diagonal(matrices: jax.Array) -> jax.Array:
    return jnp.diagonal(matrices, axis1=-2, axis2=-1)
