"""The plan against dp-accounting used another way, against closed forms and Opacus, and at its edges."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from dp_accounting.pld import privacy_loss_distribution
from scipy.optimize import brentq
from scipy.stats import binom, norm

from fedrobust.privacy import (
    Event,
    distributed_multiplier,
    epsilon_spent,
    federation_epsilon,
    joint_multiplier,
    make_plan,
    total_epsilon,
)
from fedrobust.privacy import plan as privacy_plan

POISSON = {"unit": "record", "relation": "add_or_remove_one", "sampling": "poisson"}
GIVEN = POISSON | {"delta": 1e-4, "num_steps": 10, "sampling_rate": 0.1}
BATCHES = {"delta": 1e-4, "num_steps": 10, "sampling_rate": None, "batch_size": 10, "num_units": 100}
FIXED = GIVEN | BATCHES | {"sampling": "fixed_size", "relation": "replace_one"}
SHUFFLE = GIVEN | BATCHES | {"sampling": "shuffle", "relation": "zero_out"}


@functools.cache
def plan(epsilon=1.0, **changes):
    return make_plan(epsilon=epsilon, **(GIVEN | changes))


@functools.cache
def spent(noise_multiplier=1.5, **changes):
    return make_plan(noise_multiplier=noise_multiplier, **(GIVEN | changes)).epsilon


def gaussian_epsilon(noise_multiplier, num_steps, delta):
    """Balle and Wang 2018 (arXiv 1805.06530), theorem 8: the exact epsilon of T Gaussian sums without sampling."""
    mu = math.sqrt(num_steps) / noise_multiplier

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return brentq(excess, 0, 50)


def test_the_plan_stays_within_its_budget_and_wastes_little_of_it():
    found = plan()
    assert 0.98 < found.epsilon <= 1.0
    assert found.epsilon == spent(noise_multiplier=found.noise_multiplier) == epsilon_spent(found)
    assert spent(noise_multiplier=0.98 * found.noise_multiplier) > 1.0
    assert (found.unit, found.relation, found.sampling) == ("record", "add_or_remove_one", "poisson")
    assert (found.sampling_rate, found.num_steps, found.delta, found.histogram_epsilon) == (0.1, 10, 1e-4, 0.0)
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)


def test_a_search_that_stopped_a_little_short_is_carried_on_to_the_budget(monkeypatch):
    """As its coarser grid does below a delta of 1e-12. What the accountants say is replaced: they take seconds."""
    monkeypatch.setattr(privacy_plan, "_calibrated", lambda *_: 1.999)
    monkeypatch.setattr(privacy_plan, "epsilon_spent", lambda plan: 2 / plan.noise_multiplier)
    found = make_plan(epsilon=1.0, **GIVEN)
    assert found.epsilon <= 1.0
    assert found.noise_multiplier < 2.002
    monkeypatch.setattr(privacy_plan, "epsilon_spent", lambda plan: math.inf)
    with pytest.raises(ValueError, match=r"^delta is 0\.0001: "):
        make_plan(epsilon=1.0, **GIVEN)


def test_the_plan_reproduces_a_published_setting():
    """Epsilon 8 at q 0.1, 150 steps, delta 1e-4 needs a multiplier of 0.958."""
    found = plan(epsilon=8.0, num_steps=150)
    assert abs(found.noise_multiplier - 0.958) < 2e-3
    assert 7.9 < found.epsilon <= 8


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta"), [(0.1, 1.5, 10, 1e-4), (0.01, 1.0, 300, 1e-6), (0.4, 3.0, 40, 1e-3)]
)
def test_epsilon_equals_the_privacy_loss_distribution_composed_by_hand(rate, noise, steps, delta):
    one = privacy_loss_distribution.from_gaussian_mechanism(noise, sampling_prob=rate)
    by_hand = one.self_compose(steps).get_epsilon_for_delta(delta)
    found = spent(noise_multiplier=noise, sampling_rate=rate, num_steps=steps, delta=delta)
    assert abs(found - by_hand) < 1e-3 * by_hand


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "opacus_prv.json").read_text())["points"]


def test_epsilon_equals_the_one_of_opacus_to_one_percent():
    """Its PRV accountant composes privacy loss random variables; ours, distributions: two codes, one truth."""
    assert len(GOLDEN) >= 24
    for rate, noise, steps, delta, epsilon in GOLDEN:
        releases = [(Event("gaussian", noise, "poisson", rate), steps)]
        grid = 1e-4 if steps > 500 and epsilon < 2 else 4e-4  # errors of the grid add up over the steps
        found = total_epsilon(releases, relation="add_or_remove_one", delta=delta, accountant="pld", grid=grid)
        assert abs(found / epsilon - 1) < 0.01, (rate, noise, steps, delta, epsilon, found)


@pytest.mark.parametrize(("noise_multiplier", "num_steps"), [(1.0, 1), (5.0, 12)])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one", "zero_out"])
def test_epsilon_without_sampling_is_the_closed_form_for_every_relation(noise_multiplier, num_steps, relation):
    """The multiplier is over the sensitivity of the relation, in whatever unit an accountant has it."""
    exact = gaussian_epsilon(noise_multiplier, num_steps, 1e-4)
    changes = {"relation": relation, "num_steps": num_steps, "sampling_rate": 1.0}
    found = spent(noise_multiplier=noise_multiplier, **changes)
    assert exact * (1 - 1e-9) <= found <= exact * 1.01


@pytest.mark.parametrize(("relation", "other"), [("add_or_remove_one", 0), ("replace_one", -1)])
def test_epsilon_of_one_sampled_step_is_that_of_its_two_mixtures_by_integration(relation, other):
    """A record that contributes 1 with probability q, against one that contributes 0, or another that does -1."""
    q, multiplier = 0.1, 1.0
    stddev = multiplier * (2 if relation == "replace_one" else 1)  # over C, the bound of one contribution
    x, step = np.linspace(-20, 20, 40_001, retstep=True)
    p, p_other = ((1 - q) * norm.pdf(x, 0, stddev) + q * norm.pdf(x, to, stddev) for to in (1, other))

    def excess(epsilon):
        pairs = (p, p_other), (p_other, p)
        return max(np.sum(np.maximum(a - math.exp(epsilon) * b, 0)) for a, b in pairs) * step - 1e-4

    found = spent(noise_multiplier=multiplier, sampling_rate=q, num_steps=1, relation=relation)
    assert found == pytest.approx(brentq(excess, 0, 5), rel=1e-4)


def renyi_epsilon(noise_multiplier, num_steps, delta):
    """Renyi of the plain Gaussian, order by order: T alpha / (2 z^2), turned into (epsilon, delta) by hand.

    Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), proposition 12.
    """
    orders = np.arange(1.1, 200, 0.1)
    cost = num_steps * orders / (2 * noise_multiplier**2)
    return np.min(cost + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1))


@pytest.mark.parametrize("noise_multiplier", [2.0, 5.0])
def test_batches_of_all_units_cost_what_the_plain_gaussian_does(noise_multiplier):
    """So dp-accounting's multiplier for sampling without replacement is over 2 C, as ours is."""
    found = make_plan(noise_multiplier=noise_multiplier, **FIXED | {"batch_size": 100})
    assert (found.accountant, found.sampling_rate) == ("rdp", 1.0)
    np.testing.assert_allclose(found.epsilon, renyi_epsilon(noise_multiplier, 10, 1e-4), rtol=5e-3)
    assert found.epsilon > gaussian_epsilon(noise_multiplier, 10, 1e-4)


