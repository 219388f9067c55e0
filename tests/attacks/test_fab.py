"""FAB: its projection against solvers for linear and quadratic programs, its path against a NumPy loop in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from fedrobust.attacks import run
from fedrobust.attacks.balls import length
from fedrobust.attacks.fab import fab, nearest
from fedrobust.types import Answer

KEY = jax.random.key(3)
NORMS = ["linf", "l2", "l1"]
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


# The projection.

project = jax.jit(nearest, static_argnums=0)


def random_problem(seed, num):
    """A point with pixels on the edge of the box, a normal with zeros and of any scale, a gap perhaps out of reach."""
    rng = np.random.default_rng(seed)
    point = np.clip(rng.uniform(-0.3, 1.3, num), 0, 1).astype(np.float32)
    scale = 10.0 ** rng.integers(-6, 7)
    normal = (rng.normal(size=num) * (rng.uniform(size=num) < 0.8) * scale).astype(np.float32)
    reach = (
        np.abs(normal * np.where(normal > 0, 1 - point, point)).sum(),
        np.abs(normal * np.where(normal > 0, point, 1 - point)).sum(),
    )
    up = rng.uniform() < 0.5
    return point, normal, np.float32((reach[0] if up else -reach[1]) * rng.uniform(0, 1.2)), reach[0 if up else 1]


def solved(norm, point, normal, gap):
    """The least length of a change of the point, by a solver of linear or quadratic programs."""
    num = len(point)
    scale = np.abs(normal).max()
    normal, gap = normal / scale, gap / scale
    if norm == "l2":
        found = optimize.minimize(
            lambda d: d @ d,
            np.zeros(num),
            jac=lambda d: 2 * d,
            bounds=list(zip(-point, 1 - point, strict=True)),
            constraints={"type": "eq", "fun": lambda d: normal @ d - gap, "jac": lambda d: normal},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return np.sqrt(found.fun) if found.success else None
    if norm == "linf":  # (d, t): least t with -t <= d <= t
        one = np.ones((num, 1))
        found = optimize.linprog(
            [0] * num + [1],
            A_ub=np.block([[np.eye(num), -one], [-np.eye(num), -one]]),
            b_ub=np.zeros(2 * num),
            A_eq=[[*normal, 0]],
            b_eq=[gap],
            bounds=[*zip(-point, 1 - point, strict=True), (0, None)],
        )
    else:  # (p, q): d = p - q, least sum
        found = optimize.linprog(
            np.ones(2 * num),
            A_eq=[[*normal, *-normal]],
            b_eq=[gap],
            bounds=[(0, hi) for hi in (*(1 - point), *point)],
        )
    return found.fun if found.success else None


@pytest.mark.parametrize("norm", NORMS)
def test_nearest_equals_the_solution_of_the_program(norm):
    """100 problems a norm. Without the box the lengths differ by more than 1 % in most of them."""
    num_solved = num_out_of_reach = 0
    for seed in range(100):
        point, normal, gap, reach = random_problem(seed, 9)
        change = np.asarray(project(norm, point, normal, gap), np.float64)
        assert ((point + change >= -1e-6) & (point + change <= 1 + 1e-6)).all()
        if abs(gap) >= reach * (1 - 1e-5):
            num_out_of_reach += 1
            corner = np.where(normal * gap > 0, 1 - point, -point) * (normal != 0)
            np.testing.assert_allclose(change, corner, atol=2e-5)
            continue
        expected = solved(norm, point.astype(np.float64), normal.astype(np.float64), float(gap))
        if expected is None:
            continue
        num_solved += 1
        np.testing.assert_allclose(change @ normal, gap, rtol=1e-5, atol=1e-5 * np.abs(normal).max())
        np.testing.assert_allclose(length(norm, change), expected, rtol=2e-5, atol=2e-6)
    assert num_solved >= 75 and num_out_of_reach >= 10


def test_nearest_by_hand():
    point, normal = jnp.asarray([0.5, 0.9, 0.0]), jnp.asarray([1.0, 2.0, -1.0])
    # room 0.5, 0.1 and 0 upwards
    np.testing.assert_allclose(project("linf", point, normal, 0.5), [0.3, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(project("l2", point, normal, 0.25), [0.05, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(project("l1", point, normal, 0.1), [0, 0.05, 0], atol=1e-6)
    np.testing.assert_allclose(project("l1", point, normal, 0.3), [0.1, 0.1, 0], atol=1e-6)
    np.testing.assert_allclose(project("linf", point, normal, -0.4), [-0.1, -0.1, 0.1], atol=1e-6)
    for norm in NORMS:
        np.testing.assert_allclose(project(norm, point, normal, 9.0), [0.5, 0.1, 0], atol=1e-6)
        np.testing.assert_array_equal(project(norm, point, 0 * normal, 1.0), 0)
        np.testing.assert_array_equal(project(norm, point, normal, 0.0), 0)
        np.testing.assert_array_equal(project(norm, point, normal * jnp.nan, 1.0), 0)
        np.testing.assert_array_equal(project(norm, point, normal, jnp.nan), 0)


@pytest.mark.parametrize("norm", NORMS)
def test_nearest_is_exact_for_many_pixels_of_very_different_weight(norm):
    """3000 pixels whose weights span eight orders of magnitude: many kinks, one after the other."""
    rng = np.random.default_rng(0)
    point = rng.uniform(size=(8, 3000)).astype(np.float32)
    normal = (10 ** rng.uniform(-8, 0, (8, 3000)) * rng.choice([-1, 1], (8, 3000))).astype(np.float32)
    reach = np.abs(normal * np.where(normal > 0, 1 - point, point)).sum(1)
    gap = (reach * rng.uniform(0.05, 0.99, 8)).astype(np.float32)
    change = jax.jit(jax.vmap(functools.partial(nearest, norm)))(point, normal, gap)
    expected = [oracle_nearest(norm, *map(np.float64, row)) for row in zip(point, normal, gap, strict=True)]
    np.testing.assert_allclose(change, expected, atol=3e-4 if norm == "l1" else 2e-5)
    np.testing.assert_allclose(np.sum(np.float64(change) * normal, axis=1), gap, rtol=1e-4)


def oracle_nearest(norm, point, normal, gap):
    """The same by sorting, in float64: the sum of the moves is linear between the sorted kinks."""
    size, up = np.abs(normal), normal * gap > 0
    room, way = np.where(up, 1 - point, point) * (normal != 0), np.sign(normal) * np.sign(gap)
    need = min(abs(gap), (size * room).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        if norm == "l1":
            order = np.argsort(-size, kind="stable")
            before = np.concatenate([[0], np.cumsum((size * room)[order])[:-1]])
            change = np.zeros_like(point)
            change[order] = np.nan_to_num(np.clip((need - before) / size[order], 0, room[order]))
            return way * change
        rate = np.ones_like(size) if norm == "linf" else size
        kink = np.where(size > 0, room / rate, 0)
    order = np.argsort(kink)
    kinks = kink[order]
    slope, fill = (size * rate)[order], (size * room)[order]
    filled = np.cumsum(fill) + kinks * (slope.sum() - np.cumsum(slope))  # the sum at every kink
    level = np.interp(need, [0, *filled], [0, *kinks])
    return way * np.minimum(level * rate, room)


# The path.


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
