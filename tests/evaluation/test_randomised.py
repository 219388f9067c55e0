"""A randomised model averaged over fixed draws: as a loop says, whatever the batch, with a verdict like any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import attacks
from fedrobust.evaluation import Threat, averaged, evaluate, gate
from fedrobust.types import Dataset
from tests.evaluation.gate_checks import PROBE

KEY = jax.random.key(3)
RNG = np.random.default_rng(1)
WEIGHT = RNG.normal(size=(16, 2)).astype(np.float32)
IMAGE = RNG.uniform(0.2, 0.8, size=(40, 4, 4, 1)).astype(np.float32)
EPS, STDDEV = 0.05, 0.3


def noisy(params, key, x):
    """Gaussian noise on the image, as randomised defenses add it."""
    return (x + STDDEV * jax.random.normal(key, x.shape) - 0.5).reshape(len(x), -1) @ params


MEAN = averaged(noisy, KEY, num_samples=7)


def by_loop(image):
    """A linear model of the image plus the mean of the draws' noise, in float64."""
    draws = [jax.random.normal(jax.random.fold_in(KEY, s), (1, 4, 4, 1)) for s in range(7)]
    shift = STDDEV * np.mean(np.asarray(draws, np.float64), axis=0)
    return (image + shift - 0.5).reshape(len(image), -1) @ WEIGHT.astype(np.float64)


def test_logits_are_the_mean_over_the_draws_whatever_the_batch():
    found = jax.jit(MEAN)(WEIGHT, IMAGE)
    np.testing.assert_allclose(found, by_loop(IMAGE), atol=1e-5)
    for rows in (slice(5, 6), slice(39, 10, -3)):
        np.testing.assert_allclose(MEAN(WEIGHT, IMAGE[rows]), found[rows], atol=1e-6)


def test_a_gradient_is_the_mean_of_the_draws_gradients():
    def bent(params, key, x):
        return jnp.tanh(noisy(params, key, x))

    keys = [jax.random.fold_in(KEY, s) for s in range(3)]

    def total(f):
        return jax.grad(lambda x: jnp.sum(f(x)[:, 0]))(IMAGE[:1])

    found = total(lambda x: averaged(bent, KEY, num_samples=3)(WEIGHT, x))
    each = [total(lambda x, k=k: bent(WEIGHT, k, x)) for k in keys]
    np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-6)
    assert np.abs(each[0] - each[1]).max() > 1e-3


def test_a_randomised_model_has_a_robust_accuracy_and_a_verdict():
    """The mean is linear in the image: what its margins say, the attack finds; its draws are no defense to the gate."""
    label = by_loop(IMAGE).argmax(1)
    dataset = Dataset(IMAGE, label, 2)

    def search(eps):
        return attacks.auto_pgd(norm="linf", eps=eps, num_steps=10, random_start=True, objective="margin")

    threat = Threat("apgd", "linf", (EPS,), 10, 1, lambda eps: attacks.run(search(eps), num_slots=16))
    found = evaluate(MEAN, WEIGHT, dataset, [threat], KEY, 16, cascade=True)
    logits = by_loop(IMAGE)
    gap = np.take_along_axis(logits, label[:, None], 1) - np.take_along_axis(logits, 1 - label[:, None], 1)
    withstands = gap[:, 0] > EPS * np.abs(WEIGHT[:, 0] - WEIGHT[:, 1]).sum()
    np.testing.assert_array_equal(~found.broken["linf", EPS], withstands)
    assert 0 < withstands.sum() < 40
    probes = attacks.probes(norm="linf", num_steps=5, num_queries=50, num_slots=16)
    assert set(probes) == set(PROBE)
    asked = functools.partial(gate, MEAN, WEIGHT, dataset, probes, KEY, 16, norm="linf", eps=EPS)
    assert [check for check in asked(standing=withstands) if check["outcome"] == "failed"] == []


def test_no_draw_is_refused():
    with pytest.raises(ValueError, match=r"^num_samples is 0: must be a whole number >= 1$"):
        averaged(noisy, KEY, num_samples=0)
