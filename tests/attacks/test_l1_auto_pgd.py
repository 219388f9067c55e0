"""Auto-PGD in the l1 ball against a NumPy loop written from the paper, and the laws of its stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import auto_pgd, run
from fedrobust.attacks.l1_auto_pgd import _plan
from fedrobust.types import Answer

pytestmark = pytest.mark.optimized  # without, float32 strays further from the loop in float64

SHAPE = (5, 4, 1)
EPS, NUM_STEPS = 0.4, 60
KEY = jax.random.key(2)
RNG = np.random.default_rng(7)
HIDDEN, OUT = 2 * RNG.normal(size=(20, 8)), RNG.normal(size=(8, 4))
IMAGE = RNG.uniform(size=(10, *SHAPE)).astype(np.float32)


def logits_fn(x):
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ HIDDEN.astype(np.float32)) @ OUT.astype(np.float32)


LABEL = np.asarray(logits_fn(IMAGE).argmax(1))


def search_of(**settings):
    defaults = {"norm": "l1", "eps": EPS, "num_steps": NUM_STEPS, "random_start": False, "objective": "cross_entropy"}
    return auto_pgd(**{**defaults, **settings})


def points(search, image, label):
    """All that a search asks about."""

    def value(x, state):
        return search.objective(logits_fn(x[None])[0], label, state)

    def step(state, _):
        x = search.point(state)
        found, gradient = jax.value_and_grad(value)(x, state)
        return search.learn(state, Answer(jnp.zeros(4), found, gradient)), x

    state = search.start(KEY, image, logits_fn(image[None])[0], label, jnp.int32(0))
    return jax.lax.scan(step, state, length=search.num_queries)[1]


def project(u, x, eps):
    """The closest point to u of the l1 ball around x and the box, by trying every breakpoint of the shrinkage."""
    size, sign = np.abs(u - x), np.sign(u - x)
    room = np.where(u > x, 1 - x, x)
    total = lambda t: np.clip(size - t, 0, room).sum()  # noqa: E731
    if total(0) <= eps:
        return np.clip(u, 0, 1)
    kinks = np.unique(np.clip(np.concatenate([[0], size, size - room]), 0, None))
    k = max(i for i in range(len(kinks)) if total(kinks[i]) > eps)
    low, high = kinks[k], kinks[k + 1]
    t = low + (total(low) - eps) * (high - low) / (total(low) - total(high))  # linear between kinks
    return x + sign * np.clip(size - t, 0, room)


def paper(x0, y):
    """Every point that is asked about, in float64."""
    x0, n = x0.ravel().astype(np.float64), x0.size

    def f(x):
        hidden = np.tanh((x - 0.5) @ HIDDEN)
        z = hidden @ OUT
        share = np.exp(z - z.max())
        share /= share.sum()
        return -np.log(share[y]), HIDDEN @ ((OUT @ (share - np.eye(4)[y])) * (1 - hidden**2))

    def moved(x):
        return np.sum(np.abs(x - x0) > 1e-7)

    best = x0
    for radius, steps in ((3 * EPS, 18), (2 * EPS, 18), (EPS, 24)):
        x = project(best, x0, radius)
        before = moved(x) or n
        k = moved(x) / 1.5 or n / 5
        size, best, (best_value, best_gradient) = radius, x, f(x)
        gradient = best_gradient
        yield x
        every = max(int(0.04 * steps), 1)
        for i in range(1, steps + 1):
            kept = np.abs(gradient) >= np.sort(np.abs(gradient))[min(int(n - k), n - 1)]
            x = project(x + size * np.sign(gradient) * kept / kept.sum(), x0, radius)
            yield x
            value, gradient = f(x)
            if value > best_value:
                best, best_value, best_gradient = x, value, gradient
            if i % every == 0:
                sparser = moved(best) < 0.95 * before
                size = radius if sparser else max(size / 1.5, radius / 10)
                before, k = moved(best), moved(best) / 1.5
                if sparser:
                    x, gradient = best, best_gradient


def test_points_equal_a_numpy_loop_of_the_paper():
    asked = np.asarray(jax.jit(jax.vmap(functools.partial(points, search_of())))(IMAGE, LABEL))
    assert asked.shape[1] == NUM_STEPS + 3
    for image, label, found in zip(IMAGE, LABEL, asked, strict=True):
        np.testing.assert_allclose(found.reshape(len(found), -1), list(paper(image, label)), atol=2e-5)


def test_stages_stay_in_their_balls_and_only_the_last_can_succeed():
    asked = np.asarray(jax.jit(jax.vmap(functools.partial(points, search_of(random_start=True))))(IMAGE, LABEL))
    length = np.abs(asked - IMAGE[:, None]).sum((2, 3, 4))
    for first, last, scale in ((0, 19, 3), (19, 38, 2), (38, 63, 1)):
        assert EPS * scale * 0.99 < length[:, first:last].max() <= EPS * scale + 1e-5
    assert asked.min() >= 0
    assert asked.max() <= 1
    found = jax.jit(lambda: run(search_of(random_start=True), num_slots=4)(KEY, logits_fn, IMAGE, LABEL, LABEL >= 0))()
    assert found.wrong.any()
    assert np.abs(found.image - IMAGE).sum((1, 2, 3)).max() <= EPS + 1e-5
    assert found.num_queries[np.asarray(found.wrong)].min() > 38


@pytest.mark.parametrize("fill", [jnp.nan, 0.0])
def test_answers_that_say_nothing_leave_the_image(fill):
    search = search_of(num_steps=12)
    learn = jax.jit(search.learn)
    state = search.start(KEY, IMAGE[0], jnp.zeros(4), jnp.int32(0), jnp.int32(0))
    for _ in range(search.num_queries - 1):
        state = learn(state, Answer(jnp.zeros(4), jnp.asarray(fill), jnp.full(SHAPE, fill)))
        np.testing.assert_array_equal(state.x, IMAGE[0])


@pytest.mark.parametrize(
    ("num_steps", "stages"),
    [(1, [0, 0, 1]), (3, [0, 0, 3]), (4, [1, 1, 2]), (7, [2, 2, 3]), (50, [15, 15, 20]), (100, [30, 30, 40])],
)
def test_the_last_stage_has_a_step_however_few_there_are(num_steps, stages):
    scale = _plan(num_steps).scale
    assert [int(np.sum(scale == s)) for s in (3, 2, 1)] == [n + 1 if n else 0 for n in stages]
    assert search_of(num_steps=num_steps).num_queries == len(scale)


def test_a_nan_at_the_start_is_not_the_best_for_ever():
    search = auto_pgd(norm="l1", eps=0.4, num_steps=12, random_start=False, objective="cross_entropy")
    image = jnp.full((5, 4, 1), 0.5)
    state = search.start(jax.random.key(0), image, jnp.zeros(4), jnp.int32(0), jnp.int32(0))
    for value in (jnp.nan, 1.0):
        state = search.learn(state, Answer(jnp.zeros(4), jnp.float32(value), jnp.ones(image.shape)))
    assert state.best_value == 1.0


def test_restarts_attack_each_target_as_often():
    search = auto_pgd(
        norm="l1", eps=0.4, num_steps=12, random_start=True, objective="targeted_margin", num_restarts=2, num_targets=2
    )
    logits, image = jnp.asarray([2.0, 1.0, 0.5, -1.0]), jnp.full((5, 4, 1), 0.5)
    tries = [search.start(jax.random.key(0), image, logits, jnp.int32(1), jnp.int32(i)) for i in range(4)]
    assert [int(state.target) for state in tries] == [0, 0, 2, 2]
