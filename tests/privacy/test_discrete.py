"""Laws of the exact discrete Gaussian and of sums on an integer grid.

Seeds are fixed. A chi-square test fails for one seed in 1e6 where the sampler is right; a mean has a tolerance of six
standard errors, one seed in 5e8.
"""

import decimal
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp

from fedrobust.privacy import (
    SecureSum,
    decode,
    discrete,
    discrete_gaussian,
    encode,
    secure_sum,
    secure_sum_epsilon,
    secure_sum_zcdp,
    system_words,
)

VARIANCES = [Fraction(1, 4), Fraction(1), Fraction(10, 3), Fraction(100)]


def words(seed):
    rng = np.random.default_rng(seed)
    return lambda size: rng.integers(0, 2**64, size, np.uint64)


def support(variance):
    reach = math.ceil(12 * math.sqrt(variance)) + 2
    return np.arange(-reach, reach + 1)


def mass(variance):
    """The exact distribution, by its definition."""
    weight = np.exp(-(support(variance).astype(np.float64) ** 2) / (2 * float(variance)))
    return weight / weight.sum()


def p_value(sample, variance):
    """Chi-square of the counts of every integer that 10 or more of the samples should hit, the rest as one."""
    expected = mass(variance) * len(sample)
    common = support(variance)[expected >= 10]
    observed = [np.sum(sample == x) for x in common]
    expected = expected[expected >= 10]
    rest = len(sample) - np.array([sum(observed), expected.sum()])
    return stats.chisquare([*observed, rest[0]], [*expected, rest[1]]).pvalue


@pytest.mark.parametrize("variance", VARIANCES)
def test_samples_follow_the_exact_distribution(variance):
    sample = discrete_gaussian(words(0), 200_000, variance=variance)
    assert sample.dtype == np.int64
    assert p_value(sample, variance) > 1e-6
    assert abs(sample.mean()) < 6 * math.sqrt(variance / len(sample))


def test_the_test_tells_rounded_normals_and_other_variances_from_the_distribution():
    rounded = np.rint(np.random.default_rng(0).normal(size=200_000))
    assert p_value(rounded, Fraction(1)) < 1e-6
    for wrong in (Fraction(104, 100), Fraction(96, 100)):
        assert p_value(discrete_gaussian(words(0), 200_000, variance=wrong), Fraction(1)) < 1e-6


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_variance_is_at_most_sigma_squared(variance):
    """Canonne, Kamath, Steinke 2020, Corollary 9: of the distribution exactly, of samples within six errors."""
    exact = float(np.sum(mass(variance) * support(variance) ** 2))
    assert exact <= float(variance) * (1 + 1e-12)
    sample = discrete_gaussian(words(1), 200_000, variance=variance)
    fourth = float(np.sum(mass(variance) * support(variance).astype(np.float64) ** 4))
    assert abs(sample.var() - exact) < 6 * math.sqrt((fourth - exact**2) / len(sample))


def test_a_wide_distribution_is_as_wide_as_its_normal():
    sample = discrete_gaussian(words(2), 100_000, variance=Fraction(2) ** 60) / 2.0**30
    assert stats.kstest(sample, "norm").pvalue > 1e-6
    assert abs(sample.std() - 1) < 6 / math.sqrt(2 * len(sample))


@pytest.mark.parametrize("variance", [Fraction(1, 4), Fraction(10, 3), Fraction(3**70, 2**70)])
def test_float_and_integer_arithmetic_decide_alike(variance, monkeypatch):
    fast = discrete_gaussian(words(3), 600, variance=variance)
    monkeypatch.setattr(discrete, "_FILTER", 1.0)  # no doubt is small enough: every decision goes the slow way
    assert (discrete_gaussian(words(3), 600, variance=variance) == fast).all()


def test_a_tie_in_the_first_64_bits_is_broken_by_further_ones():
    gamma = Fraction(7, 10)
    boundary = math.floor(Fraction(math.exp(-0.7)) * 2**64)
    near = range(boundary - 2**12, boundary + 2**12)
    none = words(0)

    def refuse(size):
        raise AssertionError("no word is needed")

    low, high = near[0], near[-1]
    assert discrete._fraction_below_exp(refuse, low, gamma)
    assert not discrete._fraction_below_exp(refuse, high, gamma)
    while high - low > 1:  # the one word that the first 64 bits do not decide
        middle = (low + high) // 2
        below = discrete._fraction_below_exp(none, middle, gamma)
        low, high = (middle, high) if below else (low, middle)
    ties = [w for w in (low, high) if len({discrete._fraction_below_exp(none, w, gamma) for _ in range(40)}) == 2]
    assert len(ties) == 1


