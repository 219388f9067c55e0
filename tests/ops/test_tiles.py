"""Convolutions of many channels in Winograd's tiles, against `lax`, and against integers where they must be exact."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fedrobust import devices
from fedrobust.ops import _cpu, conv
from fedrobust.ops._geometry import Geometry, plain
from tests.ops.convolutions import assert_close, lax_conv, normal, primitives


@st.composite
def tiled(draw):
    padding = tuple((draw(st.integers(-1, 3)), draw(st.integers(-1, 3))) for _ in range(2))
    image = tuple(max(3 - low - high, 2) + draw(st.integers(0, 5)) for low, high in padding)
    return Geometry(image, (3, 3), (1, 1), padding, (1, 1), groups=1), draw(st.integers(1, 5)), draw(st.integers(1, 90))


@settings(max_examples=15)
@given(case=tiled())
def test_tiles_of_any_piece_of_the_batch_make_the_convolution(case):
    geometry, num, piece = case
    image, kernel = normal(1, (num, *geometry.image, 2)), normal(2, (3, 3, 2, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "_PIECE", piece)
        got = jax.jit(partial(_cpu._in_tiles, geometry))(image, kernel)
    assert_close(got, jax.jit(partial(plain, geometry))(image, kernel), 1e-5)


PLAIN = {"image": (7, 6), "window": (3, 3), "strides": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}


@pytest.fixture
def one_of_several(monkeypatch):
    """As under a `shard_map`."""
    monkeypatch.setattr(_cpu, "_is_one_of_several", lambda: True)


@pytest.mark.usefixtures("one_of_several")
@pytest.mark.parametrize(
    ("channels", "how", "dtype", "is_tiled"),
    [
        ((64, 64), {}, "float32", True),
        ((63, 64), {}, "float32", False),
        ((64, 63), {}, "float32", False),
        ((64, 64), {"strides": (2, 1)}, "float32", False),
        ((64, 64), {"dilation": (1, 2)}, "float32", False),
        ((64, 64), {"window": (3, 1)}, "float32", False),
        ((128, 128), {"groups": 2}, "float32", False),
        ((64, 64), {"precision": lax.Precision.HIGHEST}, "float32", False),
        ((64, 64), {}, "float16", False),
        ((64, 64), {}, "int32", False),
    ],
)
def test_who_is_multiplied_in_tiles(channels, how, dtype, is_tiled):
    geometry = Geometry(**({"groups": 1} | PLAIN | how))
    kernel_shape = (*geometry.window, channels[0] // geometry.groups, channels[1])
    image, kernel = (3 * normal(i, shape) for i, shape in enumerate(((2, 7, 6, channels[0]), kernel_shape)))
    operands = image.astype(dtype), kernel.astype(dtype)
    run = partial(_cpu.contract, "output", geometry=geometry, stacked=False)
    assert is_tiled == ("conv_general_dilated" not in [name for name, _ in primitives(run, *operands)])
    found, wanted = jax.jit(run)(*operands), jax.jit(partial(plain, geometry))(*operands)
    assert found.dtype == dtype
    assert_close(found, wanted, 1e-5)


def sharded(function):
    return jax.jit(devices.sharded(function, devices.local(2)))


def test_each_device_multiplies_in_tiles_and_one_alone_does_not():
    kernel, image = normal(0, (3, 3, 64, 64)), normal(1, (4, 5, 6, 64))

    def derivatives(convolve, kernel, image):
        energy = lambda image: jnp.sum(jnp.sin(convolve(image, kernel)))  # noqa: E731
        return jax.vmap(jax.grad(energy))(image[:, None])[:, 0], jax.vmap(lambda x: convolve(x[None], kernel)[0])(image)

    ours = partial(derivatives, conv)
    alone, wanted = jax.jit(ours), jax.jit(partial(derivatives, partial(lax_conv, padding="SAME")))
    assert_close(sharded(ours)(kernel, image), wanted(kernel, image), 1e-5)
    texts = [run.lower(kernel, image).as_text() for run in (sharded(ours), alone)]
    assert ["stablehlo.convolution" in text for text in texts] == [False, True]


def test_images_in_tiles_do_not_see_each_other():
    kernel, image = normal(0, (3, 3, 64, 64)), np.array(normal(1, (8, 5, 6, 64)))
    run = sharded(jax.vmap(lambda kernel, x: conv(x[None], kernel)[0], (None, 0)))
    before = run(kernel, image)
    for value in (np.nan, np.inf, 1e38):
        image[3, 2, 2, 7] = value
        after = run(kernel, image)
        others = np.arange(8) != 3
        np.testing.assert_array_equal(after[others], before[others])
        assert np.any(after[3] != before[3])


@pytest.mark.optimized
def test_tiles_round_no_worse_than_the_plain_sum():
    draw = np.random.default_rng(0)
    image, kernel = (draw.standard_normal(shape, np.float32) for shape in ((4, 14, 14, 64), (3, 3, 64, 64)))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    wanted = np.einsum("bhwckl,klco->bhwo", np.float64(windows), np.float64(kernel))
    geometry = Geometry((14, 14), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    ways = (jax.jit(partial(run, geometry)) for run in (_cpu._in_tiles, plain))
    tiles, direct = (float(np.std(run(image, kernel) - wanted)) for run in ways)
    assert 0 < tiles < direct < 1e-6 * wanted.std()


@pytest.mark.optimized
@pytest.mark.usefixtures("one_of_several")
def test_the_highest_precision_sums_whole_numbers_exactly():
    draw = np.random.default_rng(0)
    image, kernel = draw.integers(0, 256, (2, 5, 4, 64)), draw.integers(0, 114, (3, 3, 64, 64))
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    wanted = np.einsum("bhwckl,klco->bhwo", windows, kernel)
    assert 2**21 < wanted.max() <= 576 * 255 * 113 < 2**24
    operands = jnp.float32(image), jnp.float32(kernel)

    def value(x, k, **how):
        return jax.vmap(lambda x: conv(x[None], k, **how)[0])(x)

    def gradient(x, k, **how):
        """The same number: the transposed convolution of the transposed kernel."""
        mirrored = jnp.swapaxes(k[::-1, ::-1], 2, 3)
        return jax.vjp(lambda y: conv(y, mirrored, **how), jnp.zeros_like(x))[1](x)[0]

    for run in (value, gradient):
        exact = jax.jit(partial(run, precision=lax.Precision.HIGHEST))
        np.testing.assert_array_equal(exact(*operands), wanted)
        with jax.default_matmul_precision("highest"):
            np.testing.assert_array_equal(jax.jit(run)(*operands), wanted)
        assert np.any(jax.jit(run)(*operands) != wanted)  # in tiles
