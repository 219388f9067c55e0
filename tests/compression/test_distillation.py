"""Laws of distillation against NumPy float64, a hand-worked case, and wrong versions of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedrobust import losses, privacy
from fedrobust.attacks import pgd
from fedrobust.compression import distillation_loss
from fedrobust.types import Batch

KEY = jax.random.key(3)
IMAGE = np.random.default_rng(0).uniform(0.3, 0.7, size=(5, 3, 2, 1)).astype(np.float32)
LABEL = np.arange(5) % 3
STUDENT, TEACHER = 3 * np.random.default_rng(1).normal(size=(2, 6, 3)).astype(np.float32)
T = 2.5


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params


def teacher(x):
    return linear(TEACHER, x)


def attack(objective, *, num_steps=4):
    return pgd(
        norm="linf", eps=0.2, step_size=0.03, num_steps=num_steps, random_start=False, keep_best=False,
        objective=objective,
    )  # fmt: skip


def build(**changes):
    return distillation_loss(linear, teacher, **{"temperature": T, "label_share": 0.3} | changes)


def value(params=STUDENT, **changes):
    return jax.jit(build(**changes))(KEY, params, IMAGE, LABEL)


def log_share(params, x, temperature=1.0):
    logits = x.reshape(len(x), -1).astype(np.float64) @ params.astype(np.float64) / temperature
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def paper_term(sample, label_share=0.3):
    p, q = log_share(TEACHER, IMAGE, T), log_share(STUDENT, sample, T)
    soft = T**2 * np.sum(np.exp(p) * (p - q), axis=1)
    hard = -log_share(STUDENT, sample)[np.arange(5), LABEL]
    return label_share * hard + (1 - label_share) * soft


def paper_sample():
    """Ascent of the divergence in float64 from the clean image; the ball and the box are never reached."""
    p, x = np.exp(log_share(TEACHER, IMAGE, T)), IMAGE.astype(np.float64)
    for _ in range(4):
        gradient = T * (np.exp(log_share(STUDENT, x, T)) - p) @ STUDENT.T.astype(np.float64)
        x = x + 0.03 * np.sign(gradient).reshape(x.shape)
    return x


def test_by_hand():
    """Teacher (1/2, 1/2), student (9/10, 1/10) at T = 1: KL = (ln(5/9) + ln 5) / 2; the label's loss is ln(10/9)."""

    def student(params, x):
        return jnp.stack([params * x[:, 0, 0, 0], 0 * x[:, 0, 0, 0]], 1)

    loss = distillation_loss(student, lambda x: jnp.zeros((len(x), 2)), temperature=1.0, label_share=0.25)
    found = loss(KEY, np.float32(np.log(9)), np.ones((1, 1, 1, 1), np.float32), np.array([0]))
    np.testing.assert_allclose(found, [0.25 * 0.105361 + 0.75 * 0.510826], rtol=1e-5)


@pytest.mark.parametrize("label_share", [0.0, 0.3, 1.0])
def test_the_clean_loss_is_the_papers(label_share):
    np.testing.assert_allclose(value(label_share=label_share), paper_term(IMAGE, label_share), rtol=1e-4)


@pytest.mark.parametrize("label", [-1, 99])
def test_at_share_zero_labels_are_never_read(label):
    """Public images may have none, or those of other classes."""
    for settings in ({}, {"attack": attack, "clean_share": 0.5}):
        loss = jax.jit(build(label_share=0.0, **settings))
        expected, found = (loss(KEY, STUDENT, IMAGE, y) for y in (LABEL, np.full(5, label)))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("clean_share", [0.0, 0.25, 1.0])
def test_the_adversarial_loss_is_the_papers_at_the_papers_sample(clean_share):
    expected = clean_share * paper_term(IMAGE) + (1 - clean_share) * paper_term(paper_sample())
    np.testing.assert_allclose(value(attack=attack, clean_share=clean_share), expected, rtol=1e-3)
    assert (paper_term(paper_sample(), 0.0) > paper_term(IMAGE, 0.0) + 0.01).all()


