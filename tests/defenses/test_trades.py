"""Laws of TRADES against the paper's loop in NumPy float64, a hand-worked case, and wrong versions of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import pgd
from fedrobust.defenses import trades_loss
from fedrobust.losses import cross_entropy

KEY = jax.random.key(3)
COMPILED = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
IMAGE = np.random.default_rng(0).uniform(0.3, 0.7, size=(5, 3, 2, 1)).astype(np.float32)
LABEL = np.arange(5) % 3
PARAMS = 3 * np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
BETA = 2.5


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params


def attack(objective, *, eps=0.2, num_steps=4):
    return pgd(
        norm="linf", eps=eps, step_size=0.03, num_steps=num_steps, random_start=False, keep_best=False,
        objective=objective,
    )  # fmt: skip


def build(apply=linear, attack=attack, **changes):
    return trades_loss(apply, attack, **{"beta": BETA, "start_stddev": 0.001} | changes)


def value(**changes):
    return COMPILED(build(**changes))(KEY, PARAMS, IMAGE, LABEL)


def share(params, x):
    logits = x.reshape(len(x), -1).astype(np.float64) @ params.astype(np.float64)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def paper_sample(noise, num_steps=4):
    """Algorithm 1 in float64, ascending from image + noise; the ball and the box are never reached."""
    p, x = share(PARAMS, IMAGE), IMAGE.astype(np.float64) + noise
    for _ in range(num_steps):
        gradient = (share(PARAMS, x) - p) @ PARAMS.T.astype(np.float64)
        x = x + 0.03 * np.sign(gradient).reshape(x.shape)
    return x


def noise_of(key):
    rows = [jax.random.normal(jax.random.fold_in(jax.random.split(key)[1], i), (3, 2, 1)) for i in range(5)]
    return 0.001 * np.stack(rows).astype(np.float64)


def test_divergence_by_hand():
    """Clean shares (1/2, 1/2), adversarial (9/10, 1/10): ln 2 + 2.5 (ln(5/9) + ln 5) / 2."""

    def apply(params, x):
        return jnp.stack([params * x[:, 0, 0, 0], 0 * x[:, 0, 0, 0]], 1)

    image = np.zeros((1, 1, 1, 1), np.float32)
    loss = build(apply, lambda objective: lambda key, logits_fn, image, label: image + 1, start_stddev=0.0)
    np.testing.assert_allclose(
        loss(KEY, np.float32(np.log(9)), image, np.array([0])), [0.693147 + 2.5 * 0.510826], rtol=1e-5
    )


def test_the_loss_is_that_of_the_papers_loop():
    noise = noise_of(KEY)
    p, q = share(PARAMS, IMAGE), share(PARAMS, paper_sample(noise) - noise)
    expected = -np.log(p[np.arange(5), LABEL]) + BETA * np.sum(p * np.log(p / q), axis=1)
    np.testing.assert_allclose(value(), expected, rtol=2e-4)
    assert np.sum(p * np.log(p / q), axis=1).min() > 0.01


def of_sample(kl, sample):
    """The loss at a fixed sample, as a function of the parameters."""

    def loss(params):
        p, q = (jax.nn.log_softmax(linear(params, x)) for x in (IMAGE, sample))
        return cross_entropy(linear)(KEY, params, IMAGE, LABEL) + BETA * kl(p, q)

    return loss


def divergence(p, q):
    return jnp.sum(jnp.exp(p) * (p - q), axis=1)


@functools.cache
def gradients():
    sample = (paper_sample(noise_of(KEY)) - noise_of(KEY)).astype(np.float32)
    found = COMPILED(jax.jacobian(lambda params: build()(KEY, params, IMAGE, LABEL)))(PARAMS)
    return sample, np.asarray(found)


def test_its_gradient_runs_through_both_predictions_and_not_through_the_attack():
    sample, found = gradients()
    np.testing.assert_allclose(found, jax.jacobian(of_sample(divergence, sample))(PARAMS), rtol=1e-3, atol=1e-4)


WRONG = {
    "the other way round": lambda p, q: divergence(q, p),
    "no gradient of the clean prediction": lambda p, q: divergence(jax.lax.stop_gradient(p), q),
    "no gradient of the adversarial prediction": lambda p, q: divergence(p, jax.lax.stop_gradient(q)),
    "a mean over classes": lambda p, q: divergence(p, q) / 3,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_divergence_has_another_gradient(name):
    """So that the test above can tell them apart."""
    sample, found = gradients()
    assert np.abs(found - jax.jacobian(of_sample(WRONG[name], sample))(PARAMS)).max() > 0.01


def test_nothing_flows_through_an_attack_that_forgets_to_stop_it():
    def leaky(objective):
        return lambda key, logits_fn, image, label: image + 0.01 * jax.nn.softmax(logits_fn(image))[:, :1, None, None]

    sample = IMAGE + 0.01 * share(PARAMS, IMAGE)[:, :1, None, None].astype(np.float32)
    found = jax.jacobian(lambda params: build(attack=leaky, start_stddev=0.0)(KEY, params, IMAGE, LABEL))(PARAMS)
    np.testing.assert_allclose(found, jax.jacobian(of_sample(divergence, sample))(PARAMS), rtol=1e-3, atol=1e-5)


def test_at_radius_zero_only_the_clean_loss_is_left():
    still = value(attack=functools.partial(attack, eps=0.0, num_steps=1))
    np.testing.assert_allclose(still, cross_entropy(linear)(KEY, PARAMS, IMAGE, LABEL), atol=1e-5)


def test_the_sample_lies_in_the_attacks_ball_and_box_whatever_the_noise():
    seen = []

    def watched(params, x):
        seen.append(x)
        return linear(params, x)

    image = np.round(IMAGE)  # at the edges of the box
    build(watched, functools.partial(attack, eps=0.05, num_steps=3), start_stddev=0.5)(KEY, PARAMS, image, LABEL)
    sample = np.asarray(seen[-1])[5:]
    assert np.abs(sample - image).max() <= 0.05 + 1e-6 and sample.min() >= 0 and sample.max() <= 1
    assert (sample != image).any()


def test_the_attack_never_shows_the_model_anything_outside_the_box():
    seen = []

    def watched(params, x):
        seen.append(np.asarray(x))
        return linear(params, x)

    def look(objective):
        return lambda key, logits_fn, image, label: (logits_fn(image), image)[1]

    image = np.round(IMAGE)  # at the edges of the box
    build(watched, look, start_stddev=0.5)(KEY, PARAMS, image, LABEL)
    assert [len(x) for x in seen] == [5, 5, 10]
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)
    assert (seen[1] != image).any()


def test_no_attack_at_beta_zero_and_an_objective_of_its_own_is_welcome():
    def forbidden(objective):
        raise AssertionError("attacked")

    clean = cross_entropy(linear)(KEY, PARAMS, IMAGE, LABEL)
    np.testing.assert_allclose(value(attack=forbidden, beta=0.0), clean, rtol=1e-5)
    own = pgd(norm="l2", eps=0.3, step_size=0.3, num_steps=1, random_start=False, keep_best=False)
    assert (value(attack=lambda _: own) > clean).all()
    doubled = value(beta=0.0, clean_loss=lambda logits, label: 2 * logits[:, 0])
    np.testing.assert_allclose(doubled, 2 * linear(PARAMS, IMAGE)[:, 0], rtol=1e-6)


def test_saturated_predictions_give_finite_losses_and_gradients():
    total, gradient = COMPILED(jax.value_and_grad(lambda p: build()(KEY, p, IMAGE, LABEL).sum()))(1e4 * PARAMS)
    assert np.isfinite(total) and np.isfinite(gradient).all()


@pytest.mark.parametrize("setting", [{"beta": -1.0}, {"start_stddev": -0.1}, {"beta": float("nan")}])
def test_a_bad_setting_is_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=rf"^{name} is "):
        build(**setting)
