"""Laws of training with one step and of its regulariser, against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import pgd
from fedrobust.defenses import align_gradients, fast_attack
from fedrobust.losses import cross_entropy

KEY = jax.random.key(3)
COMPILED = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
IMAGE = np.random.default_rng(0).uniform(size=(5, 3, 2, 1)).astype(np.float32)
LABEL = np.arange(5) % 2
CURVE = 2 * np.random.default_rng(1).normal(size=6).astype(np.float32)
EPS, WEIGHT = 0.5, 0.7


def bent(key, params, image, label):
    """sum_j (a_j x_j^3 / 3 + x_j), whose input gradient a_j x_j^2 + 1 turns with x."""
    x = image.reshape(len(image), -1)
    return jnp.sum(params * x**3 / 3 + x, axis=1)


def constant(key, params, image, label):
    return jnp.sum(params) + jnp.zeros(len(image))


def nothing(key, params, image, label):
    return jnp.zeros(len(image))


def starts():
    of_start = jax.random.split(KEY, 3)[1]
    draws = [jax.random.uniform(jax.random.fold_in(of_start, i), (3, 2, 1), minval=-1) for i in range(5)]
    return np.clip(IMAGE + EPS * np.stack(draws).astype(np.float64), 0, 1)


def misalignment(curve):
    """1 - cosine in float64, [5]."""
    a, b = (curve * x.reshape(5, 6).astype(np.float64) ** 2 + 1 for x in (IMAGE, starts()))
    return 1 - np.sum(a * b, axis=1) / np.sqrt(np.sum(a * a, axis=1) * np.sum(b * b, axis=1))


def test_one_step_of_one_and_a_quarter_radii_from_a_random_start():
    def linear(x):
        margin = x.reshape(len(x), -1) @ CURVE
        return jnp.stack([margin, -margin], 1)

    image = np.full((40, 3, 2, 1), 0.5, np.float32)
    label = np.zeros(40, np.int32)
    attack = fast_attack(pgd, norm="linf", eps=EPS)
    found = np.asarray(COMPILED(lambda: attack(KEY, linear, image, label))()) - 0.5
    towards = -np.sign(CURVE).reshape(3, 2, 1) * found  # from u in [-eps, eps] to min(eps, u + 1.25 eps)
    assert towards.max() <= EPS + 1e-6 and towards.min() >= 0.25 * EPS - 1e-6
    at_the_edge = np.mean(towards > EPS - 1e-6)
    assert abs(at_the_edge - 5 / 8) < 5 * np.sqrt(15 / 64 / 240)  # u > -eps / 4; false failures 6e-7


def test_it_steps_over_a_peak_too_and_does_not_stay_at_its_start():
    """From u in [-eps, eps] a full step towards the peak at 0 ends in a distance of 0.25 eps to eps behind it."""

    def peak(x):
        margin = -jnp.square(x[:, 0, 0, 0] - 0.5)
        return jnp.stack([-margin, margin], 1)

    image = np.full((200, 1, 1, 1), 0.5, np.float32)
    attack = fast_attack(pgd, norm="linf", eps=EPS)
    found = COMPILED(lambda: attack(KEY, peak, image, np.zeros(200, np.int32)))()
    assert np.abs(found - 0.5).min() >= 0.25 * EPS - 1e-6


def test_both_gradients_are_drawn_with_a_key_of_their_own():
    seen = []

    def noted(key, params, image, label):
        seen.append(key)
        return jnp.sum(image, axis=(1, 2, 3))

    def traced(key):
        seen.append(key)
        return align_gradients(noted, noted, eps=EPS, weight=WEIGHT)(key, CURVE, IMAGE, LABEL)

    jax.eval_shape(traced, KEY)
    assert len({id(key) for key in seen}) == len(seen) == 3


def slopes(function, curve):
    steps = 1e-6 * np.eye(6)
    return np.array([(function(curve + s) - function(curve - s)).sum() / 2e-6 for s in steps])


@jax.jit
def regulariser(scale, p):
    loss = align_gradients(nothing, lambda *args: scale * bent(*args), eps=EPS, weight=WEIGHT)
    value, pull_back = jax.vjp(lambda p: loss(KEY, p, IMAGE, LABEL), p)
    return value, pull_back(jnp.ones(5))[0]


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e12])
def test_the_regulariser_and_its_gradient_equal_numpy_however_small_the_gradients(scale):
    curve = CURVE.astype(np.float64)
    value, gradient = regulariser(np.float32(scale), CURVE)
    np.testing.assert_allclose(value, WEIGHT * misalignment(curve), rtol=1e-3)
    np.testing.assert_allclose(gradient, WEIGHT * slopes(misalignment, curve), rtol=1e-3, atol=1e-5)
    assert np.abs(gradient).max() > 0.01


def test_a_gradient_through_one_point_only_is_another_one():
    """So that the test above can tell."""
    curve = CURVE.astype(np.float64)
    a = curve * IMAGE.reshape(5, 6).astype(np.float64) ** 2 + 1

    def through_one(c):
        b = c * starts().reshape(5, 6) ** 2 + 1
        return 1 - np.sum(a * b, axis=1) / np.sqrt(np.sum(a * a, axis=1) * np.sum(b * b, axis=1))

    assert np.abs(slopes(misalignment, curve) - slopes(through_one, curve)).max() > 0.01


def test_a_straight_loss_pays_nothing_and_a_turning_one_the_most():
    def turning(key, params, image, label):
        x = image[:, 0, 0, 0]
        return jnp.abs(x - 0.5)  # the gradient turns over at the clean image

    straight = align_gradients(constant, lambda k, p, x, y: jnp.sum(x.reshape(10, 6) * p, 1), eps=EPS, weight=WEIGHT)
    np.testing.assert_allclose(COMPILED(straight)(KEY, CURVE, IMAGE, LABEL), CURVE.sum(), atol=1e-5)
    image = np.full((64, 1, 1, 1), 0.5001, np.float32)
    paid = COMPILED(align_gradients(constant, turning, eps=EPS, weight=WEIGHT))(KEY, 0 * CURVE, image, np.zeros(64))
    assert set(np.round(np.asarray(paid), 4).tolist()) == {0.0, np.float32(2 * WEIGHT).round(4).item()}


def test_where_no_direction_is_known_nothing_is_added_and_nothing_breaks():
    loss = align_gradients(constant, constant, eps=EPS, weight=WEIGHT)
    value, gradient = COMPILED(jax.value_and_grad(lambda p: loss(KEY, p, IMAGE, LABEL).sum()))(CURVE)
    np.testing.assert_allclose(value, 5 * CURVE.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 5 * np.ones(6))


def test_at_weight_zero_the_loss_is_the_same_function_and_at_radius_zero_the_same_number():
    assert align_gradients(constant, bent, eps=EPS, weight=0.0) is constant
    plain = cross_entropy(lambda p, x: x.reshape(5, 6) @ p)
    both = np.stack([CURVE, -CURVE], 1)
    paid = align_gradients(lambda k, p, x, y: plain(k, both, x, y), bent, eps=0.0, weight=WEIGHT)
    np.testing.assert_allclose(COMPILED(paid)(KEY, CURVE, IMAGE, LABEL), plain(KEY, both, IMAGE, LABEL), atol=1e-6)


@pytest.mark.parametrize("setting", [{"weight": -1.0}, {"eps": -0.1}, {"eps": float("nan")}])
def test_a_bad_setting_is_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=rf"^{name} is "):
        align_gradients(constant, bent, **{"eps": 0.1, "weight": 1.0} | setting)
