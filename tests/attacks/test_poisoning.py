"""Laws of poisoned training data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust.attacks import adversarial_samples, flip_labels, pgd
from fedrobust.types import Batch, Cohort


def cohort(xp, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    label = xp.asarray(rng.integers(0, num_classes, (3, 2, 4)), dtype=xp.int32)
    batch = Batch(xp.asarray(rng.uniform(size=(3, 2, 4, 2, 2, 1))), label, xp.asarray(np.ones((3, 2, 4), bool)))
    return Cohort(xp.arange(3), xp.ones(3), xp.asarray([False, True, True]), batch)


@pytest.mark.parametrize("xp", [np, jnp])
@settings(max_examples=10)
@given(num_classes=st.integers(2, 7), seed=st.integers(0, 99))
def test_flipping_mirrors_labels_of_malicious_clients_only(xp, num_classes, seed):
    before = cohort(xp, num_classes, seed)
    flip = flip_labels(num_classes)
    after = flip(before)
    assert isinstance(after.batch.label, type(before.batch.label)) and after.batch.label.dtype == np.int32
    np.testing.assert_array_equal(after.batch.label[0], before.batch.label[0])
    np.testing.assert_array_equal(after.batch.label[1:], num_classes - 1 - np.asarray(before.batch.label)[1:])
    np.testing.assert_array_equal(flip(after).batch.label, before.batch.label)
    assert after.batch.image is before.batch.image and after.weight is before.weight


def test_one_class_cannot_be_flipped():
    with pytest.raises(ValueError, match=r"^num_classes is 1"):
        flip_labels(1)


def test_adversarial_samples_replace_images_only():
    weight = jnp.asarray([[1.0, -1.0]] * 4)
    batch = Batch(jnp.full((3, 2, 2, 1), 0.5), jnp.asarray([0, 1, 0]), jnp.asarray([True, True, False]))
    attack = pgd(norm="linf", eps=0.25, step_size=0.25, num_steps=1, random_start=False)
    poisoned = jax.jit(lambda b: adversarial_samples(attack)(jax.random.key(0), lambda x: x.reshape(3, 4) @ weight, b))(
        batch
    )
    np.testing.assert_allclose(poisoned.image[:, 0, 0, 0], [0.25, 0.75, 0.25])
    np.testing.assert_array_equal(poisoned.label, batch.label)
    np.testing.assert_array_equal(poisoned.mask, batch.mask)
