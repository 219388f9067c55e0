"""Square attack: its path against a NumPy loop in float64 that is given the same draws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import run
from fedrobust.attacks.square import draw, pattern, sides, square
from fedrobust.types import Answer

KEY = jax.random.key(11)
SHAPE = (9, 8, 2)
FIRST, SECOND = (np.random.default_rng(6).normal(size=size) for size in ((144, 8), (8, 10)))


def images(num, seed=0):
    return np.random.default_rng(seed).uniform(size=(num, *SHAPE)).astype(np.float32)


def model(x, num_classes, xp=jnp):
    first, second = (FIRST, SECOND) if xp is np else (FIRST.astype(np.float32), SECOND.astype(np.float32))
    return xp.tanh(x.reshape(len(x), -1) @ first) @ second[:, :num_classes]


def attack_of(norm="linf", eps=0.1, **settings):
    return square(**{"norm": norm, "eps": eps, "num_queries": 60, "p_init": 0.8, **settings})


@functools.partial(jax.jit, static_argnames=("norm", "num_classes", "num_queries"))
def path(norm, num_classes, num_queries, eps, image, label, key=KEY):
    """All points of one try, and the margin it holds best after each answer; it goes on after a success."""
    search = attack_of(norm, eps, num_queries=num_queries)

    def ask(state, _):
        point = search.point(state)
        answer = Answer(model(point[None], num_classes)[0], jnp.zeros(()), jnp.zeros_like(point))
        state = search.learn(state, answer)
        return state, (point, state.value)

    state = search.start(key, image, model(image[None], num_classes)[0], label, jnp.int32(0))
    return jax.lax.scan(ask, state, length=num_queries)[1]


# NumPy in float64, written from the paper's algorithms with loops over windows.


def margin(x, label, num_classes):
    logits = model(x[None], num_classes, np)[0]
    return np.delete(logits, label).max() - logits[label]


def size_of(norm, x):
    return {"linf": np.abs(x).max, "l2": lambda: np.sqrt((x**2).sum()), "l1": np.abs(x).sum}[norm]()


def half_peak(norm, height, width):
    """Squares laid over each other around the centre, the k-th with weight 1 / (k + 1)^p, clipped to the window."""
    out = np.zeros((height, width))
    for k in range(max(height, width) // 2 + 1):
        row, column = height // 2, width // 2
        out[max(row - k, 0) : row + k + 1, max(column - k, 0) : column + k + 1] += 1 / (k + 1) ** (
            2 if norm == "l2" else 4
        )
    return out / size_of(norm, out) if out.size else out


def peaks(norm, side, is_turned):
    out = np.concatenate([half_peak(norm, side // 2, side), -half_peak(norm, side - side // 2, side)])
    out = out / size_of(norm, out)
    return out.T if is_turned else out


def projected(norm, eps, image, change):
    """Onto ball and box; "l1": by bisection in float64, what is left of the changes after all shrink by as much."""
    if norm == "l2":
        return np.clip(image + change * min(1, eps / size_of(norm, change)), 0, 1)

    def shrunk(by):
        return np.clip(image + np.sign(change) * np.maximum(np.abs(change) - by, 0), 0, 1)

    low, high = 0.0, np.abs(change).max()
    if np.abs(shrunk(low) - image).sum() <= eps:
        return shrunk(low)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.abs(shrunk(middle) - image).sum() > eps else (low, middle)
    return shrunk(high)


@jax.jit
def drawn_once(i, side):
    return draw(jax.random.fold_in(KEY, i), side, SHAPE)


def loop(norm, eps, image, label, first, side, num_classes):
    x, best, points, values = first, -np.inf, [], []
    for i in range(len(side)):
        points.append(x)
        if (value := margin(x, label, num_classes)) > best:
            best, current = value, x
        values.append(best)
        if i + 1 == len(side):
            return points, values
        drawn = drawn_once(i + 1, side[i + 1])
        s, sign = side[i + 1], np.asarray(drawn.sign, np.float64)
        (r, c), (r2, c2) = np.asarray(drawn.corner)
        to, of = (slice(r, r + s), slice(c, c + s)), (slice(r2, r2 + s), slice(c2, c2 + s))
        if norm == "linf":
            x = current.copy()
            x[to] += 2 * eps * sign
            x = np.clip(np.clip(x, image - eps, image + eps), 0, 1)
            continue
        change, union = current - image, np.zeros(SHAPE[:2], bool)
        union[to] = union[of] = True
        unused = max(eps**2 - (change**2).sum() if norm == "l2" else eps - np.abs(change).sum(), 0)
        new = change.copy()
        new[of] = 0
        for k in range(SHAPE[2]):
            there = change[to][..., k]
            spent = sign[k] * peaks(norm, s, drawn.is_turned) + there / max(size_of(norm, there), 1e-12)
            freed = change[..., k][union]
            budget = np.sqrt((freed**2).sum() + unused / SHAPE[2])
            if norm == "l1":
                budget = SHAPE[2] * (np.abs(freed).sum() + unused / SHAPE[2])
            new[(*to, k)] = spent / size_of(norm, spent) * budget
        x = projected(norm, eps, image, new)


@pytest.mark.parametrize(("norm", "num_classes"), [("linf", 2), ("linf", 3), ("l2", 3), ("l1", 3)])
def test_square_equals_a_numpy_loop_with_the_same_draws(norm, num_classes):
    """Margins that differ by less than rounding may be told apart differently: none of these were."""
    eps, side, num_improved = {"linf": 0.2, "l2": 1.0, "l1": 5.0}[norm], sides(norm, 60, 0.8, SHAPE), 0
    for i, image in enumerate(images(4, num_classes)):
        label = i % num_classes
        points, values = path(norm, num_classes, 60, eps, image, label)
        first, image = np.float64(points[0]), np.float64(image)
        expected, margins = loop(norm, eps, image, label, first, side, num_classes)
        np.testing.assert_allclose(points, expected, atol=2e-5)
        np.testing.assert_allclose(values, margins, atol=1e-4)
        num_improved += len(set(margins))
    assert num_improved > 20


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_points_stay_in_the_ball_and_in_the_box_and_the_margin_never_falls(norm):
    image, rest = images(8, 1), np.arange(8) % 3
    image[0], image[1] = 0, 1
    for eps in (0.0, 0.03, 0.6, 20.0):
        points, values = jax.vmap(lambda x, y, eps=eps: path(norm, 3, 60, eps, x, y))(image, rest)
        points = np.asarray(points, np.float64)
        assert points.min() >= 0 and points.max() <= 1
        change = (points - image[:, None]).reshape(8, 60, -1)
        size = np.linalg.norm(change, ord={"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=2)
        assert size.max() <= eps * (1 + 1e-5) + 1.2e-7 * (eps > 0) * (144 if norm == "l1" else 1)
        assert (np.diff(values, axis=1) >= 0).all()
        if eps == 0.03:
            assert size[2:, 0].min() > 0.9 * eps  # the first point and the others use the radius up
            assert np.median(size) > 0.9 * eps


def test_stripes_are_columns_of_plus_or_minus_eps_by_channel():
    points, _ = path("linf", 3, 60, 0.1, np.full(SHAPE, 0.5, np.float32), 0)
    change = np.asarray(points[0]) - 0.5
    np.testing.assert_allclose(np.abs(change), 0.1, atol=1e-6)
    np.testing.assert_array_equal(change, np.broadcast_to(change[:1], SHAPE))
    assert len(np.unique(change[0, :, 0])) == 2 and (change[0, :, 0] != change[0, :, 1]).any()


def test_a_proposal_changes_one_square_of_the_side_of_the_schedule():
    eps, side = 0.1, sides("linf", 60, 0.8, SHAPE)
    image = np.full(SHAPE, 0.5, np.float32)
    points, values = path("linf", 3, 60, eps, image, 0)
    best = np.asarray(points[0])
    for i in range(1, 60):
        changed = np.argwhere(np.asarray(points[i]) != best)
        if len(changed):
            assert (changed.max(0) - changed.min(0))[:2].max() < side[i]
        best = np.asarray(points[i]) if i and values[i] > values[i - 1] else best
    assert len(set(side[1:].tolist())) > 3


def test_sides_by_hand():
    side = sides("linf", 10_000, 0.8, (28, 28, 1))
    # after query 10, 50, ... of 10 000, p is halved: the root of p * 784
    at = [1, 10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
    assert side[at].tolist() == [25, 25, 18, 18, 13, 9, 6, 4, 3, 2, 2, 1]
    short = sides("linf", 1000, 0.8, (28, 28, 1))
    assert short[[1, 2, 5, 6, 801]].tolist() == [25, 18, 18, 13, 1]
    as_in_auto_attack = sides("linf", 5000, 0.8, (28, 28, 1), rescale=False)
    assert (as_in_auto_attack == side[:5000]).all()
    assert sides("l2", 10_000, 0.8, (28, 28, 1))[at].tolist() == [25, 25, 19, 19, 13, 9, 7, 5, 3, 3, 3, 3]
    assert sides("l2", 100, 1.0, (2, 5, 1)).max() == 2
    assert (sides("linf", 100, 0.001, (4, 4, 1))[1:] == 1).all()


def test_pattern_equals_a_pile_of_squares():
    row, column = np.arange(12)[:, None] - 2, np.arange(12)[None] - 1
    for norm, side in itertools.product(("l2", "l1"), (1, 2, 3, 4, 5, 8, 9)):
        found = jax.jit(pattern, static_argnums=(0, 4))(norm, row, column, side, 12)
        expected = np.zeros((12, 12))
        expected[2 : 2 + side, 1 : 1 + side] = peaks(norm, side, False)
        np.testing.assert_allclose(found / size_of(norm, found), expected, atol=1e-6)


def test_corners_reach_every_place_and_signs_both_ways():
    """400 draws of 20 places: a place is missed with probability 20 * 0.95^400 = 2.5e-8."""
    drawn = jax.vmap(drawn_once, (0, None))(jnp.arange(400), 5)
    for of in (0, 1):
        assert {tuple(x) for x in np.asarray(drawn.corner[:, of]).tolist()} == {
            (r, c) for r in range(5) for c in range(4)
        }
    assert abs(np.mean(drawn.sign)) < 0.2 and 0.4 < np.mean(drawn.is_turned) < 0.6


def test_driver_needs_no_gradient_and_finds_what_the_path_finds():
    @jax.custom_jvp
    def no_gradient(x):
        return x

    @no_gradient.defjvp
    def refuse(primals, tangents):
        raise AssertionError("a black box was differentiated")

    image = images(6, 4)
    label = np.asarray(model(image, 3)).argmax(1)
    search = attack_of(eps=0.1, num_restarts=2)
    assert search.objective is None and search.num_tries == 2
    attack = jax.jit(lambda x, y: run(search, num_slots=3)(KEY, lambda x: model(no_gradient(x), 3), x, y, y >= 0))
    found = attack(image, label)
    for i in range(6):
        keys = [jax.random.fold_in(jax.random.fold_in(KEY, i), r) for r in (0, 1)]
        margins = [np.asarray(path("linf", 3, 60, 0.1, image[i], label[i], key)[1])[-1] for key in keys]
        assert bool(found.wrong[i]) == (max(margins) > 0)
    assert 0 < np.sum(found.wrong) < 6


def test_nan_logits_are_never_accepted():
    search, image = attack_of(num_queries=4), images(1)[0]
    state = search.start(KEY, image, jnp.zeros(3), jnp.int32(0), jnp.int32(0))
    nan = Answer(jnp.full(3, jnp.nan), jnp.zeros(()), jnp.zeros(SHAPE))
    state = search.learn(search.learn(state, nan), nan)
    assert state.value == -jnp.inf and np.isfinite(search.point(state)).all()
    np.testing.assert_array_equal(state.best, image)


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("norm", "l0"),
        ("eps", -0.1),
        ("eps", float("inf")),
        ("num_queries", 0),
        ("p_init", 0.0),
        ("p_init", 1.1),
        ("num_restarts", 0),
    ],
)
def test_a_bad_setting_is_named(setting, bad):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        attack_of(**{setting: bad})
