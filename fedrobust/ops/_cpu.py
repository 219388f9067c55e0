"""How XLA for the CPU is fast: the three contractions of a convolution, in the one layout that it likes.

Five things decide, all measured on 2 x86 cores with jax 0.10.2 in November 2026. Its convolution spreads one ROW of the
output over the cores and nothing else, so most images keep one core busy: the images of a batch stand side by side
here. Inside a loop its fast kernel takes one order of axes only: the gradients are brought into that order by hand. An
image smaller than the window goes to a naive kernel: such an image is padded beforehand. And its kernel needs channels
to be fast: an image of one or three is multiplied entry by entry of the kernel. It multiplies at the speed of the core,
so that a window of 3 x 3 over many channels gains from fewer multiplications alone, Winograd's: where each device has
one core, under a `shard_map` or `pmap`; over two cores their many small products are spread worse than one large one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from fedrobust.ops._geometry import Geometry, plain

_zip = partial(zip, strict=True)

# Entries of a kernel, for one output channel, up to which an image of few channels is multiplied by each: 3 x 3 x 3.
_ENTRIES = 27
_FEW_CHANNELS = 3

# Channels of image and output from which a window of 3 x 3 is multiplied in tiles, and the places of the image in one
# piece of the batch, so that the tiles of all channels stay in the cache.
_MANY_CHANNELS = 64
_PIECE = 3136

# Winograd's F(2, 3), as in Lavin and Gray 2015 (arXiv 1509.09308): what makes four entries of a tile from four of the
# image, four from three of the kernel, and two outputs from the products.
_OF_IMAGE = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_OF_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OF_PRODUCTS = ((1, 1, 1, 0), (0, 1, -1, -1))

# Multiplications in one row of the output below which XLA leaves it to one core: between 2^21 and 2^22.
_ROW = 2**22


def contract(role: str, first: jax.Array, second: jax.Array, *, geometry: Geometry, stacked: bool) -> jax.Array:
    """The contraction that leaves `role` open, see `fedrobust.ops._contractions.contract`.

    With `stacked` both operands have a leading axis, and a loop runs over it, because `vmap` over both makes a grouped
    convolution. Gradient of ResNet-9 for 4 clients of 16 images with their own weights, CPU time: grouped 879 ms, in a
    loop 322, one batch of 64 for comparison 338.
    """
    # With one slice there is nothing to gather: a 1 x 1 window on 64 x 28 x 28 x 64 -> 128 sliced 25 ms, swapped 46.
    is_sliced = geometry.groups > 1 or prod(geometry.window) == 1
    ways: dict[str, Callable[..., jax.Array]] = {
        "output": _output,
        "image": _image,
        "kernel": _sliced if is_sliced else _swapped,
    }
    one = partial(ways[role], geometry)
    if not stacked:
        return one(first, second)
    # The kernel gradient of one image keeps one core busy; two in one turn of the loop, which do not wait for each
    # other, run side by side. Clipped gradient of ResNet-9, batch 64, over the plain one: 1.18 one by one, 1.08 so.
    at_once = 2 if role == "kernel" and first.shape[0] % 2 == 0 else 1
    pieces = [x.reshape(-1, at_once, *x.shape[1:]) for x in (first, second)]
    found = lax.map(lambda pair: jnp.stack([one(a, b) for a, b in _zip(*pair)]), pieces)
    return found.reshape(-1, *found.shape[2:])


def _output(geometry: Geometry, image: jax.Array, kernel: jax.Array) -> jax.Array:
    return (_entry_by_entry if _is_thin(geometry, kernel) else _dense)(geometry, image, kernel)


def _image(geometry: Geometry, kernel: jax.Array, output: jax.Array) -> jax.Array:
    return (_spread_out if _is_thin(geometry, kernel) else _flipped)(geometry, kernel, output)


def _is_thin(geometry: Geometry, kernel: jax.Array) -> bool:
    """Whether the image has so few channels, and the kernel so few entries, that they are taken one by one.

    Not in half precision, where a sum of so many terms would be rounded after each.
    """
    is_small = kernel.shape[-2] <= _FEW_CHANNELS and prod(kernel.shape[:-1]) <= _ENTRIES
    return geometry.groups == 1 and is_small and kernel.dtype.itemsize >= 4


def _entry_by_entry(geometry: Geometry, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of a thin image: a sum over the entries of the kernel, which XLA makes one loop of.

    Milliseconds by `lax` and so, one core: 64 x 28 x 28 x 1 -> 16 channels, window 3 x 3, 2.7 and 0.25; 1 -> 64 2.6 and
    0.6; 64 x 32 x 32 x 3 -> 16 4.7 and 1.1, 3 -> 64 4.6 and 3.9.
    """
    terms = [
        part[..., channel, None] * kernel[(*place, channel)]
        for place, part in _shifted(geometry, image)
        for channel in range(image.shape[-1])
    ]
    return sum(terms[1:], terms[0])


