import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedrobust.ops import avg_pool, max_pool


def normal(shape, dtype=jnp.float32):
    # NumPy draws: jax.random would compile once per shape.
    return jnp.asarray(np.random.default_rng(3).standard_normal(shape), dtype)


SETTINGS = [
    ((2, 2), (2, 2), "VALID"),
    ((3, 3), (2, 2), "SAME"),
    ((3, 2), (1, 3), "VALID"),
    ((2, 3), (2, 1), ((1, 0), (0, 2))),
]


@pytest.mark.parametrize(("window", "strides", "padding"), SETTINGS, ids=str)
@pytest.mark.parametrize(("ours", "flax"), [(max_pool, nn.max_pool), (avg_pool, nn.avg_pool)], ids=["max", "avg"])
def test_value_and_gradient_equal_those_of_flax(ours, flax, window, strides, padding):
    # Few distinct values: most windows hold a tie.
    image = jnp.round(normal((2, 7, 5, 3)))

    def both(pool):
        loss = lambda image: jnp.sum(jnp.sin(pool(image, window, strides, padding) + jnp.arange(3)))  # noqa: E731
        return jax.jit(lambda image: (pool(image, window, strides, padding), jax.grad(loss)(image)))(image)

    for got, wanted in zip(both(ours), both(flax), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_hand_computed_and_odd_border_is_cropped():
    image = jnp.arange(15.0).reshape(1, 3, 5, 1)
    assert max_pool(image, (2, 2)).ravel().tolist() == [6.0, 8.0]
    assert avg_pool(image, (2, 2)).ravel().tolist() == [3.0, 5.0]
    assert max_pool(image, (2, 2), (1, 1)).shape == (1, 2, 4, 1)


def test_gradient_of_a_tie_goes_to_the_first_entry_alone():
    gradient = jax.grad(lambda image: jnp.sum(max_pool(image, (2, 2))))(jnp.zeros((1, 2, 2, 1)))
    assert gradient.ravel().tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("place", range(4))
def test_nan_anywhere_in_a_window_is_its_maximum_as_in_lax(place):
    image = jnp.arange(16.0).reshape(1, 4, 4, 1).at[0, place // 2, place % 2, 0].set(jnp.nan)
    got = max_pool(image, (2, 2))
    wanted = lax.reduce_window(image, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(got, wanted)
    assert int(jnp.isnan(got).sum()) == 1


def test_one_and_three_axes_and_double_precision():
    with jax.enable_x64(True):
        line = normal((2, 9, 3), jnp.float64)
        volume = normal((2, 4, 5, 3, 2), jnp.float64)
        for image in (line, volume):
            window = (2,) * (image.ndim - 2)
            got = max_pool(image, window)
            assert got.dtype == jnp.float64
            np.testing.assert_array_equal(got, nn.max_pool(image, window, window))


def test_vmap_and_second_order_equal_loop():
    images = normal((3, 2, 4, 4, 2))
    loss = lambda image: jnp.sum(max_pool(image, (2, 2)) ** 3)  # noqa: E731
    second = jax.jit(jax.grad(lambda image: jnp.sum(jax.grad(loss)(image) ** 2)))
    np.testing.assert_allclose(jax.vmap(second)(images), jnp.stack([second(image) for image in images]), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2,),), r"window is \(2,\)"),
        (((2, 0),), r"window is \(2, 0\)"),
        (((5, 2),), r"window is \(5, 2\)"),
        (((2, 2), (1,)), r"strides is \(1,\)"),
        (((2, 2), None, "full"), "padding is 'full'"),
        (((2, 2), None, ((0, 0),)), "padding is"),
    ],
    ids=str,
)
@pytest.mark.parametrize("pool", [max_pool, avg_pool])
def test_bad_settings_are_named(pool, arguments, message):
    with pytest.raises(ValueError, match=message):
        pool(jnp.ones((1, 4, 4, 1)), *arguments)