def test_words_next_to_a_probability_are_told_apart_where_floats_are_not():
    """The float64 of all of these is the same, and 0.7 as a difference of terms of 1000 is off by up to 1000 2^-50."""
    with decimal.localcontext(decimal.Context(prec=60)):
        boundary = math.floor(Fraction((-decimal.Decimal(7) / 10).exp()) * 2**64)
    offset = np.array([-16, -3, -1, 1, 3, 16])
    near = np.array([boundary + int(x) for x in offset], np.uint64)
    assert len(set(near.astype(np.float64))) == 1
    for error in (-5e-13, 0, 5e-13):
        gamma, terms = np.full(6, 0.7 + error), np.full(6, 1000.0)
        below = discrete._below_exp(lambda size: near[:size], gamma, terms, lambda i: Fraction(7, 10))
        assert below.tolist() == (offset < 0).tolist()


def test_words_that_would_favour_small_residues_are_thrown_away():
    """Residues of 3 come equally often among the 2^63 - 2 words below 2^63 - 2; none of these has a sign or a head."""
    for word, num_left in ((2**63 - 4, 5), (2**63 - 1, 0)):  # both leave 1, which is accepted
        drawn = discrete._accepted(lambda size, w=word: np.full(size, w, np.uint64), 5, Fraction(4), 3)
        assert drawn.tolist() == [1] * num_left


def test_system_entropy_never_repeats():
    assert (discrete_gaussian(system_words, 50, variance=Fraction(2**40))
            != discrete_gaussian(system_words, 50, variance=Fraction(2**40))).all()  # fmt: skip
    assert discrete_gaussian(system_words, 0, variance=Fraction(1)).shape == (0,)


@pytest.mark.parametrize("variance", [0, -1, Fraction(1, 2**21), Fraction(2**60 + 1)])
def test_a_variance_out_of_range_is_refused(variance):
    with pytest.raises(ValueError, match=r"^variance is "):
        discrete_gaussian(system_words, 1, variance=variance)


SETTINGS = SecureSum(clip_norm=1.0, dimension=64, step=0.01, share_stddev=0.05, num_clients=4, num_bits=16)


@given(
    seed=st.integers(0, 2**32 - 1),
    dimension=st.sampled_from([1, 2, 7, 300]),
    step=st.sampled_from([1e-4, 0.03, 0.9, 5.0]),
    scale=st.sampled_from([0.0, 1e-300, 1e-3, 1.0, 1e6, 1e300, np.inf, np.nan]),
    sparse=st.booleans(),
)
def test_no_client_is_ever_longer_than_the_sensitivity(seed, dimension, step, scale, sparse):
    settings = replace(SETTINGS, dimension=dimension, step=step, share_stddev=step)
    rng = np.random.default_rng(seed)
    vector = rng.normal(size=dimension) * scale
    if sparse:
        vector[1:] = 0
    code = secure_sum.round_to_grid(settings, words(seed), vector)
    assert sum(int(x) ** 2 for x in code) <= settings.squared_sensitivity
    if not np.isfinite(scale):
        assert not code.any()


def test_without_the_condition_roundings_would_be_too_long():
    settings = replace(SETTINGS, dimension=2, step=5.0, share_stddev=5.0)  # 0.2 of a step long: (0, 0) or (1, 0) only
    assert settings.squared_sensitivity == 1
    vector = np.full(2, 1.0)
    codes = np.stack([secure_sum.round_to_grid(settings, words(i), vector) for i in range(400)])
    assert set(map(tuple, codes.tolist())) == {(0, 0), (1, 0), (0, 1)}  # 0.14 of each coordinate: (1, 1) in one of 50


def test_sensitivity_by_hand():
    """c = 100, D = 64: 100^2 + 16 + sqrt(2 * 1/2) * (100 + 4) = 10 120, below (100 + 8)^2 = 11 664."""
    assert SETTINGS.squared_sensitivity == 10_120
    # c = 0.1, D = 1: (0.1 + 1)^2 = 1.21 against 0.01 + 0.25 + (0.1 + 0.5) = 0.86: nothing but 0 is short enough
    assert replace(SETTINGS, dimension=1, step=10.0, share_stddev=5.0).squared_sensitivity == 0


