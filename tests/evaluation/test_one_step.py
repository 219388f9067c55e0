"""A model that has learned to fool one step is told from one that is robust and from one that is merely weak."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import fgsm, pgd
from fedrobust.evaluation import one_step_gap
from fedrobust.types import Dataset

KEY = jax.random.key(0)
EPS = 0.2
rng = np.random.default_rng(0)
IMAGE = rng.uniform(0.25, 0.75, (40, 1, 1, 1)).astype(np.float32)
ATTACKS = {
    "one_step": fgsm(norm="linf", eps=EPS),
    "many_steps": pgd(norm="linf", eps=EPS, step_size=0.02, num_steps=20, random_start=False),
}
GAP = functools.partial(one_step_gap, max_gap=0.2, batch_size=16, **ATTACKS)


def model(margin):
    def apply(params, x):
        return jnp.concatenate([margin(x[:, 0, 0]), -margin(x[:, 0, 0])], axis=1)

    return apply


def data(image=IMAGE):
    return Dataset(image, np.zeros(len(image), np.int32), 2)


robust = model(lambda x: 2 + 0.1 * x)
weak = model(lambda x: x - 0.24)
# Above 0 at the image (0.5) and at both ends of its ball, below 0 between.
bent = model(lambda x: jnp.cos(2 * jnp.pi * (x - 0.49) / 0.2) + 0.5)


def test_gaps_by_hand():
    """A weak model is right under both attacks beyond 0.24 + EPS, where one step does all that many can do."""
    assert GAP(robust, (), data(), KEY) == (1.0, 1.0, 0.0, False)
    right = float(np.mean(IMAGE > 0.24 + EPS))
    one, many, gap, overfitted = GAP(weak, (), data(), KEY)
    assert (one, many) == pytest.approx((right, right)) and 0.2 < right < 0.8
    assert (gap, overfitted) == (0.0, False)
    assert GAP(bent, (), data(np.full((10, 1, 1, 1), 0.5, np.float32)), KEY) == (1.0, 0.0, 1.0, True)


def test_mistakes_on_clean_images_are_no_gap():
    """An attack that turns a mistake into a hit does not count, either way."""
    wrong = Dataset(IMAGE, np.ones(40, np.int32), 2)
    assert GAP(robust, (), wrong, KEY) == (0.0, 0.0, 0.0, False)


def test_the_gap_counts_examples_and_is_held_against_its_limit():
    image = np.full((10, 1, 1, 1), 0.5, np.float32)
    image[3:] = 0.9  # one step down to 0.7 and then no further, where the margin is above 0 throughout
    apply = model(lambda x: jnp.where(x < 0.7, jnp.cos(2 * jnp.pi * (x - 0.49) / 0.2) + 0.5, 1.0))
    found = GAP(apply, (), data(image), KEY)
    assert found.gap == pytest.approx(0.3) and found.overfitted
    assert not GAP(apply, (), data(image), KEY, max_gap=0.3).overfitted


def test_each_example_draws_its_own_stream_whatever_the_batch_size():
    def noise(key, logits_fn, image, label):
        return image + 0.3 * jax.random.uniform(key, image.shape, minval=-1)

    found = [GAP(weak, (), data(), KEY, many_steps=noise, batch_size=size) for size in (7, 40)]
    assert found[0] == found[1] and 0 < found[0].many_steps < 1


@pytest.mark.parametrize("setting", [{"max_gap": 1.0}, {"max_gap": -0.1}, {"batch_size": 0}])
def test_a_bad_setting_is_named(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=rf"^{name} is "):
        GAP(robust, (), data(), KEY, **setting)
    with pytest.raises(ValueError, match=r"^the number of examples is 0"):
        GAP(robust, (), data(IMAGE[:0]), KEY)


def test_a_mistake_that_an_attack_turns_into_a_hit_counts_for_neither():
    wrong = Dataset(IMAGE, (IMAGE[:, 0, 0, 0] > 0.24).astype(np.int32), 2)  # class 0 there: none is right
    helps, stays = (lambda key, f, image, label: image * 0), (lambda key, f, image, label: image)
    for pair in ({"one_step": helps, "many_steps": stays}, {"one_step": stays, "many_steps": helps}):
        assert GAP(weak, (), wrong, KEY, **pair) == (0.0, 0.0, 0.0, False)