def of_sample(sample, kl):
    def loss(params):
        logits = linear(params, sample)
        p, q = jax.nn.log_softmax(teacher(IMAGE) / T), jax.nn.log_softmax(logits / T)
        return 0.3 * optax.softmax_cross_entropy_with_integer_labels(logits, LABEL) + 0.7 * kl(p, q)

    return jax.jacobian(loss)(STUDENT)


@functools.cache
def gradient():
    return np.asarray(jax.jacobian(lambda params: build(attack=attack)(KEY, params, IMAGE, LABEL))(STUDENT))


def test_its_gradient_runs_through_the_student_at_the_sample_alone():
    sample = paper_sample().astype(np.float32)
    right = of_sample(sample, lambda p, q: T**2 * jnp.sum(jnp.exp(p) * (p - q), axis=1))
    np.testing.assert_allclose(gradient(), right, rtol=1e-3, atol=1e-3)


WRONG = {
    "the other way round": lambda p, q: T**2 * jnp.sum(jnp.exp(q) * (q - p), axis=1),
    "not scaled by the squared temperature": lambda p, q: jnp.sum(jnp.exp(p) * (p - q), axis=1),
    "a mean over classes": lambda p, q: T**2 * jnp.mean(jnp.exp(p) * (p - q), axis=1),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_divergence_has_another_gradient(name):
    """So that the test above can tell them apart."""
    assert np.abs(gradient() - of_sample(paper_sample().astype(np.float32), WRONG[name])).max() > 0.01


def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn():
    def total(params):
        return jnp.sum(build(label_share=0.0)(KEY, params, IMAGE, LABEL))

    found, slope = jax.value_and_grad(total)(TEACHER)
    np.testing.assert_allclose(found, 0, atol=1e-5)
    np.testing.assert_allclose(slope, 0, atol=1e-5)
    assert (value(label_share=0.0) > 0.01).all()


def test_a_teacher_that_is_never_needed_is_never_run():
    """Adversarial training is what is left then: the attack is on the label's loss."""

    def never(image):
        pytest.fail("asked")

    settings = {"temperature": T, "label_share": 1.0}
    found = distillation_loss(linear, never, **settings)(KEY, STUDENT, IMAGE, LABEL)
    np.testing.assert_allclose(found, losses.cross_entropy(linear)(KEY, STUDENT, IMAGE, LABEL), rtol=1e-5)
    found = distillation_loss(linear, never, attack=attack, **settings)(KEY, STUDENT, IMAGE, LABEL)
    of_label = attack(optax.softmax_cross_entropy_with_integer_labels)
    sample = of_label(KEY, lambda x: linear(STUDENT, x), IMAGE, LABEL)
    np.testing.assert_allclose(found, losses.cross_entropy(linear)(KEY, STUDENT, sample, LABEL), rtol=1e-5)


def test_records_stay_apart_and_a_private_gradient_is_clipped_record_by_record():
    loss = build(attack=attack, clean_share=0.5)
    privacy.require_isolated(loss, KEY, STUDENT, IMAGE, LABEL)
    clipped = privacy.clipped_grad(loss, clip_norm=0.1, microbatch_size=2)
    total, _ = clipped(KEY, STUDENT, Batch(IMAGE, LABEL, np.array([True, True, True, False, False])))
    single = [jax.grad(lambda p, i=i: loss(KEY, p, IMAGE[i : i + 1], LABEL[i : i + 1])[0])(STUDENT) for i in range(3)]
    expected = sum(0.1 * g / max(0.1, np.linalg.norm(g)) for g in map(np.asarray, single))
    np.testing.assert_allclose(total, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "setting", [{"temperature": 0.0}, {"temperature": float("nan")}, {"label_share": 1.5}, {"clean_share": -0.1}]
)
def test_a_bad_setting_is_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=rf"^{name} is "):
        build(**setting)
