"""Laws of FGSM and PGD, against closed forms on linear models and a NumPy loop on a curved one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust.attacks import fgsm, pgd

SHAPE = (4, 3, 1)
KEY = jax.random.key(7)
LABEL = np.arange(8) % 3


def linear(weight):
    return lambda x: x.reshape(x.shape[0], -1) @ weight


HIDDEN, OUT = (np.random.default_rng(1).normal(size=size).astype(np.float32) for size in ((12, 16), (16, 3)))


def curved(x):
    """Three classes, rows from their own image, curved enough that steps matter."""
    return jnp.sin(3 * x.reshape(x.shape[0], -1) @ HIDDEN) @ OUT


def images(num, seed=0, low=0.0, high=1.0):
    return jax.random.uniform(jax.random.key(seed), (num, *SHAPE), minval=low, maxval=high)


def attack_of(norm, eps=0.1, **settings):
    return pgd(**{"norm": norm, "eps": eps, "step_size": eps / 4, "num_steps": 5, "random_start": True, **settings})


def run(attack, image, label, logits_fn):
    return jax.jit(lambda x, y: attack(KEY, logits_fn, x, y))(image, label)


@functools.cache
def program(norm, **settings):
    """`attack_of` on the curved model, the radius traced: compiled once for all tests with the same settings."""
    return jax.jit(lambda eps, x, y: attack_of(norm, eps, **settings)(KEY, curved, x, y))


def value(image, label, logits_fn=curved):
    logits = logits_fn(image)
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, label)), np.asarray(logits).argmax(
        1
    ) != label


def test_fgsm_by_hand():
    image = jnp.asarray([0.5, 0.02, 0.98, 0.5]).reshape(1, 2, 2, 1)
    weight = jnp.asarray([[0.0, 2.0], [0.0, -1.0], [0.0, 3.0], [0.0, 0.0]])
    sample = fgsm(norm="linf", eps=0.1)(KEY, linear(weight), image, jnp.asarray([0]))
    np.testing.assert_allclose(sample.ravel(), [0.6, 0.0, 1.0, 0.5], atol=1e-6)
    sample = fgsm(norm="l2", eps=0.1)(KEY, linear(weight), image, jnp.asarray([0]))
    step = 0.1 / np.sqrt(14)
    np.testing.assert_allclose(sample.ravel(), [0.5 + 2 * step, 0.0, 1.0, 0.5], atol=1e-6)


def test_pgd_reaches_the_linf_optimum_of_a_linear_model():
    weight, image, label = np.random.default_rng(0).normal(size=(12, 2)), images(16), np.arange(16) % 2
    sample = run(attack_of("linf", num_steps=12), image, label, linear(jnp.asarray(weight, jnp.float32)))
    uphill = np.sign(weight[:, 1 - label] - weight[:, label]).T.reshape(image.shape)
    np.testing.assert_allclose(sample, np.clip(np.asarray(image, np.float64) + 0.1 * uphill, 0, 1), atol=1e-6)


def test_pgd_reaches_the_l2_optimum_of_a_linear_model():
    weight, image, label = np.random.default_rng(1).normal(size=(12, 2)), images(16, 0, 0.3, 0.7), np.arange(16) % 2
    sample = run(attack_of("l2", num_steps=60), image, label, linear(jnp.asarray(weight, jnp.float32)))
    uphill = (weight[:, 1 - label] - weight[:, label]).T
    uphill = (uphill / np.linalg.norm(uphill, axis=1, keepdims=True)).reshape(image.shape)
    np.testing.assert_allclose(sample, np.asarray(image, np.float64) + 0.1 * uphill, atol=2e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_equals_a_numpy_loop(norm):
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(12, 6)), rng.normal(size=(6, 3))
    image, label = np.asarray(images(5, 3, 0.2, 0.8), np.float64), np.arange(5) % 3

    def loss_and_gradient(x, y):
        hidden = np.tanh(x.ravel() @ first)
        logits = hidden @ second
        share = np.exp(logits - logits.max())
        share /= share.sum()
        gradient = first @ ((second @ (share - np.eye(3)[y])) * (1 - hidden**2))
        return -np.log(share[y]), gradient.reshape(x.shape), share.argmax() != y

    def oracle(x0, y, eps=0.3, step_size=0.07):
        x, best = x0, ((False, -np.inf), x0)
        for step in range(8):
            loss, gradient, wrong = loss_and_gradient(x, y)
            best = max(best, ((wrong, loss), x), key=lambda pair: pair[0])
            if step == 7:
                return best[1]
            if norm == "linf":
                x = np.clip(x + step_size * np.sign(gradient), x0 - eps, x0 + eps)
            else:
                x = x + step_size * gradient / np.linalg.norm(gradient)
                x = x0 + (x - x0) * min(1, eps / np.linalg.norm(x - x0))
            x = np.clip(x, 0, 1)

    def logits_fn(x):
        return jnp.tanh(x.reshape(len(x), -1) @ first.astype(np.float32)) @ second.astype(np.float32)

    attack = pgd(norm=norm, eps=0.3, step_size=0.07, num_steps=7, random_start=False)
    sample = run(attack, jnp.asarray(image, jnp.float32), label, logits_fn)
    np.testing.assert_allclose(sample, [oracle(x, y) for x, y in zip(image, label, strict=True)], atol=2e-5)


@pytest.mark.parametrize(("norm", "random_start"), [("linf", True), ("linf", False), ("l2", True)])
@settings(max_examples=20)
@given(eps=st.floats(0, 2), seed=st.integers(0, 99))
def test_samples_stay_in_the_ball_and_in_the_box(norm, random_start, eps, seed):
    image = np.random.default_rng(seed).uniform(size=(8, *SHAPE)).astype(np.float32)
    image[0], image[1] = 0, 1
    sample = np.asarray(program(norm, random_start=random_start)(eps, image, LABEL), np.float64)
    assert sample.min() >= 0 and sample.max() <= 1
    delta = (sample - image.astype(np.float64)).reshape(8, -1)
    if norm == "linf":
        assert np.abs(delta).max() <= np.float32(eps) + np.spacing(np.float32(1))
    else:
        assert np.linalg.norm(delta, axis=1).max() <= eps * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radius_zero_returns_the_image_exactly(norm):
    image = images(8).at[0, 0, 0, 0].set(0).at[0, 1, 0, 0].set(1)
    np.testing.assert_array_equal(program(norm, random_start=True)(0.0, image, LABEL), image)
    np.testing.assert_array_equal(run(fgsm(norm=norm, eps=0), image, LABEL, curved), image)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_gradient_leaves_the_image_and_nan_gradients_make_no_nan(norm):
    def constant(x):
        return jnp.zeros((len(x), 3)) + 0 * jnp.sum(x)

    def broken(x):
        return curved(x) + jnp.sqrt(-jnp.mean(x))

    image = images(8)
    np.testing.assert_array_equal(run(attack_of(norm, random_start=False), image, LABEL, constant), image)
    for keep_best in (True, False):
        sample = run(attack_of(norm, random_start=False, keep_best=keep_best), image, LABEL, broken)
        np.testing.assert_allclose(sample, image, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_l2_steps_have_their_length_for_tiny_and_huge_gradients(scale):
    image = images(3, 0, 0.4, 0.6)
    weight = scale * jax.random.normal(KEY, (12, 2))
    attack = pgd(
        norm="l2",
        eps=0.1,
        step_size=0.1,
        num_steps=1,
        random_start=False,
        keep_best=False,
        objective=lambda logits, label: logits[:, 1],
    )
    delta = np.asarray(run(attack, image, jnp.zeros(3, int), linear(weight)) - image).reshape(3, -1)
    np.testing.assert_allclose(np.linalg.norm(delta, axis=1), 0.1, rtol=1e-5)


def test_result_is_the_best_of_all_iterates():
    image, label, num_steps = images(12, 5), jnp.arange(12) % 3, 2
    long = {"norm": "linf", "eps": 0.4, "step_size": 0.3, "random_start": False}  # so the last is not always the best
    iterates = [image]
    for n in range(1, num_steps + 1):
        iterates.append(run(pgd(**long, num_steps=n, keep_best=False), image, label, curved))
    scores = [list(zip(*reversed(value(x, label)), strict=True)) for x in iterates]
    best = [max(range(num_steps + 1), key=lambda t, i=i: scores[t][i]) for i in range(12)]
    assert len(set(best)) > 1
    found = run(pgd(**long, num_steps=num_steps), image, label, curved)
    np.testing.assert_allclose(found, [iterates[t][i] for i, t in enumerate(best)], atol=1e-5)


def test_a_misclassified_iterate_beats_a_larger_objective():
    weight = jnp.asarray(np.linspace(-1, 1, 12)[:, None] * [[1.0, -1.0]], jnp.float32)
    image = images(8, 2)
    label = 1 - np.asarray(linear(weight)(image)).argmax(1)  # every clean image is wrong
    attack = attack_of(
        "linf",
        0.5,
        random_start=False,
        num_steps=10,
        objective=lambda z, y: -optax.softmax_cross_entropy_with_integer_labels(z, y),
    )
    sample = run(attack, image, label, linear(weight))
    assert (np.asarray(linear(weight)(sample)).argmax(1) != label).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_restarts_are_never_weaker(norm):
    better = 0
    for seed in range(4):
        image = images(8, seed)
        one, many = (value(program(norm, random_start=True, num_restarts=n)(0.1, image, LABEL), LABEL) for n in (1, 4))
        for loss, wrong, loss_of_many, wrong_of_many in zip(*one, *many, strict=True):
            assert (wrong_of_many, loss_of_many) >= (wrong, loss - 1e-5)
            better += (wrong_of_many, loss_of_many) > (wrong, loss + 1e-3)
    assert better > 0  # the other starts do lie elsewhere


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_example_feels_another(norm):
    image = images(8)
    a = program(norm, random_start=True)(0.1, image, LABEL)
    b = program(norm, random_start=True)(0.1, image.at[3].set(jnp.nan), np.where(np.arange(8) == 3, 1, LABEL))
    others = np.arange(8) != 3
    np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_prefix_of_a_batch_gives_the_prefix_of_the_result(norm):
    whole, part = (program(norm, random_start=True)(0.1, images(8)[:n], LABEL[:n]) for n in (8, 3))
    np.testing.assert_allclose(part, whole[:3], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_uniform_in_the_ball(norm):
    """2000 draws in 12 dimensions: means within 5 standard errors, false-failure rate below 1e-4."""
    image = jnp.full((2000, *SHAPE), 0.5)
    attack = pgd(norm=norm, eps=0.2, step_size=0.0, num_steps=1, random_start=True)
    delta = np.asarray(run(attack, image, jnp.zeros(2000, int), curved) - image, np.float64).reshape(2000, -1) / 0.2
    assert np.abs(delta.mean(0)).max() < 5 / np.sqrt(2000)
    radius = np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    volume = radius**12  # uniform in [0, 1] for a uniform draw from the ball
    assert abs(volume.mean() - 0.5) < 5 / np.sqrt(12 * 2000)
    assert abs(volume.var() - 1 / 12) < 0.01


def test_memory_does_not_grow_with_steps_or_restarts():
    def temporary_bytes(num_steps, num_restarts):
        attack = attack_of("linf", num_steps=num_steps, num_restarts=num_restarts)
        lowered = jax.jit(lambda x, y: attack(KEY, curved, x, y)).lower(images(64), jnp.zeros(64, int))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(40, 8) <= 1.05 * temporary_bytes(2, 2)


def test_a_traced_radius_compiles_once_and_equals_a_fixed_one():
    traces = []

    @jax.jit
    def warm(eps):
        traces.append(eps)
        return attack_of("linf", eps, random_start=False)(KEY, curved, images(8), LABEL)

    fixed = run(attack_of("linf", 0.05, random_start=False), images(8), LABEL, curved)
    np.testing.assert_allclose(warm(0.05), fixed, atol=1e-6)
    warm(0.3)
    assert len(traces) == 1


def test_per_example_vmap_equals_the_batch():
    attack = attack_of("linf", random_start=False)
    one_by_one = jax.vmap(lambda x, y: attack(KEY, curved, x[None], y[None])[0])(images(8), LABEL)
    np.testing.assert_allclose(one_by_one, program("linf", random_start=False)(0.1, images(8), LABEL), atol=1e-6)


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("norm", "l1"),
        ("eps", -0.1),
        ("eps", float("nan")),
        ("step_size", float("inf")),
        ("num_steps", 0),
        ("num_restarts", 0),
        ("num_restarts", 1.5),
    ],
)
def test_a_bad_setting_is_named(setting, bad):
    with pytest.raises(ValueError, match=f"^{setting} is "):
        attack_of("linf", **{setting: bad}) if setting != "norm" else attack_of(bad)


def test_restarts_that_would_be_equal_are_refused():
    with pytest.raises(ValueError, match="num_restarts"):
        attack_of("linf", num_restarts=2, random_start=False)
    with pytest.raises(ValueError, match="num_restarts"):
        attack_of("linf", num_restarts=2, keep_best=False)


def test_a_point_whose_logits_are_nan_is_not_the_best():
    def logits_fn(x):
        value = x[:, 0, 0, 0]
        return jnp.stack([2 - value, jnp.where(value > 0.5, jnp.nan, value)], 1)

    image = jnp.full((2, 2, 2, 1), 0.5)
    attack = pgd(norm="linf", eps=0.1, step_size=0.05, num_steps=3, random_start=False)
    found = jax.jit(lambda: attack(jax.random.key(0), logits_fn, image, jnp.zeros(2, int)))()
    np.testing.assert_array_equal(found, image)
