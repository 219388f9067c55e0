from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fedrobust.ops import _cpu, conv
from fedrobust.ops._geometry import Geometry, plain
from tests.ops.convolutions import assert_close, normal, primitives


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


@pytest.mark.parametrize(
    ("channels", "how", "is_tiled"),
    [
        ((64, 64), {}, True),
        ((64, 64), {"num_cores": 1000}, False),
        ((63, 64), {}, False),
        ((64, 63), {}, False),
        ((64, 64), {"strides": 2}, False),
        ((64, 64), {"kernel_dilation": 2}, False),
        ((64, 64), {"precision": lax.Precision.HIGHEST}, False),
    ],
)
def test_who_is_multiplied_in_tiles(monkeypatch, channels, how, is_tiled):
    cores = range(how.get("num_cores", 1))
    monkeypatch.setattr(_cpu.os, "sched_getaffinity", lambda _: cores, raising=False)
    image, kernel = normal(0, (2, 7, 6, channels[0])), normal(1, (3, 3, *channels))
    how = {"strides": 1, "kernel_dilation": 1, "precision": None} | how
    each = lambda name: (how[name],) * 2  # noqa: E731
    geometry = Geometry((7, 6), (3, 3), each("strides"), ((1, 1), (1, 1)), each("kernel_dilation"), 1, how["precision"])
    wanted = plain(geometry._replace(precision=None), *(np.float64(x) for x in (image, kernel)))
    run = partial(_cpu.contract, "output", geometry=geometry, stacked=False)
    assert is_tiled == ("conv_general_dilated" not in [name for name, _ in primitives(run, image, kernel)])
    np.testing.assert_allclose(jax.jit(run)(image, kernel), wanted, rtol=0, atol=1e-4)


def test_the_highest_precision_sums_whole_numbers_exactly(monkeypatch):
    monkeypatch.setattr(_cpu, "_has_one_core_each", lambda: True)
    draw = np.random.default_rng(0)
    image, kernel = draw.integers(0, 256, (2, 5, 4, 64)), draw.integers(0, 114, (3, 3, 64, 64))
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    wanted = np.einsum("bhwckl,klco->bhwo", windows, kernel)
    assert 2**21 < wanted.max() <= 576 * 255 * 113 < 2**24
    exact = partial(conv, precision=lax.Precision.HIGHEST)
    operands = jnp.float32(image), jnp.float32(kernel)
    one_by_one = jax.vmap(lambda x, k: exact(x[None], k)[0], (0, None))
    for run in (exact, one_by_one, lambda x, k: jax.vjp(lambda x: exact(x, k), x)[0]):
        np.testing.assert_array_equal(jax.jit(run)(*operands), wanted)
    in_tiles = jax.jit(jax.vmap(lambda x, k: conv(x[None], k)[0], (0, None)))(*operands)
    assert np.any(in_tiles != wanted)
