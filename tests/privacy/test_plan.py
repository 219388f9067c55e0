"""The plan against dp-accounting used another way, against closed forms, and at its edges."""

import functools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution
from scipy.optimize import brentq
from scipy.stats import norm

from fedrobust.privacy import epsilon_spent, make_plan

GIVEN = {"unit": "record", "epsilon": 1.0, "delta": 1e-4, "sampling_rate": 0.1, "num_steps": 10}
SPENT = {"noise_multiplier": 1.5, "delta": 1e-4, "sampling_rate": 0.1, "num_steps": 10}


@functools.cache
def plan(**changes):
    return make_plan(**(GIVEN | changes))


@functools.cache
def spent(**changes):
    return epsilon_spent(**(SPENT | changes))


def gaussian_epsilon(noise_multiplier, num_steps, delta):
    """Balle and Wang 2018 (arXiv 1805.06530), theorem 8: the exact epsilon of T Gaussian sums without sampling."""
    mu = math.sqrt(num_steps) / noise_multiplier

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(excess, 0, 50)


def test_the_plan_stays_within_its_budget_and_wastes_little_of_it():
    found = plan()
    assert 0.98 < found.epsilon <= 1.0
    assert found.epsilon == spent(noise_multiplier=found.noise_multiplier)
    assert spent(noise_multiplier=0.98 * found.noise_multiplier) > 1.0
    assert (found.unit, found.relation, found.sampling) == ("record", "add_or_remove_one", "poisson")
    assert (found.sampling_rate, found.num_steps, found.delta, found.histogram_epsilon) == (0.1, 10, 1e-4, 0.0)


def test_the_plan_reproduces_a_published_setting():
    """Epsilon 8 at q 0.1, 150 steps, delta 1e-4 needs a multiplier of 0.958."""
    found = plan(epsilon=8.0, num_steps=150)
    assert abs(found.noise_multiplier - 0.958) < 2e-3
    assert 7.9 < found.epsilon <= 8


def test_epsilon_equals_the_privacy_loss_distribution_composed_by_hand():
    one = privacy_loss_distribution.from_gaussian_mechanism(1.5, sampling_prob=0.1)
    np.testing.assert_allclose(spent(), one.self_compose(10).get_epsilon_for_delta(1e-4), rtol=1e-6)


@pytest.mark.parametrize(("noise_multiplier", "num_steps"), [(1.0, 1), (5.0, 12)])
def test_epsilon_without_sampling_is_the_closed_form(noise_multiplier, num_steps):
    exact = gaussian_epsilon(noise_multiplier, num_steps, 1e-4)
    found = spent(noise_multiplier=noise_multiplier, num_steps=num_steps, sampling_rate=1.0)
    assert exact * (1 - 1e-9) <= found <= exact * 1.01


@pytest.mark.parametrize(("noise_multiplier", "sampling_rate", "num_steps"), [(1.5, 0.1, 10), (0.8, 0.02, 200)])
def test_epsilon_is_below_the_renyi_bound(noise_multiplier, sampling_rate, num_steps):
    accountant = rdp.RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    bound = accountant.compose(event, num_steps).get_epsilon(1e-4)
    found = spent(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, num_steps=num_steps)
    assert 0.5 * bound < found < bound


def test_epsilon_grows_with_steps_and_sampling_and_falls_with_noise_and_delta():
    for changes in ({"num_steps": 40}, {"sampling_rate": 0.3}, {"noise_multiplier": 1.0}, {"delta": 1e-6}):
        assert spent(**changes) > spent() * 1.05


def test_the_label_counts_cost_what_they_are_said_to_cost():
    assert spent() + 0.1 < spent(histogram_epsilon=0.5) <= spent() + 0.5 + 1e-3
    alone = spent(noise_multiplier=1e4, histogram_epsilon=0.5)  # the sums cost next to nothing
    assert 0.48 < alone < 0.51  # Laplace of scale 1 / 0.5 is 0.5-DP; delta buys almost none of it back


def test_the_label_counts_are_paid_out_of_the_budget():
    with_counts = plan(histogram_epsilon=0.5)
    assert with_counts.noise_multiplier > 1.1 * plan().noise_multiplier
    assert 0.98 < with_counts.epsilon <= 1.0
    assert with_counts.histogram_epsilon == 0.5
    assert with_counts.epsilon == spent(noise_multiplier=with_counts.noise_multiplier, histogram_epsilon=0.5)


def test_truncation_is_deducted_from_delta_before_the_noise_is_chosen():
    lost = 0.9e-4
    truncated = plan(truncation_probability=lost / (1 + math.e))
    assert truncated.noise_multiplier == pytest.approx(plan(delta=1e-5).noise_multiplier, rel=1e-6)
    assert truncated.noise_multiplier > 1.05 * plan().noise_multiplier
    assert truncated.delta == 1e-4
    assert truncated.epsilon == pytest.approx(spent(noise_multiplier=truncated.noise_multiplier, delta=1e-5), rel=1e-6)
    assert 0.98 < truncated.epsilon <= 1.0


BAD = [
    *(("unit", {"unit": value}) for value in ("patient", "")),
    *(("epsilon", {"epsilon": value}) for value in (0, -1.0, math.inf, math.nan, 1000.0)),
    ("epsilon", {"epsilon": 60.0, "num_steps": 1}),  # less noise than the least multiplier would do
    *(("delta", {"delta": value}) for value in (0, 1, -1e-5, 1.5, math.nan)),
    *(("sampling_rate", {"sampling_rate": value}) for value in (0, -0.1, 1.01, math.nan)),
    *(("num_steps", {"num_steps": value}) for value in (0, -3, 2.5)),
    *(("histogram_epsilon", {"histogram_epsilon": value}) for value in (-0.1, 1.0, 2.0, math.nan)),
    ("histogram_epsilon", {"histogram_epsilon": 0.1, "unit": "client"}),  # a client moves a count by more than one
    *(("truncation_probability", {"truncation_probability": value}) for value in (-1e-6, -1.0, math.nan)),
    *(("delta", {"truncation_probability": value}) for value in (1e-4, 1.0)),  # nothing of delta would remain
]


@pytest.mark.parametrize(("name", "changes"), BAD)
def test_a_bad_argument_is_named_in_one_line(name, changes):
    with pytest.raises(ValueError, match=f"^{name} is .*: must be ") as error:
        make_plan(**(GIVEN | changes))
    assert "\n" not in str(error.value)