def _spread_out(geometry: Geometry, kernel: jax.Array, output: jax.Array) -> jax.Array:
    """The input gradient of a thin image: one matrix product, whose columns go where they come from.

    Milliseconds by the flipped kernel and so: 64 x 28 x 28 x 16 -> 1 channel 3.1 and 1.3, 64 -> 1 7.6 and 2.6;
    64 x 32 x 32 x 64 -> 3 7.8 and 5.6.
    """
    columns = jnp.einsum("...o,kco->...kc", output, kernel.reshape(-1, *kernel.shape[-2:]))
    zero, terms = jnp.zeros((), output.dtype), []
    for i, place in enumerate(product(*map(range, geometry.window))):
        edges = [
            (k * d - low, size - 1 - (n - 1) * s - k * d + low, s - 1)
            for k, d, (low, _), size, n, s in _zip(
                place, geometry.dilation, geometry.padding, geometry.image, output.shape[1:-1], geometry.strides
            )
        ]
        terms.append(lax.pad(columns[..., i, :], zero, ((0, 0, 0), *edges, (0, 0, 0))))
    return sum(terms[1:], terms[0])


def _shifted(geometry: Geometry, image: jax.Array) -> list[tuple[tuple[int, ...], jax.Array]]:
    """For each place of the window what it sees of the image, [B,*output,Cin]."""
    edges = ((0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0))
    padded = lax.pad(image, jnp.zeros((), image.dtype), edges)
    parts = []
    for place in product(*map(range, geometry.window)):
        start = [k * d for k, d in _zip(place, geometry.dilation)]
        reach = [d * (k - 1) for k, d in _zip(geometry.window, geometry.dilation)]
        stop = [n - r + a for n, r, a in _zip(padded.shape[1:-1], reach, start)]
        limits = (image.shape[0], *stop, image.shape[-1])
        parts.append((place, lax.slice(padded, (0, *start, 0), limits, (1, *geometry.strides, 1))))
    return parts


def _flipped(geometry: Geometry, kernel: jax.Array, output: jax.Array) -> jax.Array:
    """The input gradient as a convolution of the spread output with the flipped kernel, its channels swapped.

    `lax` leaves the swap to dimension numbers. XLA puts those right outside loops only; inside it falls back to a naive
    kernel: 64 x 28 x 28 x 64 -> 32 channels in a loop 109 ms, this 21.
    """
    kernel = jnp.flip(kernel, range(len(geometry.window)))
    kernel = kernel.reshape(*kernel.shape[:-1], geometry.groups, -1)
    kernel = jnp.swapaxes(kernel, -1, -3).reshape(*geometry.window, kernel.shape[-1], -1)
    before = [d * (k - 1) - low for d, k, (low, _) in _zip(geometry.dilation, geometry.window, geometry.padding)]
    after = [
        size - 1 - s * (n - 1) + low
        for size, s, n, (low, _) in _zip(geometry.image, geometry.strides, output.shape[1:-1], geometry.padding)
    ]
    padding = tuple(_zip(before, after))
    strides = geometry.strides
    geometry = geometry._replace(image=output.shape[1:-1], strides=(1,) * len(before), padding=padding)
    if strides == geometry.strides:
        return _dense(geometry, output, kernel)
    return _roomy(geometry, output, kernel, image_dilation=strides)