def test_a_rounding_that_never_fits_is_one_towards_zero(monkeypatch):
    monkeypatch.setattr(secure_sum, "_ROUNDING_TRIALS", 0)
    settings = replace(SETTINGS, dimension=3, clip_norm=10.0, step=1.0, share_stddev=1.0)
    assert secure_sum.round_to_grid(settings, words(0), np.array([2.9, -2.9, 0.9])).tolist() == [2, -2, 0]


def test_rounding_is_unbiased_and_an_exact_vector_stays():
    settings = replace(SETTINGS, dimension=400, step=0.02, share_stddev=0.02)
    rng = np.random.default_rng(0)
    vector = rng.normal(size=400)
    vector /= 2 * np.linalg.norm(vector)  # inside the ball, where hardly any rounding is refused
    draws = np.stack([secure_sum.round_to_grid(settings, words(i), vector) for i in range(1000)]) * settings.step
    error = (draws.mean(axis=0) - vector) / (settings.step / 2 / math.sqrt(1000))
    assert np.abs(error).max() < 6
    assert np.abs(np.floor(vector / settings.step) * settings.step - vector).max() > settings.step / 2
    grid = np.array([3, -4, 0, 1] * 100) * 1.0
    exact = replace(settings, clip_norm=1000.0, step=1.0, share_stddev=1.0)
    assert (secure_sum.round_to_grid(exact, words(0), grid) == grid).all()


def encoded_sum(settings, vectors, seed):
    total = sum(encode(settings, words((seed, k)), v) for k, v in enumerate(vectors))
    return decode(settings, total % 2**settings.num_bits)


def test_the_decoded_sum_is_the_sum_of_clipped_vectors_with_the_noise_of_all_shares():
    rng = np.random.default_rng(1)
    settings = replace(SETTINGS, dimension=20_000, step=0.001)
    vectors = [rng.normal(size=20_000) * s for s in (0.001, 0.001, 1.0, np.nan)]
    clipped = [v / max(1, np.linalg.norm(v)) for v in vectors[:3]]
    noise = encoded_sum(settings, vectors, 0) - sum(clipped)
    stddev = math.sqrt(4 * 0.05**2 + 3 * 0.001**2 / 6)  # roundings have a variance of f(1 - f), a sixth on average
    assert abs(noise.std() / stddev - 1) < 6 / math.sqrt(2 * 20_000)
    assert abs(noise.mean()) < 6 * stddev / math.sqrt(20_000)


def test_codes_are_residues_and_wrapping_is_no_likelier_than_its_bound():
    vectors = np.random.default_rng(2).normal(size=(4, 64))
    assert SETTINGS.wrap_probability < 1e-12
    for num_bits in (8, 9, 10, 16):
        settings = replace(SETTINGS, num_bits=num_bits)
        code = encode(settings, words(5), vectors[0])
        assert 0 <= code.min() <= code.max() < 2**num_bits
        right = encoded_sum(replace(settings, num_bits=40), vectors, 3)
        wrapped = not np.array_equal(right, encoded_sum(settings, vectors, 3))
        assert wrapped <= (settings.wrap_probability > 1e-9)
    bounds = [replace(SETTINGS, num_bits=b).wrap_probability for b in (1, 9, 10, 11)]
    assert bounds == sorted(bounds, reverse=True)
    # by hand, one client: room = 2^6 - (0 + ...) for c = 10: 64 - 11 = 53; 2 * exp(-53^2 / (2 * 100))
    one = SecureSum(clip_norm=10.0, dimension=1, step=1.0, share_stddev=10.0, num_clients=1, num_bits=7)
    assert one.wrap_probability == pytest.approx(2 * math.exp(-(53**2) / 200))
    # three coordinates, two clients: room = 64 - 2 * 11 = 42
    more = replace(one, dimension=3, num_clients=2)
    assert more.wrap_probability == pytest.approx(2 * 3 * math.exp(-(42**2) / (2 * 2 * 100)))
    far = np.array([encoded_sum(one, [np.array([10.0])], s)[0] < -40 for s in range(2000)])
    assert far.mean() <= one.wrap_probability + 6 * math.sqrt(one.wrap_probability / 2000)


def test_residues_are_read_as_the_nearest_to_zero():
    settings = replace(SETTINGS, dimension=5, num_bits=3, step=0.5, share_stddev=0.5)
    np.testing.assert_array_equal(decode(settings, np.array([0, 3, 4, 7, 8 + 1])), [0, 1.5, -2, -0.5, 0.5])
    widest = replace(SETTINGS, num_bits=62)
    assert np.abs(decode(widest, encode(widest, words(0), np.full(64, -1.0))) + 1 / 8).max() < 1


