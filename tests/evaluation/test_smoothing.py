"""Certificates of randomised smoothing against the closed form of a linear classifier, whose radius is its margin.

Counts of failures over many images are held against a binomial's tail of 1e-6; seeds are fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fedrobust import intervals
from fedrobust.evaluation import ABSTAIN, Certificates, certificates, certified_accuracy, certify, noisy_counts

KEY = jax.random.key(0)
WEIGHT = np.array([[0.0, 3.0], [0.0, -4.0]], np.float32)  # class 1 wins where 3 a - 4 b > 0, at a distance of that / 5
STDDEV = 0.25
ALPHA = 0.05


def linear(params, x):
    return x.reshape(len(x), -1) @ params


def images(seed, size):
    """Images of two pixels at signed distances from the boundary up to two standard deviations."""
    distance = np.random.default_rng(seed).uniform(-2, 2, size) * STDDEV
    return np.stack([0.6 + 0.6 * distance, 0.45 - 0.8 * distance], 1).reshape(size, 2, 1, 1).astype(np.float32)


def true_distance(image):
    return image.reshape(len(image), 2).astype(np.float64) @ (WEIGHT[:, 1] - WEIGHT[:, 0]).astype(np.float64) / 5


def counts_of(image, *, num_estimation, batch_size=256, num_selection=20, apply=linear):
    return noisy_counts(
        apply, WEIGHT, image, KEY, stddev=STDDEV, num_selection=num_selection, num_estimation=num_estimation,
        batch_size=batch_size,
    )  # fmt: skip


def test_counts_equal_a_loop_over_draws_whatever_the_batch_size():
    image = images(0, 3)
    expected = np.zeros((3, 2, 2), int)
    for i in range(3):
        for s in range(5 + 17):
            noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, i), s), image[i].shape)
            winner = np.argmax((image[i] + STDDEV * np.asarray(noise)).reshape(-1) @ WEIGHT)
            expected[i, int(s >= 5), winner] += 1
    for size in (4, 64):
        found = counts_of(image, num_selection=5, num_estimation=17, batch_size=size)
        assert found.tolist() == expected.tolist()


def test_certificates_by_hand():
    """All of n draws: p = alpha^(1/n). Half of them: nothing is settled. The class is the one that selection chose.

    5 of 5 at alpha 0.001 give 0.2512: abstain; 1000 of 1000 give 0.993116, Phi^-1 of that is 2.463263.
    """
    n = 1000
    rows = [[[9, 1], [n, 0]], [[9, 1], [n // 2, n // 2]], [[9, 1], [0, n]], [[0, 10], [0, n]]]
    found = certificates(np.array(rows), n, stddev=0.5, failure_probability=0.001)
    assert found.prediction.tolist() == [0, ABSTAIN, ABSTAIN, 1]
    np.testing.assert_allclose(found.radius, [0.5 * 2.463263, 0, 0, 0.5 * 2.463263], rtol=1e-6)
    few = certificates(np.array([[[9, 1], [5, 0]]]), 5, stddev=0.5, failure_probability=0.001)
    assert few.prediction.tolist() == [ABSTAIN] and few.radius.tolist() == [0]


def test_draws_that_predict_nothing_lower_the_certificate():
    def sometimes_nan(params, x):
        return jnp.where(x[:, 0, 0] > 0.9, jnp.nan, linear(params, x))

    image = np.full((1, 2, 1, 1), 0.5, np.float32)
    whole, lost = (counts_of(image, num_estimation=400, apply=f)[0, 1] for f in (linear, sometimes_nan))
    assert whole.sum() == 400 and 0 < lost.sum() < 400 and (lost <= whole).all()


def exceeds(image, found):
    """Which certificates claim another class, or more than the distance to the boundary."""
    distance = true_distance(image)
    right = found.prediction == (distance > 0)
    return (found.prediction != ABSTAIN) & (~right | (found.radius > np.abs(distance)))


def test_a_linear_classifier_gets_its_margin_from_below():
    image = images(1, 300)
    found = certificates(counts_of(image, num_estimation=2000), 2000, stddev=STDDEV, failure_probability=ALPHA)
    failed = exceeds(image, found)
    assert stats.binom.sf(failed.sum() - 1, 300, ALPHA) > 1e-6
    assert failed.sum() > 0  # and the bound is no looser than it says
    distance = np.abs(true_distance(image))
    tail = distance > 0.2 * STDDEV
    assert (found.prediction[tail] != ABSTAIN).mean() > 0.95
    shortfall = (distance - found.radius)[tail & (found.prediction != ABSTAIN)] / STDDEV
    assert np.median(shortfall) < 0.08 and shortfall.max() < 0.3
    many = certificates(
        counts_of(image[:40], num_estimation=40000, batch_size=4096), 40000, stddev=STDDEV, failure_probability=ALPHA
    )
    assert np.median((distance[:40] - many.radius)[many.prediction != ABSTAIN]) < 0.02 * STDDEV


def no_bound(count, total, confidence):
    return count / total


def other_side(count, total, confidence):
    return intervals.upper(count, total, confidence)


@pytest.mark.parametrize("wrong", [no_bound, other_side, "double radius"])
def test_a_wrong_bound_exceeds_the_true_radius_too_often(monkeypatch, wrong):
    """The mistakes that the test above is there for."""
    image = images(1, 300)
    counts, scale = counts_of(image, num_estimation=2000), 2 if wrong == "double radius" else 1
    if callable(wrong):
        monkeypatch.setattr("fedrobust.evaluation.smoothing.intervals.lower", wrong)
    found = certificates(counts, 2000, stddev=STDDEV * scale, failure_probability=ALPHA)
    assert stats.binom.sf(exceeds(image, found).sum() - 1, 300, ALPHA) < 1e-6


def test_counting_on_the_draws_that_chose_is_why_there_are_two_rows():
    """Two classes at 1/2, where no class may be certified, and three draws, which settle it at 0.13^(1/3) > 1/2.

    Fresh draws agree with the choice 1 time in 8, below alpha; those that chose agree with themselves twice as often.
    """
    rng = np.random.default_rng(0)
    chosen = rng.multinomial(3, np.ones(2) / 2, size=4000)
    fresh = rng.multinomial(3, np.ones(2) / 2, size=4000)
    honest, naive = (
        certificates(np.stack([chosen, x], 1), 3, stddev=1.0, failure_probability=0.13).prediction != ABSTAIN
        for x in (fresh, chosen)
    )
    assert stats.binom.sf(honest.sum() - 1, 4000, 0.13) > 1e-6 > stats.binom.sf(naive.sum() - 1, 4000, 0.13)


def test_certified_accuracy_by_hand():
    """Of 4, three are right, two of them beyond 0.1; alpha so small that none is wrong, then so that one may be."""
    found = Certificates(np.array([0, 1, ABSTAIN, 1]), np.array([0.3, 0.1, 0.0, 0.2]), 1e-6)
    label = np.array([0, 1, 1, 1])
    assert [certified_accuracy(found, label, r, confidence=0.9).accuracy for r in (0, 0.1, 0.2, 0.5)] == [
        0.75, 0.5, 0.25, 0.0,
    ]  # fmt: skip
    accuracy, lower, population = certified_accuracy(found, label, 0.1, confidence=0.9)
    assert (accuracy, lower) == (0.5, 0.5)
    assert population == pytest.approx(intervals.lower(2, 4, 0.9) - 1e-6)
    # P(any of 4 wrong) = 1 - 0.95^4 = 0.19 > 0.1 and P(two or more) = 0.014
    assert certified_accuracy(found._replace(failure_probability=0.05), label, 0.1, confidence=0.9).lower == 0.25


def test_certified_accuracy_holds_for_the_images_and_for_the_distribution_as_often_as_it_says():
    """Each bound over 100 repetitions of 60 images at confidence 0.8, certificates at alpha 0.2."""
    image = images(2, 6000)
    counts = counts_of(image, num_estimation=100, batch_size=128)
    radius, distance = 0.5 * STDDEV, true_distance(image)
    label = (distance > 0).astype(int)
    deserved, truth = np.abs(distance) > radius, 0.75
    missed = np.zeros(2, int)
    for part in np.arange(6000).reshape(100, 60):
        found = certificates(counts[part], 100, stddev=STDDEV, failure_probability=0.2)
        result = certified_accuracy(found, label[part], radius, confidence=0.8)
        missed += [result.lower > deserved[part].mean(), result.population_lower > truth]
    assert (stats.binom.sf(missed - 1, 100, 0.2) > 1e-6).all()


def test_one_program_serves_all_images_and_numbers_of_draws():
    traces = []

    def counted(params, x):
        traces.append(x.shape)
        return linear(params, x)

    image = images(3, 4)
    settings = {"stddev": STDDEV, "num_selection": 10, "failure_probability": ALPHA, "batch_size": 32}
    certify(counted, WEIGHT, image, KEY, num_estimation=50, **settings)
    num_traces = len(traces)
    found = certify(counted, -WEIGHT, image[:2], KEY, num_estimation=1000, **settings)
    assert len(traces) == num_traces and set(traces) == {(32, 2, 1, 1)}
    counts = noisy_counts(
        counted, -WEIGHT, image[:2], KEY, stddev=STDDEV, num_selection=10, num_estimation=1000, batch_size=7
    )
    expected = certificates(counts, 1000, stddev=STDDEV, failure_probability=ALPHA)
    assert [x.tolist() for x in found[:2]] == [x.tolist() for x in expected[:2]]


@pytest.mark.parametrize(
    "setting",
    [{"stddev": 0.0}, {"num_selection": 0}, {"num_estimation": 0}, {"batch_size": 0}, {"failure_probability": 1.0}],
)
def test_a_bad_setting_is_named(setting):
    settings = {
        "stddev": 0.1, "num_selection": 1, "num_estimation": 1, "failure_probability": 0.1, "batch_size": 1,
    }  # fmt: skip
    (name,) = setting
    with pytest.raises(ValueError, match=rf"^{name} is "):
        certify(linear, WEIGHT, images(0, 2), KEY, **settings | setting)
    with pytest.raises(ValueError, match=r"^the number of images is 0"):
        certify(linear, WEIGHT, images(0, 0), KEY, **settings)
    for image in (255 * images(0, 2), images(0, 2) * np.nan):
        with pytest.raises(ValueError, match=r"^the range of images is .* must be within \[0, 1\], without NaN$"):
            certify(linear, WEIGHT, image, KEY, **settings)


@pytest.mark.parametrize(
    ("label", "radius", "confidence"),
    [([0, 1], 0.1, 0.9), ([-1], 0.1, 0.9), ([0], -0.1, 0.9), ([0], 0.1, 0.0), ([0], float("nan"), 0.9)],
)
def test_bad_arguments_of_certified_accuracy_are_named(label, radius, confidence):
    found = Certificates(np.array([0]), np.array([0.3]), 0.001)
    with pytest.raises(ValueError, match=r"^.+ is .+: must be "):
        certified_accuracy(found, label, radius, confidence=confidence)


def test_a_draw_with_one_nan_logit_votes_for_nothing():
    def half_nan(params, x):
        return linear(params, x).at[:, 1].add(jnp.where(x[:, 0, 0, 0] > 0.9, jnp.nan, 0))

    image = np.full((1, 2, 1, 1), 0.5, np.float32)
    whole, lost = (counts_of(image, num_estimation=400, apply=f)[0, 1] for f in (linear, half_nan))
    assert 0 < lost.sum() < 400 and (lost <= whole).all()


def test_a_probability_that_would_be_rounded_away_is_refused():
    with pytest.raises(ValueError, match=r"^failure_probability is 1e-17: must be in \[1e-9, 1\)$"):
        certificates(np.array([[[9, 1], [5, 0]]]), 5, stddev=0.5, failure_probability=1e-17)
