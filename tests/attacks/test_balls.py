"""Projections, directions and draws: optimality by duality, closed forms, volumes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import balls

SHAPE = (4, 3, 1)


def images(num, seed=0):
    return np.random.default_rng(seed).uniform(size=(num, *SHAPE)).astype(np.float32)


def test_projections_by_hand():
    image, x = (jnp.asarray(v, jnp.float32).reshape(1, 3, 1) for v in ([0.5, 0.5, 0.9], [0.9, 0.2, 1.9]))
    expected = {
        ("linf", 0.2): [0.7, 0.3, 1.0],
        ("l2", 0.5): [0.5 + 0.4 * 0.5 / 1.25**0.5, 0.5 - 0.3 * 0.5 / 1.25**0.5, 1.0],
        # all shrink by 0.2, the last then stops at 1: 0.2 + 0.1 + 0.1
        ("l1", 0.4): [0.7, 0.4, 1.0],
        ("l1", 9.0): [0.9, 0.2, 1.0],
    }
    for (norm, eps), values in expected.items():
        np.testing.assert_allclose(balls.project(norm, eps, image, x).ravel(), values, atol=1e-6)


def largest_in_ball_and_box(image, c, eps):
    """The maximum of <c, w> over |w - image|_1 <= eps in the box: the steepest entries first, as far as they go."""
    room = np.where(c > 0, 1 - image, image)
    order, total = np.argsort(-np.abs(c)), float(c @ image)
    for i in order:
        step = min(room[i], eps)
        total, eps = total + abs(c[i]) * step, eps - step
    return total


@pytest.mark.parametrize("eps", [0.01, 0.7, 3.0])
def test_l1_projection_is_the_closest_point_of_ball_and_box(eps):
    """z is closest to u just where <u - z, w - z> <= 0 for every w of the set."""
    image = images(50)
    u = image + np.random.default_rng(1).normal(size=image.shape).astype(np.float32)
    project = jax.jit(jax.vmap(lambda image, u: balls.project("l1", eps, image, u)))
    for x, v, z in zip(
        *(np.asarray(a, np.float64).reshape(50, -1) for a in (image, u, project(image, u))), strict=True
    ):
        assert np.abs(z - x).sum() <= eps + 1e-6
        assert z.min() >= 0 and z.max() <= 1
        assert largest_in_ball_and_box(x, v - z, eps) <= (v - z) @ z + 2e-5


@pytest.mark.parametrize("norm", balls.NORMS)
def test_a_projection_keeps_what_is_inside_and_radius_zero_gives_the_image(norm):
    image = images(20)
    image[0], image[1] = 0, 1

    @jax.jit
    @jax.vmap
    def case(key, x):
        near = balls.start(key, norm, 0.05, x)
        far = jnp.where(near == x, 0.5, near)
        inside = balls.inside(norm, 0.05, x, near), balls.inside(norm, 0.0, x, far)
        return near, balls.project(norm, 0.05, x, near), balls.project(norm, 0.0, x, near), *inside

    near, same, centre, is_inside, is_centre = case(jax.random.split(jax.random.key(0), 20), image)
    assert is_inside.all() and not is_centre.any()
    np.testing.assert_allclose(same, near, atol=1e-7)
    np.testing.assert_array_equal(centre, image)


def test_inside_knows_ball_and_box():
    image = jnp.full((2, 2, 1), 0.9)
    for norm, size in (("linf", 0.1), ("l2", 0.2), ("l1", 0.4)):
        assert balls.inside(norm, size, image, image - 0.1)
        assert not balls.inside(norm, 0.99 * size, image, image - 0.1)
        assert not balls.inside(norm, 9.0, image, image + 0.11)
        assert not balls.inside(norm, 9.0, image, image - 0.91)
        assert not balls.inside(norm, 9.0, image, image * jnp.nan)


@pytest.mark.parametrize("norm", balls.NORMS)
def test_a_direction_has_unit_length_and_the_dual_norm_as_its_slope(norm):
    gradient = jnp.asarray(images(1)[0] - 0.5)
    found = balls.direction(norm, gradient)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    np.testing.assert_allclose(balls.length(norm, found), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(found * gradient), balls.length(dual, gradient), rtol=1e-6)
    for nothing in (0.0, jnp.nan):
        np.testing.assert_array_equal(balls.direction(norm, jnp.full(SHAPE, nothing)), np.zeros(SHAPE))


@pytest.mark.parametrize("norm", balls.NORMS)
def test_a_surface_start_has_the_length_of_the_radius_in_all_directions(norm):
    keys, centre = jax.random.split(jax.random.key(4), 500), jnp.full(SHAPE, 0.5)
    draw = jax.jit(jax.vmap(lambda key, eps: balls.surface_start(key, norm, eps, centre), (0, None)))
    delta = draw(keys, 0.2) - centre
    np.testing.assert_allclose(jax.vmap(functools.partial(balls.length, norm))(delta), 0.2, rtol=1e-5)
    assert abs(np.mean(delta > 0) - 0.5) < 5 * 0.5 / np.sqrt(delta.size)
    np.testing.assert_array_equal(draw(keys[:2], 0.0), np.full((2, *SHAPE), 0.5))


def test_l1_draws_are_uniform_in_the_ball():
    """2000 draws in 12 dimensions: means within 5 standard errors, false-failure rate below 1e-4."""
    keys = jax.random.split(jax.random.key(3), 2000)
    draw = jax.jit(jax.vmap(lambda key: balls.start(key, "l1", 0.2, jnp.full(SHAPE, 0.5))))
    delta = (np.asarray(draw(keys), np.float64).reshape(2000, -1) - 0.5) / 0.2
    assert np.abs(delta.mean(0)).max() < 5 * delta.std() / np.sqrt(2000)
    volume = np.abs(delta).sum(1) ** 12
    assert abs(volume.mean() - 0.5) < 5 / np.sqrt(12 * 2000)
    assert abs(volume.var() - 1 / 12) < 0.01


def test_the_tolerance_is_one_of_rounding():
    image = jnp.full((2, 2, 1), 0.9)
    for norm, size in (("linf", 0.1), ("l2", 0.2), ("l1", 0.4)):
        assert not balls.inside(norm, (1 - 1e-4) * size, image, image - 0.1)
        assert balls.inside(norm, (1 + 1e-4) * size, image, image - 0.1)