def test_the_loss_of_a_sum_by_hand():
    """K = 3 shares of s = 1/2 on 64 coordinates, S^2 = 4 + 16 + 2 + 4 = 26; then K = 100 of s = 1 on 4, S^2 = 2."""
    tau = 10 * (math.exp(-(math.pi**2) / 4) + math.exp(-(math.pi**2) / 3))
    small = SecureSum(clip_norm=2.0, dimension=64, step=1.0, share_stddev=0.5, num_clients=3, num_bits=20)
    assert secure_sum_zcdp(small) == pytest.approx((26 / 0.75 + 32 * tau) / 2, rel=1e-12)
    tau = 10 * sum(math.exp(-2 * math.pi**2 * k / (k + 1)) for k in range(1, 100))
    many = SecureSum(clip_norm=0.5, dimension=4, step=1.0, share_stddev=1.0, num_clients=100, num_bits=20)
    assert secure_sum_zcdp(many) == pytest.approx((math.sqrt(0.02) + 2 * tau) ** 2 / 2, rel=1e-12)


def log_convolve(a, b):
    """log of the convolution of exp(a) and exp(b), [2n - 1] from [n] and [n] or longer."""
    padded = np.pad(a, len(b) - 1, constant_values=-np.inf)
    return logsumexp(np.lib.stride_tricks.sliding_window_view(padded, len(b)) + b[::-1], axis=1)


@pytest.mark.parametrize("stddev", [0.5, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("num_clients", [1, 2, 5])
def test_the_accounted_loss_bounds_the_true_one_of_a_sum_of_discrete_gaussians(stddev, num_clients):
    """One coordinate: the sum's distribution by convolution, against its shift by the sensitivity, all orders."""
    settings = SecureSum(
        clip_norm=2.0, dimension=1, step=1.0, share_stddev=stddev, num_clients=num_clients, num_bits=20
    )
    shift = math.isqrt(settings.squared_sensitivity)
    share = -(np.arange(-200.0, 201) ** 2) / (2 * stddev**2)
    share -= logsumexp(share)
    total = share
    for _ in range(num_clients - 1):
        total = log_convolve(total, share)
    p, q = total[:-shift], total[shift:]
    rho = secure_sum_zcdp(settings)
    losses = [logsumexp(order * p + (1 - order) * q) / (order - 1) / order for order in (1.01, 1.5, 2, 4, 8)]
    assert max(losses) <= rho * (1 + 1e-6)
    if stddev >= 1:  # and it is not loose: the continuous Gaussian's with the same variance
        assert rho < 1.3 * settings.squared_sensitivity / (2 * num_clients * stddev**2)
        assert max(losses) > 0.6 * rho


def test_epsilon_by_hand_and_more_shares_are_more_private():
    """rho = S^2 / (2 K s^2); the classic conversion rho + 2 sqrt(rho log(1/delta)) is an upper bound."""
    rho = secure_sum_zcdp(SETTINGS)
    assert rho == pytest.approx(10_120 / (2 * 4 * 25), rel=1e-6)
    settings = replace(SETTINGS, share_stddev=2.0)
    rho = 5 * secure_sum_zcdp(settings)
    epsilon = secure_sum_epsilon(settings, num_steps=5, delta=1e-5)
    assert 0.8 * (rho + 2 * math.sqrt(rho * math.log(1e5))) < epsilon < rho + 2 * math.sqrt(rho * math.log(1e5))
    assert secure_sum_epsilon(replace(settings, num_clients=8), num_steps=5, delta=1e-5) < epsilon


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_norm", 0.0),
        ("clip_norm", np.inf),
        ("dimension", 0),
        ("step", 0.0),
        ("step", 1e-9),  # squared norms of 10^18
        ("step", 1e-12),
        ("share_stddev", 0.004),
        ("share_stddev", np.nan),
        ("num_clients", 0),
        ("num_bits", 0),
        ("num_bits", 63),
        ("num_bits", 3.0),
    ],
)
def test_settings_of_a_secure_sum_are_checked(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        replace(SETTINGS, **{name: value})


def test_a_vector_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"^shape of vector is \(3,\)"):
        encode(SETTINGS, system_words, np.zeros(3))
