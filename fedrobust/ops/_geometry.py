"""The static half of a convolution, and the one call that hands a convolution to `lax`."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax


class Geometry(NamedTuple):
    """The static half of a convolution, one entry per spatial axis.

    Attributes:
        image: spatial sizes of the image.
        window: spatial sizes of the kernel.
        strides: steps between outputs.
        padding: zeros before and after each axis; negative crops.
        dilation: steps between kernel entries.
        groups: independent groups of channels.
        precision: of the products, as `lax` has it; None for the platform's own.
    """

    image: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    precision: lax.PrecisionLike = None


def plain(
    geometry: Geometry, image: jax.Array, kernel: jax.Array, *, image_dilation: Sequence[int] | None = None
) -> jax.Array:
    """The convolution as one `lax.conv_general_dilated`.

    Args:
        geometry: all but the image and the window are used.
        image: [B,*image,Cin].
        kernel: [*window,Cin//groups,Cout].
        image_dilation: steps between the entries of the image, zeros in between; None for 1.

    Returns:
        [B,*output,Cout].
    """
    spatial = tuple(range(1, image.ndim - 1))
    image_axes = (0, image.ndim - 1, *spatial)
    kernel_axes = (image.ndim - 1, image.ndim - 2, *(axis - 1 for axis in spatial))
    return lax.conv_general_dilated(
        image,
        kernel,
        geometry.strides,
        geometry.padding,
        image_dilation,
        geometry.dilation,
        lax.ConvDimensionNumbers(image_axes, kernel_axes, image_axes),
        geometry.groups,
        precision=geometry.precision,
    )
