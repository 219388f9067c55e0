"""Laws of robust accuracy: the closed form of a linear model, the union of attacks, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta

from fedrobust import attacks
from fedrobust.evaluation import Threat, evaluate, is_overestimated
from fedrobust.types import Dataset, Found

KEY = jax.random.key(0)
RADII = (0.02, 0.05, 8 / 255)
WEIGHT = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
IMAGE = np.random.default_rng(2).uniform(0.2, 0.8, size=(40, 3, 2, 1)).astype(np.float32)
LABEL = np.where(np.random.default_rng(3).uniform(size=40) < 0.1, 0, 1) ^ ((IMAGE.reshape(40, 6) @ WEIGHT).argmax(1))
DATASET = Dataset(IMAGE, LABEL.astype(np.int32), 2)


def linear(params, x):
    return x.reshape(x.shape[0], -1) @ params


def pgd(norm, num_steps):
    def attack(eps):
        search = attacks.momentum_pgd(
            norm=norm, eps=eps, step_size=eps / 4, num_steps=num_steps, momentum=0.0, random_start=True
        )
        return attacks.run(search, num_slots=16)

    return attack


def by_hand(sample):
    """An attack of one question: `(keys[N], logits_fn, image, label, eps) -> image`."""

    def attack(eps):
        def run(key, logits_fn, image, label, todo):
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(label)))
            x = jnp.where(todo[:, None, None, None], sample(keys, image, eps), image)
            wrong = todo & (jnp.argmax(logits_fn(x), axis=1) != label)
            return Found(x, wrong, todo.astype(jnp.int32))

        return run

    return attack


PGD, PGD_L2 = pgd("linf", 8), pgd("l2", 30)
THREATS = (Threat("pgd", "linf", RADII, 8, 1, PGD),)
NOTHING = by_hand(lambda keys, image, eps: image)


def outcome(result):
    return {check["check"]: check["outcome"] for check in result.checks}


@pytest.mark.parametrize("cascade", [False, True])
def test_linear_model_gets_its_closed_form_robust_accuracy(cascade):
    threats = (*THREATS, Threat("pgd", "l2", (0.05,), 30, 1, PGD_L2))
    result = evaluate(linear, WEIGHT, DATASET, threats, KEY, 16, cascade=cascade)
    margin = (IMAGE.reshape(40, 6) @ WEIGHT.astype(np.float64)) @ [1, -1] * np.where(LABEL == 0, 1, -1)
    direction = WEIGHT.astype(np.float64) @ [1, -1]
    for norm, eps, dual in [*(("linf", e, 1) for e in RADII), ("l2", 0.05, 2)]:
        right = margin > eps * np.linalg.norm(direction, dual)
        entry = result.robust[f"worst_{norm}_{eps:.2g}"]
        assert entry["accuracy"] == pytest.approx(right.mean())
        assert entry["balanced_accuracy"] == pytest.approx(np.mean([right[c == LABEL].mean() for c in (0, 1)]))
        assert (result.broken[norm, eps] == ~right).all()
        low, high = entry["interval"]
        count = right.sum()
        assert low == pytest.approx(beta.ppf(0.025, count, 41 - count))
        assert high == pytest.approx(beta.ppf(0.975, count + 1, 40 - count))
    assert set(outcome(result).values()) <= {"passed", "not applicable"} and not is_overestimated(result.checks)
    entry = result.robust["pgd8_linf_0.031"]
    assert (entry["norm"], entry["eps"], entry["steps"], entry["restarts"]) == ("linf", 8 / 255, 8, 1)
    assert (result.robust["worst_l2_0.05"]["steps"], result.robust["worst_l2_0.05"]["restarts"]) == (None, None)
    names = {f"{a}_linf_{e}" for a in ("pgd8", "worst") for e in ("0.02", "0.05", "0.031")}
    assert set(result.robust) == names | {"pgd30_l2_0.05", "worst_l2_0.05"}


def test_radius_zero_is_the_clean_accuracy_and_a_second_model_compiles_nothing():
    shapes = []

    def counted(params, x):
        shapes.append(x.shape)
        return linear(params, x)

    threats = (Threat("pgd", "linf", (0.0,), 8, 1, PGD),)
    clean = float(np.mean(linear(WEIGHT, IMAGE).argmax(1) == LABEL))
    assert 0 < clean < 1
    result = evaluate(counted, WEIGHT, DATASET, threats, KEY, 40, cascade=False)
    assert result.robust["worst_linf_0"]["accuracy"] == clean
    num_traces = len(shapes)
    result = evaluate(counted, -WEIGHT, DATASET, threats, KEY, 40, cascade=False)
    assert result.robust["worst_linf_0"]["accuracy"] == pytest.approx(1 - clean)
    assert len(shapes) == num_traces


def threshold(params, x):
    return jnp.concatenate([0.5 - x[:, 0, 0], x[:, 0, 0] - 0.5], axis=1)


@pytest.mark.parametrize("cascade", [False, True])
def test_worst_case_is_the_union_per_example_and_clean_mistakes_stay(cascade):
    def only(parity):
        def flip(keys, image, eps):
            hit = (image > 0.5) == parity
            return jnp.where(hit, jnp.clip(image + 2 * (0.5 - image), 0, 1), image)

        return by_hand(flip)

    image = np.random.default_rng(5).uniform(0.3, 0.7, (20, 1, 1, 1)).astype(np.float32)
    label = (image[:, 0, 0, 0] > 0.5).astype(np.int32)
    label[0] = 1 - label[0]  # wrong on the clean image; the flip would make it right
    threats = [Threat(name, "linf", (0.5,), 1, 1, only(parity)) for name, parity in (("a", True), ("b", False))]
    robust = evaluate(threshold, (), Dataset(image, label, 2), threats, KEY, 20, cascade=cascade).robust
    assert robust["worst_linf_0.5"]["accuracy"] == 0.0
    own = robust["a_linf_0.5"]["accuracy"], robust["b_linf_0.5"]["accuracy"]
    assert (own[1] == 0) if cascade else (sum(own) == pytest.approx(0.95))


def test_a_cascade_tries_at_a_smaller_radius_only_what_a_larger_one_has_broken():
    seen = []

    def spying(eps):
        def run(key, logits_fn, image, label, todo):
            jax.debug.callback(lambda todo: seen.append(int(todo.sum())), todo)
            return PGD(eps)(key, logits_fn, image, label, todo)

        return run

    threats = [Threat("spy", "linf", (0.02, 0.05), 8, 1, spying)]
    result = evaluate(linear, WEIGHT, DATASET, threats, KEY, 40, cascade=True)
    jax.effects_barrier()
    clean = int(np.sum(linear(WEIGHT, IMAGE).argmax(1) == LABEL))
    left = round(40 * result.robust["worst_linf_0.05"]["accuracy"])
    assert seen == [clean, clean - left] and left > 0


def test_samples_outside_their_ball_and_successes_that_are_none_are_noticed():
    def failed(attack, eps=0.02):
        result = evaluate(linear, WEIGHT, DATASET, [Threat("x", "linf", (eps,), 1, 1, attack)], KEY, 40, cascade=False)
        return {name for name, found in outcome(result).items() if found == "failed"}

    assert failed(by_hand(lambda keys, image, eps: image + 2 * eps)) == {"samples_inside_ball"}
    assert failed(by_hand(lambda keys, image, eps: image - 0.4), 0.5) == {"samples_inside_ball"}
    assert "samples_inside_ball" in failed(by_hand(lambda keys, image, eps: image + jnp.nan))

    def boasting(eps):
        return lambda key, logits_fn, image, label, todo: Found(image, todo, todo.astype(jnp.int32))

    assert failed(boasting) == {"success_is_reproduced"}


@pytest.mark.parametrize(("excess", "outcome"), [(6e-6, "passed"), (2e-5, "failed")])
def test_what_rounding_may_add_to_a_distance_grows_with_the_radius(excess, outcome):
    def sample(keys, image, eps):
        return image + jnp.where(image < 0.5, 1, -1) * eps * (1 + excess) / 6  # of six pixels

    result = evaluate(
        linear, WEIGHT, DATASET, [Threat("x", "l1", (2.9,), 1, 1, by_hand(sample))], KEY, 40, cascade=False
    )
    [check] = [check for check in result.checks if check["check"] == "samples_inside_ball"]
    assert check["outcome"] == outcome


def test_one_success_of_forty_lost_to_rounding_is_no_failure():
    def boasting(eps):
        def run(key, logits_fn, image, label, todo):
            return Found(image, todo & (jnp.cumsum(todo) == 1), todo.astype(jnp.int32))

        return run

    result = evaluate(linear, WEIGHT, DATASET, [Threat("x", "linf", (0.1,), 1, 1, boasting)], KEY, 40, cascade=False)
    [check] = [check for check in result.checks if check["check"] == "success_is_reproduced"]
    assert (check["outcome"], check["figure"]) == ("passed", pytest.approx(1 / 40))


def test_attacks_that_are_weaker_than_they_should_be_are_noticed():
    def failed(*threats):
        result = evaluate(linear, WEIGHT, DATASET, threats, KEY, 40, cascade=False)
        return {name for name, found in outcome(result).items() if found == "failed"}

    fgsm = Threat("fgsm", "linf", (0.2,), 1, 1, pgd("linf", 1))
    assert failed(fgsm, Threat("pgd", "linf", (0.2,), 8, 1, PGD)) == set()
    assert failed(fgsm, Threat("pgd", "linf", (0.2,), 8, 1, NOTHING)) == {"pgd_at_least_as_strong_as_fgsm"}

    def shrinking(eps):
        return PGD(0.02 * 0.02 / eps)

    assert failed(Threat("pgd", "linf", (0.02, 0.2), 8, 1, shrinking)) == {"success_rises_with_eps"}


def failed_by(*threats):
    result = evaluate(linear, WEIGHT, DATASET, threats, KEY, 40, cascade=False)
    return {name for name, found in outcome(result).items() if found == "failed"}


def test_distances_are_those_of_the_norm_and_the_box_has_two_ends():
    def moved(norm, eps, sample):
        return failed_by(Threat("x", norm, (eps,), 1, 1, by_hand(sample)))

    assert moved("linf", 0.5, lambda key, image, eps: image + 0.4) == {"samples_inside_ball"}
    assert moved("linf", 0.5, lambda key, image, eps: image - 0.4) == {"samples_inside_ball"}
    assert moved("l2", 0.05, lambda key, image, eps: image + eps / 6**0.5) == set()
    assert moved("l2", 0.05, lambda key, image, eps: image + eps) == {"samples_inside_ball"}


def test_attacks_of_another_norm_radius_or_number_of_steps_are_not_compared():
    def one_step(eps):
        search = attacks.momentum_pgd(
            norm="linf", eps=eps, step_size=eps, num_steps=1, momentum=0.0, random_start=False
        )
        return attacks.run(search, num_slots=16)

    fgsm = Threat("fgsm", "linf", (0.05,), 1, 1, one_step)
    assert failed_by(fgsm, Threat("pgd", "l2", (0.05,), 30, 1, PGD_L2)) == set()
    assert failed_by(fgsm, Threat("pgd", "linf", (0.02,), 8, 1, PGD)) == set()
    weak = Threat("pgd", "linf", (0.06,), 1, 1, NOTHING)
    assert failed_by(Threat("pgd", "linf", (0.05,), 8, 1, PGD), weak) == set()


@pytest.mark.parametrize(
    ("threats", "message"),
    [
        ((), r"threats is \[\]"),
        ((THREATS[0], THREATS[0]), "threats is"),
        ((THREATS[0]._replace(eps=(-0.1,)),), "eps of pgd8_linf_-0.1 is"),
        ((THREATS[0]._replace(norm="l0"),), "norm of pgd8_l0_.* is 'l0': must be one of l1, l2, linf"),
        ((THREATS[0]._replace(eps=(0.031,)), THREATS[0]._replace(family="idle", eps=(8 / 255,))), "eps is"),
        ((Threat("worst", "linf", (0.05,), 1, 1, NOTHING), THREATS[0]), "threats is"),
        ((THREATS[0], THREATS[0]._replace(family="idle", eps=(0.02,))), "eps of the linf threats is"),
    ],
)
def test_bad_threats_are_refused(threats, message):
    """The last: what withstands a cascade's first threat at a large radius, its second would not be asked about."""
    with pytest.raises(ValueError, match=f"^{message}[^\\n]*$"):
        evaluate(linear, WEIGHT, DATASET, threats, KEY, 40, cascade=True)


@pytest.mark.parametrize(
    ("change", "apply", "message"),
    [
        ({"image": IMAGE * 255}, linear, "the range of images is"),
        ({"image": IMAGE - 0.5}, linear, "the range of images is"),
        ({"image": np.where(IMAGE > 0.7, np.nan, IMAGE)}, linear, "the range of images is"),
        ({"label": LABEL + 1}, linear, "label is"),
        ({"label": LABEL - 1}, linear, "label is"),
        ({}, lambda p, x: linear(p, x) * jnp.nan, "the number of images whose logits are NaN or inf is 40"),
        (
            {},
            lambda p, x: linear(p, x) + jnp.array([0, jnp.inf]),
            "the number of images whose logits are NaN or inf is",
        ),
        ({}, lambda p, x: jax.nn.softmax(linear(p, x)), "the share of outputs that are probabilities is"),
    ],
)
def test_what_robustness_has_no_meaning_for_is_one_clear_error(change, apply, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        evaluate(apply, WEIGHT, DATASET._replace(**change), THREATS, KEY, 40, cascade=False)
    assert "\n" not in str(error.value)