def _swapped(geometry: Geometry, image: jax.Array, output: jax.Array) -> jax.Array:
    """The kernel gradient, for one group, as one convolution: examples for channels, [column, channel] for columns.

    `lax`'s own has the channels for examples, in permuted dimension numbers: 15 to 190 times slower inside a loop, and
    rows as short as the window. The output is the "kernel" and takes steps of all channels, so a row of the result is
    [window, channels], long enough for both cores. 64 examples, milliseconds with channels for examples and so:
    14 x 14 x 64 -> 64 11.6 and 7.7, 64 -> 128 12.4 and 11.5; 16 examples, 7 x 7 x 128 -> 128 2.3 and 1.3; one example,
    28 x 28 x 32 -> 64 0.35 and 0.25.
    """
    channels = image.shape[-1]
    image = jnp.moveaxis(image, 0, -1)
    image = image.reshape(1, *image.shape[:-3], -1, image.shape[-1])
    output = jnp.moveaxis(output, 0, -2)
    reach = [
        d * (k - 1) + s * (n - 1) + 1
        for d, k, s, n in _zip(geometry.dilation, geometry.window, geometry.strides, output.shape[:-2])
    ]
    padding = [(low, r - size - low) for r, size, (low, _) in _zip(reach, geometry.image, geometry.padding)]
    low, high = padding[-1]
    swapped = Geometry(
        image=image.shape[1:-1],
        window=output.shape[:-2],
        strides=(*geometry.dilation[:-1], 1),
        padding=(*padding[:-1], (low * channels, high * channels)),
        dilation=(*geometry.strides[:-1], geometry.strides[-1] * channels),
        groups=1,
        precision=geometry.precision,
    )
    kernel = _roomy(swapped, image, output)
    kernel = kernel.reshape(*geometry.window[:-1], -1, channels, output.shape[-1])
    return kernel[..., :: geometry.dilation[-1], :, :]