def test_batches_of_a_fixed_size_are_amplified_and_calibrated_within_the_budget():
    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    event = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, dp_accounting.GaussianDpEvent(1.5))
    found = make_plan(noise_multiplier=1.5, **FIXED)
    assert abs(found.epsilon - accountant.compose(event, 10).get_epsilon(1e-4)) < 1e-9
    assert found.epsilon < 0.6 * renyi_epsilon(1.5, 10, 1e-4)
    calibrated = make_plan(epsilon=2.0, **FIXED | {"num_steps": 3})
    assert 1.98 < calibrated.epsilon <= 2.0
    assert calibrated.sampling_rate * calibrated.num_units == 10


@pytest.mark.parametrize("relation", ["zero_out", "replace_one"])
@pytest.mark.parametrize(("num_steps", "times"), [(1, 1), (10, 1), (11, 2), (35, 4)])
def test_shuffled_batches_are_not_amplified(relation, num_steps, times):
    """Batches of 10 out of 100: a unit is in one of every ten."""
    found = make_plan(noise_multiplier=3.0, **SHUFFLE | {"relation": relation, "num_steps": num_steps})
    exact = gaussian_epsilon(3.0, times, 1e-4)
    assert exact * (1 - 1e-9) <= found.epsilon <= exact * 1.01


