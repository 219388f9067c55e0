"""Losses that tie records together are found and refused; losses that do not are left in peace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedrobust import losses, models
from fedrobust.attacks import fgsm, pgd
from fedrobust.defenses import adversarial_loss
from fedrobust.privacy import coupling, require_isolated

KEY = jax.random.key(0)
SIZE = 4


def apply(params, image):
    return jnp.tanh(image.reshape(len(image), -1) @ params["w"]) @ params["v"]


def make_records(seed=0, shape=(4, 4, 1)):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(SIZE, *shape)).astype(np.float32), np.array([0, 1, 2, 1], np.int32)


def make_params():
    rng = np.random.default_rng(1)
    return {"w": rng.normal(size=(16, 5)).astype(np.float32), "v": rng.normal(size=(5, 3)).astype(np.float32)}


PARAMS = make_params()
LOSS = losses.cross_entropy(apply)


def batch_norm(key, params, image, label):
    x = image.reshape(len(image), -1) @ params["w"]
    x = (x - x.mean(axis=0)) / jnp.sqrt(x.var(axis=0) + 1e-5)
    return losses.cross_entropy(lambda params, x: jnp.tanh(x) @ params["v"])(key, params, x, label)


def mean_subtracted(key, params, image, label):
    return LOSS(key, params, image - image.mean(axis=0), label)


def mixup(key, params, image, label):
    return LOSS(key, params, 0.7 * image + 0.3 * image[::-1], label)


def shuffled_mixup(key, params, image, label):
    place = jax.random.permutation(key, len(image))
    return 0.7 * LOSS(key, params, image, label) + 0.3 * LOSS(key, params, image[place], label[place])


def attacked_by(find):
    def attack(key, logits_fn, image, label):
        def total(x):
            value = losses.cross_entropy(lambda _, x: logits_fn(x))(key, None, x, label)
            return jnp.sum(value)

        return lax.stop_gradient(find(jax.grad(total), image))

    return adversarial_loss(LOSS, apply, attack, clean_share=0.5)


def batch_normalised_step(gradient, image):
    def step(_, x):
        g = gradient(x)
        return jnp.clip(x + 0.1 * g / jnp.sqrt(jnp.sum(g**2)), 0, 1)

    return lax.fori_loop(0, 2, step, image)


def universal_perturbation(gradient, image):
    def step(_, delta):
        return jnp.clip(delta + 0.02 * jnp.sign(gradient(image + delta).sum(axis=0)), -0.1, 0.1)

    return image + lax.fori_loop(0, 3, step, jnp.zeros(image.shape[1:]))


def contrastive(key, params, image, label):
    x = image.reshape(len(image), -1) @ params["w"]
    x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    return -jnp.diag(jax.nn.log_softmax(x @ (x + 0.1).T))


def coupled_in_the_gradient_only(key, params, image, label):
    value = LOSS(key, params, image, label)
    return value + lax.stop_gradient(image.mean()) * (value - lax.stop_gradient(value))


def coupled_in_the_value_only(key, params, image, label):
    return LOSS(key, params, image, label) + image.mean()


COUPLED = {
    "batch statistics": batch_norm,
    "inputs minus their mean": mean_subtracted,
    "mixup with the reversed batch": mixup,
    "mixup with a shuffled batch": shuffled_mixup,
    "a step normalised over the batch": attacked_by(batch_normalised_step),
    "one perturbation for all": attacked_by(universal_perturbation),
    "contrastive": contrastive,
    "coupled in the gradient only": coupled_in_the_gradient_only,
    "coupled in the value only": coupled_in_the_value_only,
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_loss_is_refused_in_one_line(name):
    image, label = make_records()
    with pytest.raises(ValueError, match=r"^loss\[\d\] or its gradient moves by \S+ when record \d is replaced: ") as e:
        require_isolated(COUPLED[name], KEY, PARAMS, image, label)
    assert "\n" not in str(e.value)


def test_derivatives_alone_would_not_see_a_universal_perturbation():
    """Why records are replaced: the perturbation stands under `stop_gradient`."""
    image, label = make_records()
    loss = attacked_by(universal_perturbation)
    jacobian = jax.jacobian(lambda x: loss(KEY, PARAMS, x, label))(image).reshape(SIZE, SIZE, -1)
    assert all(not jacobian[i, j].any() for i in range(SIZE) for j in range(SIZE) if i != j)


def test_the_matrix_says_who_moves_whom():
    """Record i takes part of record i + 1 in: replacing j moves j and j - 1."""
    image, label = make_records()

    def loss(key, params, image, label):
        return LOSS(key, params, image + 0.5 * jnp.roll(image, -1, axis=0), label)

    found = np.asarray(coupling(loss, KEY, PARAMS, image, label)) > 1e-5
    expected = np.eye(SIZE, dtype=bool) | np.roll(np.eye(SIZE, dtype=bool), 1, axis=1)
    assert found.tolist() == expected.tolist()


RANDOM_PGD = pgd(norm="linf", eps=0.2, step_size=0.1, num_steps=3, random_start=True)
ISOLATED = {
    "cross-entropy": LOSS,
    "FGSM": adversarial_loss(LOSS, apply, fgsm(norm="l2", eps=0.3), clean_share=0.5),
    "PGD from a random start": adversarial_loss(LOSS, apply, RANDOM_PGD, clean_share=0.3),
    "views": losses.mean_over_views(
        adversarial_loss(LOSS, apply, RANDOM_PGD, clean_share=0.0), lambda _, x: jnp.stack([x, x[:, ::-1]], axis=1)
    ),
}


@pytest.mark.parametrize("name", ISOLATED)
def test_an_isolated_loss_passes(name):
    require_isolated(ISOLATED[name], KEY, PARAMS, *make_records())


def test_records_that_do_not_meet_move_each_other_by_no_bit():
    moved = np.array(coupling(ISOLATED["PGD from a random start"], KEY, PARAMS, *make_records(1)))
    assert moved.diagonal().all()
    np.fill_diagonal(moved, 0)
    assert not moved.any()


@pytest.mark.parametrize("name", models.registry.SPECS)
def test_every_model_of_the_registry_passes(name):
    image, label = make_records(shape=(8, 8, 1))
    model = models.build(name, image_shape=(8, 8, 1), num_classes=3, width=4, groups=2)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, image)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.3).astype(np.float32), shapes)
    require_isolated(losses.cross_entropy(model.apply), KEY, params, image[:3], label[:3])


def test_tokens_are_records_too():
    def loss(key, params, image, label):
        return jnp.sum((params["table"][image["tokens"]].mean(axis=1) - label[:, None]) ** 2, axis=1)

    image = {"tokens": np.arange(SIZE * 3).reshape(SIZE, 3) % 5}
    params = {"table": np.arange(10.0, dtype=np.float32).reshape(5, 2)}
    label = np.arange(SIZE, dtype=np.float32)
    require_isolated(loss, KEY, params, image, label)
    with pytest.raises(ValueError, match="moves by"):
        require_isolated(lambda k, p, x, y: loss(k, p, x, y - y.mean()), KEY, params, image, label)


def test_a_loss_that_knows_the_size_of_the_batch_is_refused():
    image, label = make_records()
    with pytest.raises(ValueError, match=r"^loss\[\d\] is \S+ in the batch and \S+ alone: "):
        require_isolated(lambda k, p, x, y: LOSS(k, p, x, y) / len(x), KEY, PARAMS, image, label)


def test_records_that_could_show_nothing_are_refused():
    image, label = make_records()
    with pytest.raises(ValueError, match=r"^records is 1: must be at least 2$"):
        require_isolated(LOSS, KEY, PARAMS, image[:1], label[:1])
    image[1], label[1] = image[2], label[2]
    with pytest.raises(ValueError, match=r"^records is 'with equal neighbours'"):
        coupling(LOSS, KEY, PARAMS, image, label)
    image[2] = np.nan
    with pytest.raises(ValueError, match=r"^loss is 'not finite'"):
        require_isolated(LOSS, KEY, PARAMS, image, label)
