"""FAB: its path against a NumPy loop in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import run
from fedrobust.attacks.balls import length
from fedrobust.attacks.fab import fab
from fedrobust.types import Answer
from tests.attacks.fab_oracle import NORMS, oracle_nearest

KEY = jax.random.key(3)
SHAPE = (4, 3, 1)
FIRST, SECOND = (np.random.default_rng(5).normal(size=size) for size in ((12, 8), (8, 10)))


def curved(num_classes):
    first, second = FIRST.astype(np.float32), SECOND[:, :num_classes].astype(np.float32)
    return lambda x: jnp.tanh(x.reshape(len(x), -1) @ first) @ second


def images(num, seed=0):
    return np.random.default_rng(seed).uniform(size=(num, *SHAPE)).astype(np.float32)


def attack_of(norm="linf", eps=0.1, **settings):
    return fab(**{"norm": norm, "eps": eps, "num_steps": 6, "num_targets": 1, **settings})


@functools.partial(jax.jit, static_argnames=("search", "logits_fn"))
def path(search, logits_fn, image, label, key=KEY, index=0):
    """All points one try asks about, and whether it had ended before each; it goes on after a success."""

    def ask(state, _):
        point = search.point(state)

        def value(x):
            logits = logits_fn(x[None])[0]
            value = search.objective(logits, label, state)
            return value, (logits, value)

        gradient, (logits, value) = jax.grad(value, has_aux=True)(point)
        return search.learn(state, Answer(logits, value, gradient)), (point, search.ended(state))

    state = search.start(key, image, logits_fn(image[None])[0], label, jnp.int32(index))
    state, (points, ended) = jax.lax.scan(ask, state, length=search.num_queries)
    return points, ended, state


def oracle(norm, image, label, target, num_classes, *, first, num_steps, alpha_max=0.1, eta=1.05, beta=0.9):
    """Algorithm 1 with one target: the points in the order in which they are asked about, and the closest success."""
    second = SECOND[:, :num_classes]

    def model(x):
        hidden = np.tanh(x.ravel() @ FIRST)
        logits = hidden @ second
        gradient = FIRST @ ((second[:, target] - second[:, label]) * (1 - hidden**2))
        return logits, logits[target] - logits[label], gradient

    def size(x):
        return {"linf": np.abs(x).max, "l2": lambda: np.sqrt((x**2).sum()), "l1": np.abs(x).sum}[norm]()

    x0, x, points, best = image.ravel(), first.ravel(), [first.ravel()], (np.inf, None)
    for step in range(num_steps):
        _, value, gradient = model(x)
        here = oracle_nearest(norm, x, gradient, -value)
        clean = oracle_nearest(norm, x0, gradient, -(value + gradient @ (x0 - x)))
        alpha = min(size(here) / (size(here) + size(clean)), alpha_max)
        x = np.clip((1 - alpha) * (x + eta * here) + alpha * (x0 + eta * clean), 0, 1)
        points.append(x)
        if model(x)[0].argmax() != label:
            best = min(best, (size(x - x0), x), key=lambda pair: pair[0])
            x = x0 + beta * (x - x0)
            points.append(x)
            if step < num_steps - 1 and model(x)[0].argmax() != label:  # nobody asks about the very last
                best = min(best, (size(x - x0), x), key=lambda pair: pair[0])
    return points, best


@pytest.mark.parametrize(("norm", "num_classes"), [("linf", 2), ("linf", 10), ("l2", 3), ("l1", 10)])
def test_fab_equals_a_numpy_loop(norm, num_classes):
    image = images(6, num_classes)
    logits = np.asarray(curved(num_classes)(image))
    label = logits.argmax(1)
    num_targets = min(num_classes - 1, 2)
    search = attack_of(norm, num_steps=5, num_targets=num_targets, num_restarts=2, num_final_steps=0)
    num_successes = 0
    for i in range(6):
        for index in (0, num_targets - 1, 2 * num_targets - 1):
            target = np.argsort(-logits[i])[1 + index % num_targets]
            points, _, state = path(search, curved_once(num_classes), image[i], label[i], index=index)
            first = np.asarray(points[0], np.float64)
            if index < num_targets:
                np.testing.assert_array_equal(first, image[i])
            else:  # the start of a restart is the draw's
                assert np.linalg.norm(first - image[i]) > 0 and length(norm, first - image[i]) <= 0.05 + 1e-6
            expected, (best, _) = oracle(norm, image[i], label[i], target, num_classes, first=first, num_steps=5)
            found = np.asarray(points).reshape(len(points), -1)[: len(expected) - 1]
            np.testing.assert_allclose(found, expected[:-1][: len(found)], atol=2e-4)
            np.testing.assert_allclose(state.best_length, best, atol=2e-4 * (5 if norm == "l1" else 1))
            num_successes += np.isfinite(best)
    assert num_successes > 0


@functools.cache
def curved_once(num_classes):
    return curved(num_classes)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_breaks_exactly_the_images_that_a_linear_model_of_two_classes_gives_up(norm):
    """The least change is the solution of a program; images within 2 % of the radius are left out."""
    weight, image = np.random.default_rng(2).normal(size=(12, 2)).astype(np.float32), images(64, 8)
    logits = image.reshape(64, -1) @ weight
    label, normal = logits.argmax(1), weight[:, 1] - weight[:, 0]
    gap = logits[:, 0] - logits[:, 1]  # what z_1 - z_0 has to gain to be 0
    least = np.array(
        [length(norm, oracle_nearest(norm, x.ravel(), normal, g)) for x, g in zip(image, gap, strict=True)]
    )
    eps = float(np.median(least))
    search = attack_of(norm, eps)

    def model(x):
        return x.reshape(len(x), -1) @ weight

    points, _, _ = jax.vmap(lambda x, y: path(search, model, x, y))(image, label)
    wrong = np.asarray(model(points.reshape(-1, 12))).reshape(64, -1, 2).argmax(2) != label[:, None]
    broken = (wrong & np.asarray(jax.vmap(jax.vmap(search.inside, (None, 0)))(image, points))).any(1)
    clear = np.abs(least / eps - 1) > 0.02
    assert clear.sum() > 50
    np.testing.assert_array_equal(broken[clear], (least < eps)[clear])


def test_points_stay_in_the_box_and_do_not_depend_on_the_scale_of_the_logits():
    image, search = images(4, 3), attack_of("l2", num_steps=5, num_targets=2)
    label = np.asarray(curved(3)(image)).argmax(1)
    for i in range(4):
        (points, *_), (scaled, *_) = (path(search, model, image[i], label[i]) for model in (curved_once(3), loud))
        assert points.min() >= 0 and points.max() <= 1
        np.testing.assert_allclose(points, scaled, atol=1e-4)


def loud(x):
    return 1024 * curved_once(3)(x)


@pytest.mark.parametrize("bad", ["flat", "nan"])
def test_without_a_gradient_the_point_stays_and_nothing_is_nan(bad):
    def model(x):
        return {"flat": jnp.zeros((len(x), 3)), "nan": jnp.full((len(x), 3), jnp.nan)}[bad] + 0 * jnp.sum(x)

    image, search = images(1), attack_of(num_targets=2)
    points, ended, _ = path(search, model, image[0], 0)
    np.testing.assert_allclose(points, np.broadcast_to(image, points.shape), atol=1e-7)
    assert ended[7:].all()


def test_a_try_ends_after_its_steps_and_its_final_search():
    image, search = images(12, 3), attack_of("l2", num_steps=4, num_targets=2, num_final_steps=3)
    label = np.asarray(curved(3)(image)).argmax(1)
    ends = set()
    for x, y in zip(image, label, strict=True):
        points, ended, state = path(search, curved_once(3), x, y)
        assert search.num_queries == len(points) == 11
        first = int(np.argmax(ended)) if ended.any() else len(points)
        ends.add(first)
        assert ended[first:].all() and state.num_steps == 4
        if np.isfinite(state.best_length):  # the last three halve what was left of the way to the boundary
            final = np.asarray(points)[first - 3 : first]
            assert all(length("l2", p - x) <= state.best_length * (1 + 1e-6) for p in final)
            margins = [np.sort(z)[-1] - z[y] for z in np.asarray(curved(3)(final))]
            assert state.low <= state.high <= 1 and min(np.abs(margins)) <= 1e-2
    assert len(ends) > 1  # ways back take questions of their own


def test_a_success_outside_the_ball_does_not_count():
    image = images(16, 3)
    label = np.asarray(curved(3)(image)).argmax(1)

    @jax.jit
    def attack(eps):
        search = attack_of(eps=eps, num_targets=2)
        return run(search, num_slots=16)(KEY, curved(3), image, label, label >= 0)

    wrong = [np.asarray(attack(eps).wrong) for eps in (0.0, 0.02, 0.1, 1.0)]
    assert not wrong[0].any() and wrong[3].all()
    assert wrong[1].sum() < wrong[2].sum() < 16
    for eps in (0.02, 0.1):
        assert np.abs(np.asarray(attack(eps).image) - image).max() <= eps * (1 + 2e-5) + 2e-7
    assert attack._cache_size() == 1


def test_targets_are_the_other_classes_from_the_likeliest_down():
    search = attack_of(num_targets=3, num_restarts=2)
    logits, image = jnp.asarray([0.1, 3.0, 2.0, -1.0]), jnp.zeros(SHAPE)
    targets = [int(search.start(KEY, image, logits, jnp.int32(1), jnp.int32(i)).target) for i in range(6)]
    assert search.num_tries == 6 and targets == [2, 0, 3, 2, 0, 3]


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("norm", "l3"),
        ("eps", -0.1),
        ("eps", float("nan")),
        ("num_steps", 0),
        ("num_targets", 0),
        ("num_restarts", 0),
        ("alpha_max", 1.5),
        ("eta", 0.0),
        ("beta", 1.0),
        ("num_final_steps", -1),
    ],
)
def test_a_bad_setting_is_named(setting, bad):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        attack_of(**{setting: bad})


def test_more_targets_than_other_classes_are_refused():
    search = attack_of(num_targets=3)
    with pytest.raises(ValueError, match=r"^num_targets is 3: must be <= 2, the other classes$"):
        search.start(KEY, jnp.zeros(SHAPE), jnp.zeros(3), jnp.int32(0), jnp.int32(0))