@pytest.mark.parametrize(("num_units", "batch_size"), [(7, 3), (10, 3), (941, 94), (50, 50), (10**6, 3), (49, 1)])
def test_a_shuffled_epoch_is_never_taken_for_longer_than_it_is(num_units, batch_size):
    per_epoch = -(-num_units // batch_size)
    changes = {"num_units": num_units, "batch_size": batch_size, "num_steps": per_epoch + 1}
    found = make_plan(noise_multiplier=3.0, **SHUFFLE | changes)
    assert found.epsilon >= gaussian_epsilon(3.0, 2, 1e-4) * (1 - 1e-9)


def test_blanking_a_record_costs_what_removing_it_does_and_replacing_it_more_noise():
    assert spent(relation="zero_out") == pytest.approx(spent(), rel=1e-9)
    # The same noise in units of C: twice the sensitivity, half the multiplier.
    assert spent(relation="replace_one", noise_multiplier=0.75) > 1.05 * spent()


@pytest.mark.parametrize(("noise_multiplier", "sampling_rate", "num_steps"), [(1.5, 0.1, 10), (0.8, 0.02, 200)])
def test_epsilon_is_below_the_renyi_bound(noise_multiplier, sampling_rate, num_steps):
    releases = [(Event("gaussian", noise_multiplier, "poisson", sampling_rate), num_steps)]
    bound = total_epsilon(releases, relation="add_or_remove_one", delta=1e-4, accountant="rdp")
    found = spent(noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, num_steps=num_steps)
    assert 0.5 * bound < found < bound


def test_epsilon_grows_with_steps_and_sampling_and_falls_with_noise_and_delta():
    for changes in ({"num_steps": 40}, {"sampling_rate": 0.3}, {"noise_multiplier": 1.0}, {"delta": 1e-6}):
        assert spent(**changes) > spent() * 1.05
    assert epsilon_spent(plan(), num_steps=3) < epsilon_spent(plan(), num_steps=4) < plan().epsilon


def test_the_label_counts_cost_what_they_are_said_to_cost():
    assert spent() + 0.1 < spent(histogram_epsilon=0.5) <= spent() + 0.5 + 1e-3
    alone = spent(noise_multiplier=1e4, histogram_epsilon=0.5)  # the sums cost next to nothing
    assert 0.48 < alone < 0.51  # Laplace of scale 1 / 0.5 is 0.5-DP; delta buys almost none of it back


@pytest.mark.parametrize("given", [GIVEN | {"relation": "replace_one"}, FIXED])
def test_replacing_a_record_moves_two_label_counts(given):
    """Laplace noise of scale 1 / 0.5 on a change of 2 is 1-DP; Renyi divergences tell a little more or less."""
    alone = make_plan(noise_multiplier=1e4, histogram_epsilon=0.5, **given).epsilon
    assert 0.9 < alone < 1.1


def test_the_label_counts_are_paid_out_of_the_budget():
    with_counts = plan(histogram_epsilon=0.5)
    assert with_counts.noise_multiplier > 1.1 * plan().noise_multiplier
    assert 0.98 < with_counts.epsilon <= 1.0
    assert with_counts.histogram_epsilon == 0.5
    assert with_counts.epsilon == spent(noise_multiplier=with_counts.noise_multiplier, histogram_epsilon=0.5)


@pytest.mark.parametrize(("relation", "sensitivity"), [("add_or_remove_one", 0.5), ("replace_one", 1.0)])
def test_sum_and_count_cost_together_what_one_gaussian_of_their_joint_sensitivity_does(relation, sensitivity):
    """In units of their noise a unit moves (sum, count) by (1 / z, sensitivity / stddev): one vector, one norm."""
    norm_of_both = math.hypot(1 / 1.5, sensitivity / 2.0)
    assert joint_multiplier(1.5, 2.0, relation) == pytest.approx(1 / norm_of_both, rel=1e-12)
    together = make_plan(noise_multiplier=1.5, count_noise_stddev=2.0, **GIVEN | {"relation": relation})
    alone = make_plan(noise_multiplier=1 / norm_of_both, **GIVEN | {"relation": relation})
    assert together.epsilon == pytest.approx(alone.epsilon, rel=1e-9)


def test_the_count_is_paid_for_by_more_noise_on_the_sum():
    found = plan(count_noise_stddev=2.0)
    assert found.noise_multiplier > 1.005 * plan().noise_multiplier
    assert 0.98 < found.epsilon <= 1.0
    assert found.event.noise_multiplier == pytest.approx(plan().noise_multiplier, rel=1e-6)
    with pytest.raises(ValueError, match=r"^count_noise_stddev is 0\.3: must be more"):
        plan(count_noise_stddev=0.3)


def test_truncation_is_deducted_from_delta(monkeypatch):
    assert plan(num_units=941).truncation_probability == binom.sf(plan(num_units=941).sampler.capacity, 941, 0.1)
    assert 0 < plan(num_units=941).truncation_probability <= 1e-12
    assert plan().truncation_probability == 0
    lost = 1e-6
    event = Event("gaussian", 1.5, "poisson", 0.1, lost)
    with_loss = total_epsilon([(event, 10)], relation="add_or_remove_one", delta=1e-4, accountant="pld")
    left = 1e-4 - (1 + math.exp(with_loss)) * 10 * lost
    assert with_loss == pytest.approx(spent(delta=left), rel=1e-6)
    assert with_loss > 1.01 * spent()
    none_left = event._replace(truncation_probability=1e-4)
    assert total_epsilon([(none_left, 1)], relation="zero_out", delta=1e-4, accountant="pld") == math.inf
    monkeypatch.setattr("fedrobust.privacy.sampling.TAIL", 0.9e-5 / (1 + math.e))
    truncated = make_plan(epsilon=1.0, num_units=50, **GIVEN)
    assert truncated.truncation_probability > 0
    assert truncated.noise_multiplier > plan().noise_multiplier
    assert 0.98 < truncated.epsilon <= 1.0


def test_a_federation_costs_what_its_dearest_silo_does():
    plans = [plan(), plan(epsilon=2.0, sampling_rate=0.3), plan(num_steps=5)]
    assert federation_epsilon(plans) == plans[1].epsilon
    for other, name in (
        (plan(delta=1e-5), "delta"),
        (plan(relation="zero_out"), "relation"),
        (plan(unit="client"), "unit"),
    ):
        with pytest.raises(ValueError, match=rf"^plan\.{name} is "):
            federation_epsilon([plans[0], other])
    with pytest.raises(ValueError, match=r"^plans is 0"):
        federation_epsilon([])


def test_noise_in_shares_is_the_whole_noise_only_if_all_are_honest():
    rng = np.random.default_rng(0)
    shares = rng.normal(scale=2.0 / math.sqrt(10), size=(10, 100_000))
    for num_honest in (10, 7, 1):
        left = shares[:num_honest].sum(0).std()  # relative error 1 / sqrt(2 n) = 0.22 %, six of them below 1.5 %
        claimed = distributed_multiplier(2.0, num_shares=10, num_honest=num_honest)
        assert left == pytest.approx(claimed, rel=0.015)
    assert distributed_multiplier(2.0, num_shares=7, num_honest=10) == 2.0
    for bad in ({"num_shares": 0, "num_honest": 1}, {"num_shares": 2, "num_honest": 0}):
        with pytest.raises(ValueError, match=r"^num_"):
            distributed_multiplier(1.0, **bad)


BAD = [
    *(("unit", {"unit": value}) for value in ("patient", "")),
    *(("epsilon", {"epsilon": value}) for value in (0, -1.0, math.inf, math.nan, 1000.0, None)),
    ("epsilon", {"noise_multiplier": 1.0}),
    *(("noise_multiplier", {"epsilon": None, "noise_multiplier": value}) for value in (0, -1.0, math.inf, math.nan)),
    ("epsilon", {"epsilon": 60.0, "num_steps": 1}),  # less noise than the least multiplier would do
    *(("delta", {"delta": value}) for value in (0, 1, -1e-5, 1.5, math.nan)),
    ("delta", {"epsilon": 25.0, "num_units": 941}),  # overfull batches alone cost more
    *(("sampling_rate", {"sampling_rate": value}) for value in (0, -0.1, 1.01, math.nan, None)),
    *(("num_steps", {"num_steps": value}) for value in (0, -3, 2.5)),
    *(("histogram_epsilon", {"histogram_epsilon": value}) for value in (-0.1, 1.0, 2.0, math.nan)),
    *(("histogram_epsilon", given | {"histogram_epsilon": 0.5, "relation": "replace_one"}) for given in (GIVEN, FIXED)),
    ("histogram_epsilon", {"histogram_epsilon": 0.1, "unit": "client"}),  # a client moves a count by more than one
    *(("count_noise_stddev", {"count_noise_stddev": value}) for value in (-1.0, math.nan)),
    ("sampling", {"sampling": "uniform"}),
    ("relation", {"relation": "swap"}),
    ("relation", SHUFFLE | {"relation": "add_or_remove_one"}),
    *(("relation", FIXED | {"relation": value}) for value in ("add_or_remove_one", "zero_out")),
    ("batch_size", {"batch_size": 5}),
    *(("batch_size", FIXED | {"batch_size": value}) for value in (None, 0, 101, 2.5)),
    ("num_units", FIXED | {"num_units": None}),
    ("num_units", {"num_units": 0}),
    ("sampling_rate", FIXED | {"sampling_rate": 0.1}),
]


@pytest.mark.parametrize(("name", "changes"), BAD)
def test_a_bad_argument_is_named_in_one_line(name, changes):
    with pytest.raises(ValueError, match=f"^{name} is .*: must be ") as error:
        make_plan(**(GIVEN | {"epsilon": 1.0} | changes))
    assert "\n" not in str(error.value)


def test_an_event_that_an_accountant_does_not_know_is_refused():
    for sampling, relation, accountant in (
        ("fixed_size", "replace_one", "pld"),
        ("fixed_size", "add_or_remove_one", "rdp"),
        ("poisson", "replace_one", "rdp"),
    ):
        with pytest.raises(ValueError, match=r"^accountant is "):
            releases = [(Event("gaussian", 1.0, sampling, 0.1), 1)]
            total_epsilon(releases, relation=relation, delta=1e-4, accountant=accountant)


@pytest.mark.parametrize(
    ("named", "event", "count", "delta"),
    [
        ("kind", Event("Laplace", 10.0), 1, 1e-4),  # or it would pass for a Gaussian
        ("sampling", Event("gaussian", 1.0, "Poisson", 0.1), 1, 1e-4),
        ("noise_multiplier", Event("gaussian", 0.0), 1, 1e-4),
        ("truncation_probability", Event("gaussian", 1.0, "poisson", 0.1, -1e-6), 1, 1e-4),
        ("count", Event("gaussian", 1.0), -1, 1e-4),
        *(("delta", Event("gaussian", 1.0), 1, delta) for delta in (0.0, 1.0, 1.5, math.nan)),
    ],
)
def test_releases_that_make_no_sense_have_no_epsilon(named, event, count, delta):
    with pytest.raises(ValueError, match=rf"^{named} is "):
        total_epsilon([(Event("gaussian", 1.0), 2), (event, count)], relation="zero_out", delta=delta, accountant="pld")


def test_the_joint_multiplier_of_an_unknown_relation_is_refused():
    with pytest.raises(ValueError, match=r"^relation is 'replace'"):
        joint_multiplier(1.5, 2.0, "replace")
