"""PGD with momentum against a NumPy loop, and with its cycle detection against itself without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import momentum_pgd, objectives, run
from fedrobust.types import Answer

SHAPE = (4, 3, 1)
KEY = jax.random.key(2)
RNG = np.random.default_rng(3)
HIDDEN, OUT = RNG.normal(size=(12, 6)), RNG.normal(size=(6, 3))
IMAGE = RNG.uniform(0.2, 0.8, size=(40, *SHAPE)).astype(np.float32)


def logits_fn(x):
    return jnp.tanh(x.reshape(len(x), -1) @ HIDDEN.astype(np.float32)) @ OUT.astype(np.float32)


LABEL = np.asarray(logits_fn(IMAGE).argmax(1))


def attack_of(norm="linf", eps=0.1, **settings):
    defaults = {"step_size": 0.03, "num_steps": 6, "momentum": 0.75, "random_start": False}
    return momentum_pgd(norm=norm, eps=eps, **{**defaults, **settings})


def points(search, image, label, num):
    """What a search asks about, `num` times."""

    def ask(x):
        logits = logits_fn(x[None])[0]
        return objectives.cross_entropy(logits, label), logits

    def step(state, _):
        x = search.point(state)
        (value, logits), gradient = jax.value_and_grad(ask, has_aux=True)(x)
        return search.learn(state, Answer(logits, value, gradient)), x

    state = search.start(KEY, image, logits_fn(image[None])[0], label, jnp.int32(0))
    return jax.lax.scan(step, state, length=num)[1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_equal_a_numpy_loop(norm):
    def oracle(x0, y, eps=0.1, step_size=0.03, share=0.75):
        x, m = x0, 0 * x0
        for _ in range(7):
            yield x
            hidden = np.tanh(x.ravel() @ HIDDEN)
            z = np.exp(hidden @ OUT)
            g = (HIDDEN @ ((OUT @ (z / z.sum() - np.eye(3)[y])) * (1 - hidden**2))).reshape(x.shape)
            m = share * m + g / np.abs(g).mean()
            if norm == "linf":
                x = np.clip(x + step_size * np.sign(m), x0 - eps, x0 + eps)
            else:
                x = x + step_size * m / np.linalg.norm(m)
                x = x0 + (x - x0) * min(1, eps / np.linalg.norm(x - x0))
            x = np.clip(x, 0, 1)

    asked = jax.jit(jax.vmap(lambda x, y: points(attack_of(norm), x, y, 7)))(IMAGE[:8], LABEL[:8])
    expected = [list(oracle(x.astype(np.float64), y)) for x, y in zip(IMAGE, LABEL[:8], strict=False)]
    np.testing.assert_allclose(asked, expected, atol=2e-5)


@pytest.mark.parametrize(("eps", "momentum"), [(0.05, 0.0), (0.12, 0.25)])
def test_cycle_detection_changes_no_result_and_saves_questions(eps, momentum):
    plain, detecting = (
        jax.jit(lambda search=search: run(search, num_slots=16)(KEY, logits_fn, IMAGE, LABEL, LABEL >= 0))()
        for search in (
            attack_of(eps=eps, momentum=momentum, num_steps=60, detect_cycles=flag) for flag in (False, True)
        )
    )
    np.testing.assert_array_equal(plain.wrong, detecting.wrong)
    np.testing.assert_allclose(plain.image, detecting.image, atol=1e-6)
    assert detecting.num_queries.sum() < 0.7 * plain.num_queries.sum()
    assert 0 < plain.wrong.sum() < 40


def test_a_cycle_is_told_from_a_point_that_comes_back_with_another_momentum():
    """The point is back after every two steps, but the sixth pair alone has the momentum of the first."""
    search = attack_of(eps=1.0, momentum=0.0, step_size=0.125)
    state, learn = (
        search.start(KEY, jnp.full(SHAPE, 0.5), jnp.zeros(3), jnp.int32(0), jnp.int32(0)),
        jax.jit(search.learn),
    )
    ends = []
    for step in range(32):
        gradient = jnp.full(SHAPE, 1.0).at[0, 0, 0].set(3.0 + step // 2 % 6) * (-1) ** step
        state = learn(state, Answer(jnp.zeros(3), jnp.zeros(()), gradient))
        ends.append(bool(search.ended(state)))
    assert ends.index(True) == 15 + 12 - 1  # remembered after 15 steps, back 12 steps later


def test_targets_and_restarts_are_tries_of_their_own():
    search = attack_of(objective="targeted_margin", num_targets=2, num_restarts=3, random_start=True)
    assert search.num_tries == 6
    states = [
        search.start(jax.random.fold_in(KEY, r), IMAGE[0], jnp.asarray([1.0, 3.0, 2.0]), jnp.int32(1), jnp.int32(r))
        for r in range(6)
    ]
    assert [int(state.target) for state in states] == [2, 2, 2, 0, 0, 0]
    assert len({float(state.x[0, 0, 0]) for state in states}) == 6


def test_a_nan_gradient_moves_nothing():
    search = attack_of()
    state = search.start(KEY, IMAGE[0], jnp.zeros(3), jnp.int32(0), jnp.int32(0))
    state = search.learn(state, Answer(jnp.zeros(3), jnp.nan, jnp.full(SHAPE, jnp.nan)))
    np.testing.assert_array_equal(state.x, IMAGE[0])


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("norm", "l3"),
        ("eps", -0.1),
        ("step_size", float("inf")),
        ("num_steps", 0),
        ("momentum", 1.1),
        ("objective", "hinge"),
        ("num_restarts", 2),
        ("num_targets", 2),
    ],
)
def test_a_bad_setting_is_named(setting, bad):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        attack_of(**{setting: bad})
