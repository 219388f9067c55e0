import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.ops import group_norm

norm = jax.jit(group_norm, static_argnums=1)


def normal(shape, dtype=jnp.float32, seed=5):
    # NumPy draws: jax.random would compile once per shape.
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def operands(shape, dtype=jnp.float32):
    image, scale, bias = (normal(s, dtype, seed) for seed, s in enumerate((shape, shape[-1:], shape[-1:])))
    return image, scale, bias


def by_flax(image, scale, bias):
    return nn.GroupNorm(num_groups=2, epsilon=1e-5).apply({"params": {"scale": scale, "bias": bias}}, image)


def by_haiku(image, scale, bias):
    network = hk.without_apply_rng(hk.transform(lambda image: hk.GroupNorm(2, eps=1e-5)(image)))
    return network.apply({"group_norm": {"scale": scale, "offset": bias}}, image)


def ours(image, scale, bias):
    return group_norm(image, 2, scale, bias, eps=1e-5)


def by_numpy(image, num_groups, eps):
    """Two passes in float64."""
    x = np.asarray(image, np.float64)
    groups = x.reshape(x.shape[0], -1, num_groups, x.shape[-1] // num_groups)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + eps)).reshape(x.shape)


def derivatives(function):
    energy = lambda *a: jnp.sum(jnp.sin(function(*a)))  # noqa: E731
    first = jax.grad(energy, (0, 1, 2))
    second = jax.grad(lambda *a: sum(jnp.sum(x**2) for x in first(*a)), (0, 1, 2))
    return jax.jit(lambda *a: (function(*a), first(*a), second(*a)))


@pytest.mark.parametrize("reference", [by_flax, by_haiku])
@pytest.mark.parametrize("wide", [False, True])
def test_value_and_derivatives_equal_those_of_flax_and_haiku(reference, wide):
    with jax.enable_x64(wide):
        arguments = operands((3, 5, 4, 6), jnp.float64 if wide else jnp.float32)
        got, wanted = derivatives(ours)(*arguments), derivatives(reference)(*arguments)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert a.dtype == arguments[0].dtype
            # Flax takes the variance in float32 unless told otherwise.
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(np.abs(b).max()))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_a_mean_far_beyond_the_deviation_costs_no_digits(offset):
    image = normal((4, 14, 14, 8)) + offset
    got = norm(image, 2)
    np.testing.assert_allclose(got, by_numpy(image, 2, 1e-6), atol=2e-5)
    naive = jnp.mean(image**2, (1, 2)) - jnp.mean(image, (1, 2)) ** 2
    exact = np.var(np.asarray(image, np.float64), (1, 2))
    assert offset < 1e5 or np.abs(naive - exact).max() > 0.1


def test_a_first_pixel_far_from_all_others_keeps_the_variance_to_the_stated_bound():
    image = normal((2, 28, 28, 4)).at[:, 0, 0].set(1e4)
    np.testing.assert_allclose(norm(image, 1), by_numpy(image, 1, 1e-6), rtol=4e-4, atol=4e-4)


def test_hand_computed():
    image = jnp.array([[1.0, 3.0, 10.0, 10.0]]).reshape(1, 1, 1, 4)
    got = norm(image, 2, jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0.0, 1.0, 5.0, 6.0]))
    np.testing.assert_allclose(got.ravel(), [-1.0, 3.0, 5.0, 6.0], atol=1e-5)


def test_constant_image_gives_the_bias_and_a_finite_gradient():
    image, scale, bias = jnp.full((2, 3, 3, 4), 7.3), jnp.full(4, 2.0), jnp.arange(4.0)
    np.testing.assert_array_equal(norm(image, 2, scale, bias), jnp.broadcast_to(bias, image.shape))
    gradient = jax.jit(jax.grad(lambda image: jnp.sum(jnp.sin(norm(image, 2, scale, bias)))))(image)
    assert bool(jnp.isfinite(gradient).all())


def test_no_example_depends_on_another():
    image = normal((3, 4, 4, 4))
    spoiled = norm(image.at[1].set(jnp.nan), 2)
    clean = norm(image, 2)
    np.testing.assert_array_equal(spoiled[jnp.array([0, 2])], clean[jnp.array([0, 2])])
    assert bool(jnp.isnan(spoiled[1]).all())


@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 2, 4, 6)], ids=str)
def test_any_number_of_spatial_axes(shape):
    image = normal(shape)
    np.testing.assert_allclose(norm(image, 3), by_numpy(image, 3, 1e-6), atol=1e-4)


def test_half_precision_is_summed_in_single():
    image = (normal((2, 14, 14, 4)) + 50).astype(jnp.bfloat16)
    got = norm(image, 2)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), by_numpy(image, 2, 1e-6), atol=2e-2)


def test_vmap_of_gradient_equals_loop():
    image, scale, bias = operands((3, 4, 4, 6))
    energy = lambda scale, image: jnp.sum(jnp.sin(norm(image[None], 2, scale, bias)))  # noqa: E731
    gradient = jax.jit(jax.grad(energy, (0, 1)))
    got = jax.vmap(gradient, (None, 0))(scale, image)
    loop = [gradient(scale, x) for x in image]
    for a, b in zip(got, map(np.stack, zip(*loop, strict=True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("num_groups", "eps", "name"), [(4, 1e-6, "num_groups"), (0, 1e-6, "num_groups"), (2, -1.0, "eps")]
)
def test_bad_settings_are_named(num_groups, eps, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        group_norm(jnp.ones((1, 2, 2, 6)), num_groups, eps=eps)
