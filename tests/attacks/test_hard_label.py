"""RayS against a NumPy loop in float64, and its laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import run
from fedrobust.attacks.hard_label import rays
from fedrobust.types import Answer

KEY = jax.random.key(0)
SHAPE = (3, 4, 2)
FIRST, SECOND = (np.random.default_rng(9).normal(size=size) for size in ((24, 8), (8, 10)))
NUM = 150


def images(num, seed=0):
    return np.random.default_rng(seed).uniform(size=(num, *SHAPE)).astype(np.float32)


def model(x, num_classes, xp=jnp):
    first, second = (FIRST, SECOND) if xp is np else (FIRST.astype(np.float32), SECOND.astype(np.float32))
    return xp.tanh(x.reshape(len(x), -1) @ first) @ second[:, :num_classes]


def labelled(num, num_classes, seed=0):
    image = images(num, seed)
    return image, np.asarray(model(image, num_classes)).argmax(1)


@functools.partial(jax.jit, static_argnames=("num_classes", "look", "num"))
def path(num_classes, image, label, look=lambda z: z, num=NUM):
    """All points, the radius held best after each answer, whether it has ended."""
    search = rays(eps=0.1, num_queries=num, tolerance=1e-3)

    def ask(state, _):
        point = search.point(state)
        logits = look(model(point[None], num_classes)[0])
        state = search.learn(state, Answer(logits, jnp.zeros(()), jnp.zeros_like(point)))
        return state, (point, state.radius, search.ended(state))

    state = search.start(KEY, image, model(image[None], num_classes)[0], label, jnp.int32(0))
    return jax.lax.scan(ask, state, length=num)[1]


def loop(image, label, num_classes, tolerance=1e-3):
    """Algorithms 2 and 3 as loops; yields (point, best radius before the answer). Pixels by channel, row, column."""
    flat = np.float64(image).transpose(2, 0, 1).ravel()
    best, radius, level = np.ones(len(flat)), np.inf, 0

    def at(direction, r):
        return np.clip(flat + r * direction, 0, 1).reshape(SHAPE[2], *SHAPE[:2]).transpose(1, 2, 0)

    while True:
        size = int(np.ceil(len(flat) / 2**level))
        for begin in range(0, len(flat), size):
            attempt = best.copy()
            attempt[begin : begin + size] *= -1
            high, low = min(radius, 1), 0
            x = at(attempt, high)
            yield x, radius
            if model(x[None], num_classes, np).argmax() == label:
                continue
            while high - low > tolerance:
                x = at(attempt, (high + low) / 2)
                yield x, radius
                if model(x[None], num_classes, np).argmax() == label:
                    low = (high + low) / 2
                else:
                    high = (high + low) / 2
            if high < radius:
                best, radius = attempt, high
        level += 1


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_rays_equal_a_numpy_loop(num_classes):
    image, label = labelled(6, num_classes)
    num_found = 0
    for x, y in zip(image, label, strict=True):
        points, radius, _ = path(num_classes, x, y)
        asked = loop(x, y, num_classes)
        expected = [next(asked) for _ in range(NUM)]
        np.testing.assert_allclose(points, [point for point, _ in expected], atol=1e-6)
        np.testing.assert_allclose(np.asarray(radius)[:-1], [r for _, r in expected][1:], rtol=1e-6)
        num_found += np.isfinite(radius[-1])
    assert num_found >= 3


def only_class(logits):
    return jax.nn.one_hot(jnp.argmax(logits), len(logits))


def test_it_sees_nothing_but_the_predicted_class():
    image, label = labelled(4, 3)
    for x, y in zip(image, label, strict=True):
        for one, other in zip(path(3, x, y), path(3, x, y, only_class), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_radius_never_grows_and_its_ray_is_misclassified():
    image, label = labelled(12, 3, 1)
    points, radius, _ = (np.asarray(x) for x in jax.vmap(lambda x, y: path(3, x, y))(image, label))
    assert points.min() >= 0 and points.max() <= 1
    assert (radius[:, 1:] <= radius[:, :-1]).all()
    wrong = np.asarray(model(points.reshape(-1, *SHAPE), 3)).reshape(12, NUM, 3).argmax(2) != label[:, None]
    size = np.abs(points - image[:, None]).max((2, 3, 4))
    for i in range(12):
        if np.isfinite(radius[i, -1]):
            assert np.where(wrong[i], size[i], 9).min() <= radius[i, -1] + 1e-6
    assert (np.ptp(np.where(np.isfinite(radius), radius, 2), axis=1) > 0).sum() > 6


def test_on_a_linear_model_it_finds_the_signs_of_the_weights():
    """The best direction of signs is known: the sign of the weights; the radius is the gap over their sum."""
    weight = np.random.default_rng(4).normal(size=24)
    image, search = np.full(SHAPE, 0.5, np.float32), rays(eps=1.0, num_queries=500, tolerance=1e-5)

    @jax.jit
    def step(state):
        value = jnp.sum(search.point(state).ravel() * weight) - 0.5 * weight.sum() - 0.1 * np.abs(weight).sum()
        state = search.learn(state, Answer(jnp.stack([0 * value, value]), value, jnp.zeros(SHAPE)))
        return state, search.ended(state)

    state, over = search.start(KEY, image, jnp.zeros(2), jnp.int32(0), jnp.int32(0)), False
    count = 0
    while not over:
        state, over = step(state)
        count += 1
    assert count < 500
    np.testing.assert_allclose(state.radius, 0.1, atol=1e-4)
    light = np.abs(weight) < 1e-3 * np.abs(weight).sum()  # the tolerance hides the least of them
    assert (np.asarray(state.direction).ravel() == np.sign(weight))[~light].all()


def test_it_ends_where_no_class_change_exists():
    points, radius, ended = path(2, images(1)[0], 0, never, 80)
    assert np.isinf(radius).all() and ended[-1] and not ended[24]
    assert len(points) == 80


def never(logits):
    return jnp.asarray([1.0, 0.0]) + 0 * logits


def test_driver_counts_successes_inside_the_ball_only():
    image, label = labelled(12, 3, 2)

    @jax.jit
    def attack(eps):
        search = rays(eps=eps, num_queries=NUM, tolerance=1e-3)
        return run(search, num_slots=12)(KEY, lambda x: model(x, 3), image, label, label >= 0)

    wrong = [np.asarray(attack(eps).wrong) for eps in (0.0, 0.1, 1.0)]
    assert not wrong[0].any() and 0 < wrong[1].sum() < wrong[2].sum()
    assert np.abs(np.asarray(attack(0.1).image) - image).max() <= 0.1 * (1 + 1e-5) + 1.2e-7
    radius = np.array([path(3, x, y)[1][-1] for x, y in zip(image, label, strict=True)])
    assert (wrong[1] >= (radius <= 0.1)).all() and (wrong[2] == (radius <= 1)).all()


@pytest.mark.parametrize(
    ("setting", "bad"),
    [("eps", -0.1), ("eps", float("nan")), ("num_queries", 0), ("tolerance", 0.0), ("tolerance", float("inf"))],
)
def test_a_bad_setting_is_named(setting, bad):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        rays(**{"eps": 0.1, "num_queries": 10, "tolerance": 1e-3, setting: bad})


def test_it_ends_when_each_single_sign_has_failed_once():
    """24 values: 1 + 2 + 4 + 8 + 12 larger blocks, then every value by itself."""
    _, _, ended = path(2, images(1)[0], 0, never, 80)
    assert np.flatnonzero(ended)[0] == 27 + 24 - 1
