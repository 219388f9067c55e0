"""Auto-PGD against a NumPy loop written from the paper, and what must hold between its settings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import OBJECTIVES, auto_pgd, run
from fedrobust.attacks.auto_pgd import _windows
from fedrobust.types import Answer

pytestmark = pytest.mark.optimized  # without, float32 strays further from the loop in float64

SHAPE = (4, 3, 1)
KEY = jax.random.key(2)
RNG = np.random.default_rng(5)
HIDDEN, OUT = 2 * RNG.normal(size=(12, 8)), RNG.normal(size=(8, 5))
IMAGE = RNG.uniform(0.1, 0.9, size=(12, *SHAPE)).astype(np.float32)


def logits_fn(x):
    return jnp.tanh((x.reshape(len(x), -1) - 0.5) @ HIDDEN.astype(np.float32)) @ OUT.astype(np.float32)


LABEL = np.asarray(logits_fn(IMAGE).argmax(1))


def attack_of(**settings):
    defaults = {"norm": "linf", "eps": 0.1, "num_steps": 30, "random_start": False, "objective": "cross_entropy"}
    return auto_pgd(**{**defaults, **settings})


def points(search, image, label):
    """All that a search asks about, and the values it gets."""

    def ask(x, state):
        logits = logits_fn(x[None])[0]
        return search.objective(logits, label, state), logits

    def step(state, _):
        x = search.point(state)
        (value, logits), gradient = jax.value_and_grad(ask, has_aux=True)(x, state)
        return search.learn(state, Answer(logits, value, gradient)), (x, value)

    state = search.start(KEY, image, logits_fn(image[None])[0], label, jnp.int32(0))
    return jax.lax.scan(step, state, length=search.num_queries)[1]


def value_of(objective, z, y, t):
    """The objective and its gradient in the logits, in float64."""
    order = np.argsort(-z)
    unit = np.eye(len(z))
    if objective == "cross_entropy":
        share = np.exp(z - z.max())
        share /= share.sum()
        return -np.log(share[y]), share - unit[y]
    other = next(i for i in order if i != y)
    if objective == "margin":
        return z[other] - z[y], unit[other] - unit[y]
    if objective == "dlr":
        high, low, top, bottom = z[other] - z[y], z[order[0]] - z[order[2]], unit[other] - unit[y], None
        bottom = unit[order[0]] - unit[order[2]]
    else:
        high, top = z[t] - z[y], unit[t] - unit[y]
        low = z[order[0]] - (z[order[2]] + z[order[3]]) / 2
        bottom = unit[order[0]] - (unit[order[2]] + unit[order[3]]) / 2
    return high / low, top / low - high * bottom / low**2


def algorithm_1(x0, y, norm, objective, eps, num_steps, halvings):
    """Yields every point and its value; counts in `halvings` which condition halved the step."""

    def f(x):
        hidden = np.tanh((x.ravel() - 0.5) @ HIDDEN)
        value, slope = value_of(objective, hidden @ OUT, y, target)
        return value, (HIDDEN @ ((OUT @ slope) * (1 - hidden**2))).reshape(x.shape)

    def project(x):
        if norm == "linf":
            return np.clip(np.clip(x, x0 - eps, x0 + eps), 0, 1)
        return np.clip(x0 + (x - x0) * min(1, eps / max(np.linalg.norm(x - x0), 1e-30)), 0, 1)

    def unit(g):
        return np.sign(g) if norm == "linf" else g / max(np.linalg.norm(g), 1e-12)

    z = np.tanh((x0.ravel() - 0.5) @ HIDDEN) @ OUT
    target = next(i for i in np.argsort(-z) if i != y)
    shares = [0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    checkpoints = [int(np.ceil(p * num_steps - 1e-9)) for p in shares]
    step_size, last, x = 2 * eps, x0, x0
    values = [f(x)[0]]
    best, best_value, gradient = x, values[0], f(x)[1]
    halved, checked_value, checked_at = False, best_value, 0
    yield x, values[0]
    for k in range(num_steps):
        z = project(x + step_size * unit(gradient))
        new = z if k == 0 else project(x + 0.75 * (z - x) + 0.25 * (x - last))
        last, x = x, new
        value, gradient = f(x)
        values.append(value)
        yield x, value
        if value > best_value:
            best, best_value = x, value
        if k + 1 in checkpoints:
            rises = sum(b > a for a, b in zip(values[checked_at:-1], values[checked_at + 1 :], strict=True))
            first = rises < 0.75 * (k + 1 - checked_at)
            second = not halved and checked_value == best_value
            halvings["first"] += first
            halvings["second alone"] += second and not first
            halved, checked_value, checked_at = first or second, best_value, k + 1
            if halved:
                step_size, x = step_size / 2, best
                gradient = f(x)[1]


@pytest.mark.parametrize(
    ("norm", "objective"),
    [("linf", "cross_entropy"), ("linf", "dlr"), ("linf", "targeted_dlr"), ("l2", "margin"), ("l2", "cross_entropy")],
)
def test_points_equal_a_numpy_loop_of_the_paper(norm, objective):
    eps, tolerance = (0.06, 1e-4) if norm == "linf" else (0.15, 2e-4)  # float32 against float64 over 30 steps
    search = attack_of(norm=norm, eps=eps, objective=objective)
    asked = np.asarray(jax.jit(jax.vmap(functools.partial(points, search)))(IMAGE, LABEL)[0])
    halvings = {"first": 0, "second alone": 0}
    for i in range(len(LABEL)):
        image = IMAGE[i].astype(np.float64)
        expected = list(algorithm_1(image, LABEL[i], norm, objective, eps, 30, halvings))
        # Beyond the boundary DLR has poles, where rounding explodes; no search goes on there.
        beyond = [k for k, (_, value) in enumerate(expected) if objective == "dlr" and value > 0]
        end = beyond[0] if beyond else 31
        np.testing.assert_allclose(asked[i][:end], [x for x, _ in expected[:end]], atol=tolerance)
    assert halvings["first"] > 5


def test_the_second_condition_alone_halves_the_step():
    """Values that fall and then rise below their best: every step but the first few rises, and none is a new best."""
    search = attack_of(num_steps=100, eps=0.1)
    state = search.start(KEY, jnp.full(SHAPE, 0.5), jnp.zeros(5), jnp.int32(0), jnp.int32(0))
    learn, sizes = jax.jit(search.learn), []
    gradient = jnp.ones(SHAPE)
    for step in range(60):
        value = 10.0 if step == 22 else float(step if step < 22 else step - 100)
        state = learn(state, Answer(jnp.zeros(5), jnp.asarray(value), gradient))
        sizes.append(round(float(state.step_size), 6))
    # Best at 21; nothing better at checkpoint 41, where 18 of 19 steps rose; right after a halving the rule rests.
    assert sizes[40:42] == [0.2, 0.1]
    assert sizes[57] == 0.1


def test_checkpoints_by_hand():
    assert np.flatnonzero(_windows(100)).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert _windows(100)[[22, 41, 57]].tolist() == [22, 19, 16]
    for num_steps in range(1, 30):
        assert _windows(num_steps).sum() <= num_steps


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_stays_in_the_ball_and_breaks_at_least_what_plain_steps_break(norm):
    eps = 0.05 if norm == "linf" else 0.15
    asked, _ = jax.jit(jax.vmap(functools.partial(points, attack_of(norm=norm, eps=eps, random_start=True))))(
        IMAGE, LABEL
    )
    delta = np.asarray(asked, np.float64) - IMAGE[:, None].astype(np.float64)
    length = np.abs(delta).max((2, 3, 4)) if norm == "linf" else np.sqrt((delta**2).sum((2, 3, 4)))
    assert length.max() <= eps + 1e-6
    assert asked.min() >= 0 and asked.max() <= 1


def test_margin_of_two_classes_breaks_what_cross_entropy_breaks():
    def two(x):
        return logits_fn(x)[:, :2]

    image = np.random.default_rng(0).uniform(size=(64, *SHAPE)).astype(np.float32)
    label = np.asarray(two(image).argmax(1))
    wrong = [
        jax.jit(lambda search=search: run(search, num_slots=32)(KEY, two, image, label, label >= 0).wrong)()
        for search in (attack_of(eps=0.06, num_steps=20, objective=name) for name in ("cross_entropy", "margin"))
    ]
    assert abs(int(wrong[0].sum()) - int(wrong[1].sum())) <= 1
    assert 0 < wrong[0].sum() < 64


def test_a_radius_of_zero_and_bad_answers_leave_the_image():
    learn = {eps: jax.jit(attack_of(eps=eps).learn) for eps in (0.0, 0.1)}
    for eps, fill in ((0.0, 1.0), (0.1, jnp.nan), (0.1, 0.0)):
        state = attack_of(eps=eps).start(KEY, IMAGE[0], jnp.zeros(5), jnp.int32(0), jnp.int32(0))
        for _ in range(8):
            state = learn[eps](state, Answer(jnp.zeros(5), jnp.asarray(fill), jnp.full(SHAPE, fill)))
            np.testing.assert_array_equal(state.x, IMAGE[0])


def test_too_few_classes_and_too_many_targets_are_named():
    label = jnp.int32(0)
    with pytest.raises(ValueError, match=r"^num_targets is 5: must be <= 4"):
        attack_of(objective="targeted_dlr", num_targets=5).start(KEY, IMAGE[0], jnp.zeros(5), label, label)
    assert OBJECTIVES["dlr"].min_classes == 3
    search = attack_of(objective="dlr")
    with pytest.raises(ValueError, match=r"^number of classes is 2: must be >= 3 for dlr"):
        run(search, num_slots=2)(KEY, lambda x: logits_fn(x)[:, :2], IMAGE, LABEL * 0, LABEL >= 0)


@pytest.mark.parametrize(
    ("setting", "bad"),
    [("norm", "l0"), ("eps", -1.0), ("num_steps", 0), ("objective", "x"), ("num_restarts", 2), ("num_targets", 2)],
)
def test_a_bad_setting_is_named(setting, bad):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        attack_of(**{setting: bad})
