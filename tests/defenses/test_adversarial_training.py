"""Laws of adversarial training as a transformation of a loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import pgd
from fedrobust.defenses import adversarial_loss
from fedrobust.losses import cross_entropy

KEY = jax.random.key(3)
IMAGE = np.random.default_rng(0).uniform(size=(6, 3, 2, 1)).astype(np.float32)
LABEL = np.arange(6) % 3
PARAMS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)


def apply(params, x):
    return jnp.sin(2 * x.reshape(x.shape[0], -1)) @ params


def attack(eps=0.1, norm="linf"):
    return pgd(norm=norm, eps=eps, step_size=eps / 2, num_steps=3, random_start=False)


def build(share, **changes):
    return adversarial_loss(
        **{"loss": cross_entropy(apply), "apply": apply, "attack": attack()} | changes, clean_share=share
    )


def test_loss_and_gradient_are_those_of_the_fixed_sample():
    """The loss at the attack's result for the same parameters; nothing flows through the attack."""
    l2 = attack(0.5, "l2")  # the sign of "linf" would hide a gradient through the attack
    sample = l2(KEY, lambda x: apply(PARAMS, x), IMAGE, LABEL)
    clean, robust = (lambda p, x=x: cross_entropy(apply)(KEY, p, x, LABEL) for x in (IMAGE, sample))
    for share in (0.0, 0.3, 1.0):

        def expected(p, share=share):
            return share * clean(p) + (1 - share) * robust(p)

        mixed = build(share, attack=l2)
        np.testing.assert_allclose(mixed(KEY, PARAMS, IMAGE, LABEL), expected(PARAMS), rtol=1e-5)
        gradient = jax.jit(jax.jacobian(lambda p, mixed=mixed: mixed(KEY, p, IMAGE, LABEL)))(PARAMS)
        np.testing.assert_allclose(gradient, jax.jacobian(expected)(PARAMS), rtol=1e-4, atol=1e-6)
    assert (robust(PARAMS) > clean(PARAMS)).all()


def test_no_clean_pass_at_share_zero_and_no_attack_at_one():
    passes = []

    def counted(key, params, image, label):
        passes.append(image)
        return cross_entropy(apply)(key, params, image, label)

    def forbidden(*args):
        raise AssertionError("attacked")

    for share, copies in ((0.0, 1), (0.5, 2)):
        passes.clear()
        build(share, loss=counted)(KEY, PARAMS, IMAGE, LABEL)
        assert [len(images) for images in passes] == [copies * len(IMAGE)]
    build(1.0, attack=forbidden)(KEY, PARAMS, IMAGE, LABEL)


def test_attack_and_loss_draw_from_streams_of_their_own():
    seen = []

    def noted(key, params, image, label):
        seen.append(tuple(jax.random.key_data(key).tolist()))
        return jnp.zeros(len(image))

    def still(key, logits_fn, image, label):
        noted(key, None, image, label)
        return image

    for share in (0.0, 0.5):
        seen.clear()
        build(share, loss=noted, attack=still)(KEY, PARAMS, IMAGE, LABEL)
        assert len({*seen, tuple(jax.random.key_data(KEY).tolist())}) == 3


def test_per_example_gradients_sum_to_the_gradient_of_the_batch():
    loss = build(0.25)

    def one(p, x, y):
        return loss(KEY, p, x[None], y[None])[0]

    single = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(PARAMS, IMAGE, LABEL)
    whole = jax.grad(lambda p: loss(KEY, p, IMAGE, LABEL).sum())(PARAMS)
    np.testing.assert_allclose(single.sum(0), whole, rtol=1e-4, atol=1e-6)


def test_loss_of_an_example_feels_no_other_image():
    jacobian = jax.jacobian(lambda x: build(0.5)(KEY, PARAMS, x, LABEL))(jnp.asarray(IMAGE))
    other = ~np.eye(6, dtype=bool)
    assert not np.asarray(jacobian)[other].any()
    assert np.asarray(jacobian)[~other].any()


def test_a_radius_warm_up_inside_a_scan_compiles_once():
    @jax.jit
    def losses(radii):
        def step(carry, eps):
            return carry, build(0.0, attack=attack(eps))(KEY, PARAMS, IMAGE, LABEL).mean()

        return jax.lax.scan(step, 0, radii)[1]

    found = losses(jnp.asarray([0.0, 0.05, 0.1, 0.2]))
    np.testing.assert_allclose(found[0], cross_entropy(apply)(KEY, PARAMS, IMAGE, LABEL).mean(), rtol=1e-5)
    np.testing.assert_allclose(found[2], build(0.0)(KEY, PARAMS, IMAGE, LABEL).mean(), rtol=1e-5)
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_bad_share_is_named(share):
    with pytest.raises(ValueError, match=r"^clean_share is "):
        build(share)