def _sliced(geometry: Geometry, image: jax.Array, output: jax.Array) -> jax.Array:
    """The kernel gradient as one matrix product of the shifted slices of the image with the output."""
    slices = [part for _, part in _shifted(geometry, image)]
    columns = jnp.stack(slices, axis=-2)
    columns = columns.reshape(-1, len(slices), geometry.groups, image.shape[-1] // geometry.groups)
    output = output.reshape(columns.shape[0], geometry.groups, -1)
    kernel = jnp.einsum("pkgc,pgd->kcgd", columns, output)
    return kernel.reshape(*geometry.window, columns.shape[-1], -1)


def _dense(geometry: Geometry, image: jax.Array, kernel: jax.Array) -> jax.Array:
    ones = (1,) * len(geometry.window)
    is_tiled = (
        geometry.window == (3, 3)
        and geometry.strides == geometry.dilation == ones
        and geometry.groups == 1
        and min(kernel.shape[-2:]) >= _MANY_CHANNELS
        and jnp.issubdtype(kernel.dtype, jnp.floating)
        and kernel.dtype.itemsize >= 4
        and geometry.precision is None
        and _is_one_of_several()
    )
    return (_in_tiles if is_tiled else _side_by_side)(geometry, image, kernel)


def _is_one_of_several() -> bool:
    """Whether what is compiled is one device's part of a `shard_map` or `pmap`: then each device has a core."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _in_tiles(geometry: Geometry, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution by 16 matrix products for each 2 x 2 places of the output, in place of 36.

    Its rounding errors are no larger than those of `lax`: 4 x 14 x 14 x 64 -> 64 channels, outputs near 1, to float64
    on average 2.5e-7 and 3.5e-7. Milliseconds by `lax` and so, one core: 16 x 14 x 14 x 64 -> 64 channels 1.7 and 1.2,
    64 -> 128 3.4 and 2.1; 16 x 7 x 7 x 128 -> 128 1.9 and 1.3; 64 x 28 x 28 x 64 -> 64 31 and 24. With fewer channels
    the sums that make the tiles cost what the products save: 16 x 28 x 28 x 64 -> 32 3.7 and 4.4. ResNet-9's attack of
    64 images, one device per core: 1.15 times as fast. Its logits of 64 images on one device of two cores would take
    1.25 times as long.
    """
    transformed = [_sums(_OF_KERNEL, row) for row in _sums(_OF_KERNEL, kernel)]
    size = max(1, _PIECE // prod(geometry.image))
    if size >= len(image):
        return _tiles(geometry, image, transformed)
    return lax.map(lambda x: _tiles(geometry, x[None], transformed)[0], image, batch_size=size)


def _tiles(geometry: Geometry, image: jax.Array, kernel: list[list[jax.Array]]) -> jax.Array:
    """`_in_tiles` for one piece of the batch; kernel: its 4 x 4 entries, each [Cin,Cout]."""
    size = [n + low + high - 2 for n, (low, high) in _zip(geometry.image, geometry.padding)]
    height, width = tiles = [-(-n // 2) for n in size]
    edges = [(low, 2 * n + 2 - low - m, 0) for n, m, (low, _) in _zip(tiles, geometry.image, geometry.padding)]
    padded = lax.pad(image, jnp.zeros((), image.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
    padded = lax.optimization_barrier(padded)  # or XLA pads once per tile entry
    rows = _sums(_OF_IMAGE, [padded[:, i : i + 2 * height - 1 : 2] for i in range(4)])
    entries = [_sums(_OF_IMAGE, [row[:, :, j : j + 2 * width - 1 : 2] for j in range(4)]) for row in rows]
    products = [[x @ k for x, k in _zip(*pair)] for pair in _zip(entries, kernel)]
    columns = [_sums(_OF_PRODUCTS, column) for column in _zip(*products)]
    outputs = [jnp.stack(_sums(_OF_PRODUCTS, row), axis=3) for row in _zip(*columns)]
    out = jnp.stack(outputs, axis=2).reshape(len(image), 2 * height, 2 * width, -1)
    return lax.optimization_barrier(out[:, : size[0], : size[1]])  # or whoever reads it makes the sums again


def _sums(weights: Sequence[Sequence[float]], parts: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    """The parts' sum by each row of weights."""
    sums = []
    for row in weights:
        terms = [weight * part for weight, part in _zip(row, parts) if weight]
        sums.append(sum(terms[1:], terms[0]))
    return sums


def _side_by_side(geometry: Geometry, image: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution with all images in one row, zeros between them, where that keeps more cores busy.

    Milliseconds image by image and side by side: 64 x 28 x 28 x 32 -> 64 channels 19.5 and 12.5, 64 -> 32 19.9 and
    11.1, 14 x 14 x 64 -> 64 9.6 and 5.5, 64 -> 128 19.0 and 11.5; 16 x 14 x 14 x 64 -> 64 2.4 and 1.6.
    """
    size, width = image.shape[0], image.shape[-2]
    one_row = width * kernel.size
    # Other than two axes go to another kernel, and so do groups.
    if image.ndim != 4 or geometry.groups > 1 or not one_row < _ROW <= size * one_row:
        return _roomy(geometry, image, kernel)
    (low, high), stride = geometry.padding[1], geometry.strides[1]
    reach = geometry.dilation[1] * (geometry.window[1] - 1) + 1
    num_outputs = (width + low + high - reach) // stride + 1
    # Room for the larger padding, which neighbours share, and for whole steps, so that each image starts with one.
    pitch = max(width + max(low, high, 0), (num_outputs - 1) * stride + 1)
    pitch += -pitch % stride
    row = jnp.swapaxes(jnp.pad(image, ((0, 0), (0, 0), (0, pitch - width), (0, 0))), 0, 1)
    row = row.reshape(1, row.shape[0], size * pitch, row.shape[-1])
    padding = (geometry.padding[0], (low, reach - stride - low))
    out = _roomy(geometry._replace(image=row.shape[1:-1], padding=padding), row, kernel)
    out = out.reshape(-1, size, pitch // stride, out.shape[-1])
    return jnp.swapaxes(out[:, :, :num_outputs], 0, 1)


def _roomy(
    geometry: Geometry, image: jax.Array, kernel: jax.Array, *, image_dilation: tuple[int, ...] | None = None
) -> jax.Array:
    """`plain`, an image smaller than the window padded beforehand.

    Otherwise XLA takes a naive kernel: 64 x 2 x 2 x 48 -> 48 channels, window 3 x 3, 1.9 ms, so 0.19;
    64 x 2 x 2 x 128 -> 128, 10.3 and 0.77. Images of one entry are fine.
    """
    spread = image_dilation or (1,) * len(geometry.window)
    sizes = [d * (n - 1) + 1 for d, n in _zip(spread, image.shape[1:-1])]
    reach = [d * (k - 1) + 1 for d, k in _zip(geometry.dilation, geometry.window)]
    if any(1 < n < r for n, r in _zip(sizes, reach)):
        edges = [(low, high, d - 1) for d, (low, high) in _zip(spread, geometry.padding)]
        image = lax.pad(image, jnp.zeros((), image.dtype), ((0, 0, 0), *edges, (0, 0, 0)))
        image = lax.optimization_barrier(image)  # or XLA folds the padding back into the convolution
        geometry, spread = geometry._replace(padding=((0, 0),) * len(spread)), (1,) * len(spread)
    return plain(geometry, image, kernel, image_dilation=spread)
