"""Laws of robust accuracy: the closed form of a linear model; for each check a model or an attack that fails it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import fgsm, pgd
from fedrobust.evaluation import Threat, evaluate
from fedrobust.types import Dataset

KEY = jax.random.key(0)
RADII = (0.02, 0.05, 8 / 255)
WEIGHT = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
IMAGE = np.random.default_rng(2).uniform(0.2, 0.8, size=(40, 3, 2, 1)).astype(np.float32)
LABEL = np.where(np.random.default_rng(3).uniform(size=40) < 0.1, 0, 1) ^ ((IMAGE.reshape(40, 6) @ WEIGHT).argmax(1))
DATASET = Dataset(IMAGE, LABEL.astype(np.int32), 2)


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params


def fgsm_linf(eps):
    return fgsm(norm="linf", eps=eps)


def pgd_linf(eps):
    return pgd(norm="linf", eps=eps, step_size=eps / 4, num_steps=8, random_start=True)


def pgd_l2(eps):
    return pgd(norm="l2", eps=eps, step_size=eps / 4, num_steps=30, random_start=True)


def nothing(eps):
    return lambda key, logits_fn, image, label: image


THREATS = (Threat("fgsm", "linf", RADII, 1, 1, fgsm_linf), Threat("pgd", "linf", RADII, 8, 1, pgd_linf))


def passed(result):
    return {check["check"]: check["passed"] for check in result.checks}


def test_linear_model_gets_its_closed_form_robust_accuracy():
    threats = (*THREATS, Threat("pgd", "l2", (0.05,), 30, 1, pgd_l2))
    result = evaluate(linear, WEIGHT, DATASET, threats, KEY, 16)
    margin = (IMAGE.reshape(40, 6) @ WEIGHT.astype(np.float64)) @ [1, -1] * np.where(LABEL == 0, 1, -1)
    direction = WEIGHT.astype(np.float64) @ [1, -1]
    for norm, eps, dual in [*(("linf", e, 1) for e in RADII), ("l2", 0.05, 2)]:
        right = margin > eps * np.linalg.norm(direction, dual)
        entry = result.robust[f"worst_{norm}_{eps:.2g}"]
        assert entry["accuracy"] == pytest.approx(right.mean())
        assert entry["balanced_accuracy"] == pytest.approx(np.mean([right[c == LABEL].mean() for c in (0, 1)]))
    assert all(passed(result).values()) and len(result.checks) == 5
    entry = result.robust["pgd8_linf_0.031"]
    assert (entry["norm"], entry["eps"], entry["steps"], entry["restarts"]) == ("linf", 8 / 255, 8, 1)
    assert (result.robust["worst_l2_0.05"]["steps"], result.robust["worst_l2_0.05"]["restarts"]) == (None, None)
    assert set(result.robust) == {
        f"{a}_linf_{e}" for a in ("fgsm", "pgd8", "worst") for e in ("0.02", "0.05", "0.031")
    } | {
        "pgd30_l2_0.05",
        "worst_l2_0.05",
    }


def test_batch_size_changes_nothing_and_a_second_model_compiles_nothing():
    shapes = []

    def counted(params, x):
        shapes.append(x.shape)
        return linear(params, x)

    first = evaluate(counted, WEIGHT, DATASET, THREATS[1:], KEY, 40)
    num_traces = len(shapes)
    evaluate(counted, -WEIGHT, DATASET, THREATS[1:], KEY, 40)
    assert len(shapes) == num_traces
    assert evaluate(counted, WEIGHT, DATASET, THREATS[1:], KEY, 16).robust == first.robust


def test_each_example_draws_its_own_stream_whatever_the_batch_size():
    """32 fair coins: all equal with probability 5e-10."""

    def noise(eps):
        return lambda key, logits_fn, image, label: image + eps * jax.random.uniform(key, image.shape, minval=-1)

    def apply(params, x):
        return jnp.concatenate([x[:, 0, 0] - 0.5, 0.5 - x[:, 0, 0]], axis=1)

    same = Dataset(np.full((32, 1, 1, 1), 0.5, np.float32), np.zeros(32, np.int32), 2)
    threats = [Threat("noise", "linf", (0.5,), 1, 1, noise)]
    found = [evaluate(apply, (), same, threats, KEY, size).robust["noise_linf_0.5"]["accuracy"] for size in (5, 32)]
    assert 0 < found[0] == found[1] < 1


def test_worst_case_is_the_union_per_example_and_clean_mistakes_stay():
    def only(parity):
        def attack(key, logits_fn, image, label):
            hit = (image[:, 0, 0, 0] > 0.5) == parity
            return jnp.where(hit[:, None, None, None], jnp.clip(image + 2 * (0.5 - image), 0, 1), image)

        return lambda eps: attack

    image = np.random.default_rng(5).uniform(0.3, 0.7, (20, 1, 1, 1)).astype(np.float32)
    label = (image[:, 0, 0, 0] > 0.5).astype(np.int32)
    label[0] = 1 - label[0]  # wrong on the clean image; the flip would make it right

    def apply(params, x):
        return jnp.concatenate([0.5 - x[:, 0, 0], x[:, 0, 0] - 0.5], axis=1)

    threats = [Threat(name, "linf", (0.5,), 1, 1, only(parity)) for name, parity in (("a", True), ("b", False))]
    robust = evaluate(apply, (), Dataset(image, label, 2), threats, KEY, 20).robust
    assert robust["worst_linf_0.5"]["accuracy"] == 0.0
    assert robust["a_linf_0.5"]["accuracy"] + robust["b_linf_0.5"]["accuracy"] == pytest.approx(0.95)


def test_a_rounding_model_fails_the_gradient_check():
    result = evaluate(lambda p, x: linear(p, jnp.round(x * 9) / 9), WEIGHT, DATASET, THREATS[:1], KEY, 40)
    assert not passed(result)["input_gradients_not_zero"]


def test_probabilities_in_place_of_logits_are_noticed():
    result = evaluate(lambda p, x: jax.nn.softmax(linear(p, x)), WEIGHT, DATASET, THREATS[:1], KEY, 40)
    assert not passed(result)["logits_are_not_probabilities"]


def test_attacks_that_are_weaker_than_they_should_be_are_noticed():
    lazy = (THREATS[0], Threat("pgd", "linf", RADII, 8, 1, nothing))
    assert not passed(evaluate(linear, WEIGHT, DATASET, lazy, KEY, 40))["pgd_at_least_as_strong_as_fgsm"]
    inverse = (Threat("fgsm", "linf", RADII, 1, 1, lambda eps: fgsm_linf(0.02 * 0.02 / eps)),)
    assert not passed(evaluate(linear, WEIGHT, DATASET, inverse, KEY, 40))["success_rises_with_eps"]


def test_samples_outside_their_ball_are_noticed():
    too_far = (Threat("fgsm", "linf", (0.02,), 1, 1, lambda eps: fgsm_linf(2 * eps)),)
    assert not passed(evaluate(linear, WEIGHT, DATASET, too_far, KEY, 40))["samples_inside_ball"]
    out_of_range = (Threat("x", "linf", (0.5,), 1, 1, lambda eps: lambda key, logits_fn, image, label: image - 0.4),)
    assert not passed(evaluate(linear, WEIGHT, DATASET, out_of_range, KEY, 40))["samples_inside_ball"]


@pytest.mark.parametrize("threats", [(), (THREATS[0], THREATS[0]), (THREATS[0]._replace(eps=(0.0,)),)])
def test_bad_threats_are_refused(threats):
    with pytest.raises(ValueError):
        evaluate(linear, WEIGHT, DATASET, threats, KEY, 40)
