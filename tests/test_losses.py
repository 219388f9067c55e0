"""Laws of losses over several views of one record, alone and under clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import data, losses
from fedrobust.attacks import pgd
from fedrobust.defenses import adversarial_loss
from fedrobust.privacy import RELATIONS, clipped_grad
from fedrobust.types import Batch

KEY = jax.random.key(0)
SIZE, NUM_VIEWS, CLIP_NORM = 4, 3, 0.5


def linear(params, image):
    return image.reshape(len(image), -1) @ params["w"]


LOSS = losses.cross_entropy(linear)
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(16, 3)).astype(np.float32)}
IMAGE = RNG.uniform(size=(SIZE, 4, 4, 1)).astype(np.float32)
VIEWS = RNG.uniform(size=(SIZE, NUM_VIEWS, 4, 4, 1)).astype(np.float32)
LABEL = np.array([0, 2, 1, 2], np.int32)
ONES = np.ones(SIZE, bool)


def as_they_are(key, image):
    return image


def repeated(key, image):
    return jnp.stack([image] * NUM_VIEWS, axis=1)


def vector(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def gradient_in_float64(image, label):
    """[12 * 4]: of softmax cross-entropy in the weights, by the textbook formula."""
    x, w = image.astype(np.float64).ravel(), PARAMS["w"].astype(np.float64)
    p = np.exp(x @ w - (x @ w).max())
    return np.outer(x, p / p.sum() - np.eye(3)[label]).ravel()


def clipped(gradient):
    return gradient * min(1, CLIP_NORM / np.linalg.norm(gradient))


def test_equal_views_are_one_view():
    got = losses.mean_over_views(LOSS, repeated)(KEY, PARAMS, IMAGE, LABEL)
    np.testing.assert_allclose(got, LOSS(KEY, PARAMS, IMAGE, LABEL), rtol=1e-6)


def test_the_loss_of_a_record_is_the_mean_of_its_views():
    got = losses.mean_over_views(LOSS, as_they_are)(KEY, PARAMS, VIEWS, LABEL)
    expected = [LOSS(KEY, PARAMS, VIEWS[i], np.repeat(LABEL[i], NUM_VIEWS)).mean() for i in range(SIZE)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("setting", [{}, {"method": "norms_first", "microbatch_size": 2}])
def test_views_are_averaged_before_one_clip(setting):
    """Against float64, and against what views as rows, or a clip per view, would give."""
    grad = clipped_grad(losses.mean_over_views(LOSS, as_they_are), clip_norm=CLIP_NORM, **setting)
    total, info = jax.jit(grad)(KEY, PARAMS, Batch(VIEWS, LABEL, ONES))
    per_view = np.array([[gradient_in_float64(VIEWS[i, k], LABEL[i]) for k in range(NUM_VIEWS)] for i in range(SIZE)])
    mean = per_view.mean(axis=1)
    np.testing.assert_allclose(info.norm, np.linalg.norm(mean, axis=1), rtol=1e-5)
    np.testing.assert_allclose(vector(total), sum(map(clipped, mean)), rtol=1e-4, atol=1e-6)
    each = sum(clipped(g) for record in per_view for g in record)
    for wrong in (each, each / NUM_VIEWS):
        assert np.abs(vector(total) - wrong).max() > 1e-3


def test_one_record_of_many_views_moves_the_sum_by_no_more_than_the_clip_norm():
    grad = clipped_grad(losses.mean_over_views(LOSS, repeated), clip_norm=1e-3)
    assert [grad.sensitivity(relation) for relation in RELATIONS] == [1e-3, 2e-3, 1e-3]
    run = jax.jit(grad)
    whole, without = (vector(run(KEY, PARAMS, Batch(IMAGE, LABEL, mask))[0]) for mask in (ONES, np.arange(SIZE) > 0))
    assert 0.999e-3 < np.linalg.norm(whole - without) <= 1e-3 * (1 + 1e-6)


def test_random_views_of_an_augmentation_differ_by_record_and_by_view():
    make_views = losses.random_views(data.random_shift(2), num_views=NUM_VIEWS)
    same = np.repeat(IMAGE[:1], SIZE, axis=0)
    views = np.asarray(make_views(KEY, same))
    assert views.shape == (SIZE, NUM_VIEWS, 4, 4, 1)
    assert len({view.tobytes() for record in views for view in record}) > SIZE
    fewer = np.asarray(losses.random_views(data.random_shift(2), num_views=2)(KEY, same[:3]))
    np.testing.assert_array_equal(fewer, views[:3, :2])
    assert (views != np.asarray(make_views(jax.random.key(1), same))).any()


def test_views_and_attack_and_clip_compose():
    """Augmented, attacked, averaged, clipped: one vector for one record, which no other record moves by one bit."""
    attack = pgd(norm="linf", eps=0.1, step_size=0.05, num_steps=2, random_start=True)
    loss = adversarial_loss(LOSS, linear, attack, clean_share=0.5)
    loss = losses.mean_over_views(loss, losses.random_views(data.random_shift(1), num_views=NUM_VIEWS))
    run = jax.jit(clipped_grad(loss, clip_norm=CLIP_NORM))
    batch = Batch(IMAGE, LABEL, ONES)
    neighbour = batch._replace(image=np.where(np.arange(SIZE)[:, None, None, None] == 1, 1 - IMAGE, IMAGE))
    for i in range(SIZE):
        alone = (np.arange(SIZE) == i).astype(np.float32)
        before, after = (vector(run(KEY, PARAMS, b, alone)[0]) for b in (batch, neighbour))
        assert (before == after).all() == (i != 1)
        assert 0 < np.linalg.norm(before) <= CLIP_NORM


@pytest.mark.parametrize("make_views", [lambda key, image: image[None], lambda key, image: image[:, :0]])
def test_views_of_a_wrong_shape_are_named(make_views):
    with pytest.raises(ValueError, match=r"^views is .*: must be of shape \[B, K, ...\], K >= 1$"):
        losses.mean_over_views(LOSS, make_views)(KEY, PARAMS, VIEWS, LABEL)


def test_no_views_at_all_are_refused():
    with pytest.raises(ValueError, match=r"^num_views is 0"):
        losses.random_views(data.random_flip(), num_views=0)
