"""Laws of the measured lower bounds, and audits of the real private gradient, whole and broken.

An audit at 95 % confidence of a right mechanism is above its epsilon for at most one seed in 20. Seeds are fixed.
Counts of such failures over many seeds are held against a binomial's tail of 1e-6.
"""

import functools
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedrobust import data, intervals, losses, models
from fedrobust.privacy import (
    ClippedGrad,
    Event,
    Plan,
    Scores,
    auditing,
    clipped_grad,
    epsilon_clopper_pearson,
    epsilon_gaussian,
    epsilon_one_run,
    one_run_p_value,
    one_step_scores,
    private_grad,
    total_epsilon,
)
from fedrobust.types import Batch


def one_threshold(true_positives, num_inside, false_positives, num_outside):
    """Scores whose first tenth leaves one choice of threshold, and whose rest has these counts there."""
    inside = np.concatenate([np.ones(num_inside // 9), np.arange(num_inside) < true_positives])
    outside = np.concatenate([np.zeros(num_outside // 9), np.arange(num_outside) < false_positives])
    return Scores(inside, outside)


@pytest.mark.parametrize(
    ("counts", "delta", "expected"),
    [  # jax-privacy 2.0, CanaryScoreAuditor.epsilon_clopper_pearson(0.05, delta, one_sided=False), Explicit(0.5)
        ((90, 100, 10, 100), 0.0, 1.5421523947363345),
        ((500, 1000, 1, 1000), 1e-5, 4.4342150970909655),
        ((990, 1000, 700, 1000), 1e-3, 2.6934647221089936),
        ((10, 100, 9, 100), 0.0, 0.0),
    ],
)
def test_clopper_pearson_agrees_with_jax_privacy(counts, delta, expected):
    found = epsilon_clopper_pearson(one_threshold(*counts), delta=delta, confidence=0.95)
    assert found == pytest.approx(expected, abs=1e-9)


def test_clopper_pearson_by_hand():
    """No error in n = 20 of either kind: rates are at most 1 - 0.025^(1/20) = 0.1684, odds 0.8316 / 0.1684."""
    found = epsilon_clopper_pearson(one_threshold(20, 20, 0, 20), delta=0.1, confidence=0.95)
    rate = 1 - 0.025 ** (1 / 20)
    assert found == pytest.approx(math.log((0.9 - rate) / rate), abs=1e-9)


def test_the_gaussian_bound_by_hand():
    """No error in n = 40: half the sum of rates is at most 1 - 0.05^(1/40); then delta(epsilon)."""
    epsilon = epsilon_gaussian(one_threshold(20, 20, 0, 20), delta=0.01, confidence=0.95)
    mu = 2 * stats.norm.ppf(0.05 ** (1 / 40))
    delta = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    assert delta == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize(
    ("m", "r", "v", "significance", "delta", "p_value", "epsilon"),
    [  # jax-privacy 2.0, auditing._one_run_p_value at epsilon 1, and auditing._epsilon_one_run
        (100, 100, 90, 0.05, 0.0, 2.7358128007661584e-05, 1.6308231927421464),
        (100, 40, 38, 0.05, 1e-5, 0.0005903996996420689, 1.7399277035986198),
        (1000, 1000, 600, 0.05, 1e-5, 1.0, 0.2972269575896597),
        (1000, 200, 180, 0.01, 1e-4, 0.00436221922861441, 1.5375903507091258),
        (100, 50, 50, 0.05, 1e-3, 0.010584384517408703, 2.4812692334617927),
        (100, 50, 26, 0.05, 0.0, 0.9995801201285819, 0.0),
    ],
)
def test_one_run_agrees_with_jax_privacy(m, r, v, significance, delta, p_value, epsilon):
    assert one_run_p_value(m, r, v, epsilon=1.0, delta=delta) == pytest.approx(p_value, rel=1e-9)
    included = np.zeros(m, bool)  # of r guesses the v lowest are right: out, and out they were
    included[: r // 2] = True
    included[-(r // 2) :] = True
    included[: min(v, r // 2)] = False
    included[: max(0, r // 2 - v)] = True
    wrong_in = r // 2 - (v - min(v, r // 2))
    included[m - wrong_in :] = False
    found = epsilon_one_run(np.arange(m), included, delta=delta, confidence=1 - significance, num_guesses=[r])
    assert found == pytest.approx(epsilon, abs=2e-6)


def test_the_one_run_p_value_never_falls_in_epsilon_and_is_a_probability():
    for m, r, delta in itertools.product((20, 200), (2, 20), (0.0, 1e-4, 1e-2)):
        for v in (r // 2, r - 1, r):
            values = [one_run_p_value(m, r, v, epsilon=e, delta=delta) for e in np.linspace(0, 8, 40)]
            assert values == sorted(values)
            assert 0 <= values[0] <= values[-1] <= 1


def test_each_number_of_guesses_is_a_test_of_its_own_at_its_share_of_the_significance():
    """With two guesses of 100 canaries nothing is ever refuted at 97.5 %: a quarter of coins would guess as well."""
    included = np.arange(100) >= 50
    settings = {"delta": 0.0, "num_guesses": [100]}
    alone = epsilon_one_run(np.arange(100), included, confidence=0.975, **settings)
    both = epsilon_one_run(np.arange(100), included, confidence=0.95, **settings | {"num_guesses": [2, 100]})
    assert both == pytest.approx(alone, abs=2e-6)
    assert alone < epsilon_one_run(np.arange(100), included, confidence=0.95, **settings) - 0.1


def test_unequal_numbers_are_refused_where_both_kinds_are_counted_together():
    with pytest.raises(ValueError, match=r"^outside is "):
        epsilon_gaussian(Scores(np.ones(10), np.zeros(11)), delta=0.1, confidence=0.95)


def failures(bounds, epsilon):
    """Whether bounds exceed epsilon more often than one in 20, beyond chance of 1e-6."""
    return stats.binom.sf(sum(b > epsilon for b in bounds) - 1, len(bounds), 0.05) < 1e-6


MU, DELTA = 0.8, 1e-3


def one_gaussian(noise_multiplier, delta):
    """Epsilon of one Gaussian sum."""
    event = Event("gaussian", noise_multiplier)
    return total_epsilon([(event, 1)], relation="add_or_remove_one", delta=delta, accountant="pld")


GAUSSIAN_EPSILON = one_gaussian(1 / MU, DELTA)


def normal_scores(rng, num, mu=MU):
    return Scores(rng.normal(mu, 1, num), rng.normal(0, 1, num))


def test_bounds_on_a_gaussian_exceed_its_epsilon_as_rarely_as_they_say():
    rng = np.random.default_rng(0)
    many = [normal_scores(rng, 200) for _ in range(300)]
    for bound in (epsilon_gaussian, epsilon_clopper_pearson):
        bounds = [bound(s, delta=DELTA, confidence=0.95) for s in many]
        assert not failures(bounds, GAUSSIAN_EPSILON)
    assert np.median([epsilon_gaussian(s, delta=DELTA, confidence=0.95) for s in many]) > 0.25 * GAUSSIAN_EPSILON


def test_a_threshold_chosen_on_the_scores_it_is_counted_on_exceeds_epsilon_too_often():
    """Why they are split: the best of all thresholds on the same scores, at mu = 0, where every bound above 0 is."""
    rng = np.random.default_rng(0)

    def naive(scores):
        thresholds = np.unique(np.concatenate(scores))
        errors = auditing._errors(*scores, thresholds)
        return np.max(stats.norm.isf(intervals.upper(errors.false_positives + errors.false_negatives, 200, 0.5)))

    many = [normal_scores(rng, 100, mu=0.0) for _ in range(200)]
    assert np.mean([naive(s) > 1e-9 for s in many]) > 0.6  # at confidence 0.5
    held_out = [epsilon_gaussian(s, delta=DELTA, confidence=0.5) for s in many]
    assert stats.binom.sf(sum(b > 1e-9 for b in held_out) - 1, 200, 0.5) > 1e-6


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_one_run_bounds_on_randomised_response_are_valid_and_near(epsilon):
    """Each canary's coin, turned over with probability 1 / (1 + e^epsilon): exactly epsilon-DP."""
    rng = np.random.default_rng(1)
    bounds = []
    for _ in range(200):
        included = rng.random(1000) < 0.5
        answer = included ^ (rng.random(1000) < 1 / (1 + math.exp(epsilon)))
        scores = answer + 0.5 * rng.random(1000)
        bounds.append(epsilon_one_run(scores, included, delta=0.0, confidence=0.95, num_guesses=[200, 800]))
    assert not failures(bounds, epsilon)
    assert np.median(bounds) > epsilon - 0.35
    halved = np.array(bounds) > epsilon / 2  # claimed by a mechanism that is twice as bad
    assert halved.mean() > 0.5


def test_nothing_is_concluded_from_noise_or_from_wrong_guesses():
    rng = np.random.default_rng(2)
    scores, included = rng.normal(size=100), np.arange(100) % 2 == 0
    assert epsilon_one_run(scores, included, delta=1e-5, confidence=0.95, num_guesses=[10, 50, 100]) == 0
    backwards = Scores(np.arange(100) - 1000.0, np.arange(100) * 1.0)
    assert epsilon_gaussian(backwards, delta=1e-3, confidence=0.95) == 0
    same = Scores(np.zeros(100), np.zeros(100))
    for bound in (epsilon_gaussian, epsilon_clopper_pearson):
        assert bound(same, delta=1e-3, confidence=0.95) == 0


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"delta": 1.0}, "delta"),
        ({"confidence": 1.0}, "confidence"),
        ({"num_guesses": [3]}, "num_guesses"),
        ({"num_guesses": [12]}, "num_guesses"),
        ({"num_guesses": []}, "number of num_guesses"),
        ({"included": np.ones(3, bool)}, "included"),
        ({"scores": np.full(10, np.nan)}, "scores"),
    ],
)
def test_settings_of_a_one_run_audit_are_checked(changes, names):
    right = {"delta": 0.0, "confidence": 0.95, "num_guesses": [2]}
    right |= {"scores": np.arange(10.0), "included": np.ones(10, bool)}
    with pytest.raises(ValueError, match=f"^{names} is "):
        epsilon_one_run(**right | changes)


def test_settings_of_the_other_audits_are_checked():
    right = Scores(np.ones(10), np.zeros(10))
    for bound in (epsilon_gaussian, epsilon_clopper_pearson):
        for name, value in (("delta", 1.0), ("confidence", 0.0), ("confidence", 1.5)):
            with pytest.raises(ValueError, match=f"^{name} is "):
                bound(right, **{"delta": 0.1, "confidence": 0.95} | {name: value})
        with pytest.raises(ValueError, match=r"^inside is "):
            bound(Scores(np.ones(9), np.zeros(9)), delta=0.1, confidence=0.95)
        with pytest.raises(ValueError, match=r"^outside is "):
            bound(Scores(np.ones(10), np.append(np.zeros(9), np.nan)), delta=0.1, confidence=0.95)


PLAN = Plan(
    unit="record",
    relation="add_or_remove_one",
    sampling="poisson",
    sampling_rate=0.25,
    num_steps=1,
    noise_multiplier=1.2,
    histogram_epsilon=0.0,
    epsilon=8.0,
    delta=1e-5,
)
CLAIMED = one_gaussian(1.2, 1e-5)
NUM_TRIALS = 8000


def linear(params, image):
    return image.reshape(len(image), -1) @ params["weight"] + params["bias"]


@functools.cache
def target(kind):
    """A model, a batch of digits, and the canary: the digit with the largest gradient once mislabelled."""
    train = data.load("digits", data_dir=None).train
    if kind == "cnn":
        model = models.build("small_cnn", builder="flax", image_shape=(8, 8, 1), num_classes=10, width=4, groups=2)
        apply, params = model.apply, model.init(jax.random.key(0), train.image[:1])
    else:
        apply, params = linear, {"weight": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    loss = losses.cross_entropy(apply)
    image, right = train.image[:8], train.label[:8]
    wrong = Batch(image, (right + 1) % 10, np.ones(8, bool))
    norm = jax.jit(clipped_grad(loss, clip_norm=1.0))(jax.random.key(0), params, wrong)[1].norm
    canary = np.arange(8) == np.argmax(norm)
    assert norm.max() > 1
    inside = Batch(image, np.where(canary, wrong.label, right), np.ones(8, bool))
    return loss, params, inside, inside._replace(mask=~canary)


def audit(kind, clipped=lambda loss: clipped_grad(loss, clip_norm=1.0), plan=PLAN, seed=0):
    loss, params, inside, outside = target(kind)
    gradient = private_grad(clipped(loss), plan, num_records=32)
    key = jax.random.key(seed)
    scores = one_step_scores(gradient, key, params, outside, inside, num_trials=NUM_TRIALS, chunk_size=1000)
    return scores, epsilon_gaussian(scores, delta=1e-5, confidence=0.95)


@pytest.mark.parametrize("kind", ["cnn", "linear"])
def test_the_white_box_audit_of_the_real_step_is_tight_and_below_its_claim(kind):
    """With 7 200 counted trials of each kind the bound is 0.95 of the claim, with a standard error of 0.026."""
    scores, bound = audit(kind)
    assert 0.8 * CLAIMED <= bound <= CLAIMED
    assert epsilon_clopper_pearson(scores, delta=1e-5, confidence=0.95) <= CLAIMED
    for one in scores:
        assert len(one) == NUM_TRIALS
        assert abs(one.std() / 1.2 - 1) < 6 / math.sqrt(2 * NUM_TRIALS)
    assert abs(np.corrcoef(*scores)[0, 1]) < 6 / math.sqrt(NUM_TRIALS)
    assert abs(scores.inside.mean() - scores.outside.mean() - 1) < 6 * 1.2 * math.sqrt(2 / NUM_TRIALS)


def no_clip(loss):
    """One gradient of the whole batch, "clipped" after the sum."""

    def apply(key, params, batch, weight):
        total = jax.grad(lambda p: (loss(key, p, batch.image, batch.label) * batch.mask).sum())(params)
        return total, None

    return ClippedGrad(apply, 1.0)


BROKEN = {
    "noise of half the size": {"plan": replace(PLAN, noise_multiplier=0.6)},
    "sensitivity off by two": {"clipped": lambda loss: replace(clipped_grad(loss, clip_norm=2.0), clip_norm=1.0)},
    "clip after the sum": {"clipped": no_clip},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_white_box_audit_catches_broken_mechanisms(broken):
    """Each is at twice the claimed mu or more; a bound at 1.5 of the claimed epsilon has many errors of room."""
    assert audit("linear", **BROKEN[broken])[1] > 1.5 * CLAIMED


def test_settings_of_the_white_box_audit_are_checked():
    for name, value in (("num_trials", 9), ("chunk_size", 0)):
        with pytest.raises(ValueError, match=f"^{name} is "):
            one_step_scores(None, None, None, None, None, **{"num_trials": 10, "chunk_size": 1} | {name: value})
