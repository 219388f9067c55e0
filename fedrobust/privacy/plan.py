"""One plan makes the sampler, the noise and the accounting event, so that they cannot disagree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import dp_accounting
from dp_accounting import mechanism_calibration

from fedrobust import check
from fedrobust.privacy import accounting, sampling
from fedrobust.privacy.accounting import SAMPLINGS, Event
from fedrobust.privacy.clipping import RELATIONS
from fedrobust.types import Sampler

UNITS = ("record", "client")

# Which neighbouring relations a sampling has a proof for.
_PROVEN = {
    "poisson": RELATIONS,
    "fixed_size": ("replace_one",),  # the number of units is public, and stays
    "shuffle": ("replace_one", "zero_out"),  # a unit that comes or goes would move others to other batches
}


@dataclass(frozen=True)
class Plan:
    """What is sampled, what noise it gets, and what that costs. Made by `make_plan`.

    Attributes:
        unit: whose presence is hidden: one "record" of one silo, or one "client" with all its records.
        relation: what it is hidden from: "add_or_remove_one", "replace_one", "zero_out" (it is there but blank).
        sampling: "poisson": every unit enters every step independently. "fixed_size": a uniform subset.
            "shuffle": batches of shuffled epochs, NOT amplified: each unit is in one step of every epoch.
        sampling_rate: q in (0, 1], the share of the units in a step.
        num_steps: T, the number of noised sums that are released.
        noise_multiplier: standard deviation of the noise over the sensitivity of the sum, for this relation.
        histogram_epsilon: privacy spent on the label counts released once with Laplace noise of scale
            1 / histogram_epsilon; 0 where none are released.
        epsilon: what all of this costs together, at `delta`.
        delta: in (0, 1), the truncation of overfull batches included.
        num_units: the public number of units to sample from. Where several silos share the plan, the largest silo's;
            for "shuffle" the smallest's, whose epochs end first. None where the plan makes no sampler.
        count_noise_stddev: noise, in units, on the count of unclipped units that is released with every sum for
            adaptive clipping; 0 where none is.
        truncation_probability: of one step, that a Poisson draw exceeds its capacity; paid out of delta.
        accountant: "pld" or "rdp", which found epsilon.
    """

    unit: str
    relation: str
    sampling: str
    sampling_rate: float
    num_steps: int
    noise_multiplier: float
    histogram_epsilon: float
    epsilon: float
    delta: float
    num_units: int | None = None
    count_noise_stddev: float = 0.0
    truncation_probability: float = 0.0
    accountant: str = "pld"

    @property
    def event(self) -> Event:
        """One step: the noised sum, and the noised count where one goes with it."""
        multiplier = joint_multiplier(self.noise_multiplier, self.count_noise_stddev, self.relation)
        return Event("gaussian", multiplier, self.sampling, self.sampling_rate, self.truncation_probability)

    @property
    def histogram_event(self) -> Event | None:
        """The label counts; None where none are released. Replacing a record moves two counts."""
        if self.histogram_epsilon == 0:
            return None
        return Event("laplace", 1 / (self.histogram_epsilon * (2 if self.relation == "replace_one" else 1)))

    @property
    def sampler(self) -> Sampler:
        """Draws one step's units.

        Raises:
            ValueError: the plan names no num_units; or shuffled epochs, which no single draw can make: they come from
                `CohortSettings(batch_sampling="shuffle", batch_size=round(plan.sampling_rate * plan.num_units))`.
        """
        check.one_of("plan.sampling", self.sampling, ("poisson", "fixed_size"))
        if self.num_units is None:
            raise ValueError("plan.num_units is None: must be given to make_plan for a sampler")
        if self.sampling == "fixed_size":
            return sampling.fixed_size(round(self.sampling_rate * self.num_units), self.num_units)
        return sampling.poisson(self.sampling_rate, self.num_units, multiple=_MULTIPLE[self.unit])


_MULTIPLE = {"record": 8, "client": 1}  # batches are padded to what vector units like, cohorts to nothing


def joint_multiplier(noise_multiplier: float, count_noise_stddev: float, relation: str) -> float:
    """The multiplier of one Gaussian that costs what the noised sum and the noised count cost together.

    The count is of indicators less 1/2, so a unit that comes or goes moves it by 1/2 and one that is replaced by 1.
    Scaled by their noise, sum and count are one vector.

        z_joint = (z^-2 + (sensitivity / count_noise_stddev)^2)^(-1/2)

    Args:
        noise_multiplier: z > 0, of the sum.
        count_noise_stddev: > 0 in units, or 0 where no count is released.
        relation: one of `RELATIONS`.

    Raises:
        ValueError: an unknown relation.

    Source: Andrew et al. 2021 (arXiv 1905.03871), theorem 1.
    """
    check.one_of("relation", relation, RELATIONS)
    if count_noise_stddev == 0:
        return noise_multiplier
    return (noise_multiplier**-2 + _count_share(count_noise_stddev, relation)) ** -0.5


def _count_share(count_noise_stddev: float, relation: str) -> float:
    """The squared sensitivity of the count in units of its noise."""
    return ((1.0 if relation == "replace_one" else 0.5) / count_noise_stddev) ** 2


def epsilon_spent(plan: Plan, *, num_steps: int | None = None) -> float:
    """Epsilon of a plan, or of its first steps.

    Args:
        plan: what is done; its `epsilon` is not read.
        num_steps: how many steps have been taken, >= 0; None for all. Label counts are always included.

    Returns:
        Epsilon >= 0 at `plan.delta`.
    """
    histogram = plan.histogram_event
    releases = [(plan.event, plan.num_steps if num_steps is None else num_steps)]
    releases += [] if histogram is None else [(histogram, 1)]
    return accounting.total_epsilon(releases, relation=plan.relation, delta=plan.delta, accountant=plan.accountant)


def make_plan(
    *,
    unit: str,
    relation: str,
    sampling: str,
    delta: float,
    num_steps: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    sampling_rate: float | None = None,
    batch_size: int | None = None,
    num_units: int | None = None,
    histogram_epsilon: float = 0.0,
    count_noise_stddev: float = 0.0,
) -> Plan:
    """The least noise that keeps T steps within (epsilon, delta), or what a given noise costs.

    A Poisson batch has a fixed capacity. Should a draw ever exceed it, the excess is left out and the mechanism is no
    longer the one accounted. With p the probability of that in any step, the two differ by at most p in total
    variation, so (1 + e^epsilon) p is taken out of delta first.

    Args:
        unit: "record" (inside one silo) or "client".
        relation: "add_or_remove_one", "replace_one" or "zero_out". "poisson" takes any; "fixed_size" only
            "replace_one"; "shuffle" "replace_one" or "zero_out". Sums noised for "replace_one" have twice the
            sensitivity, so an equal multiplier is twice the noise.
        sampling: "poisson", "fixed_size" or "shuffle".
        delta: in (0, 1).
        num_steps: T >= 1.
        epsilon: in (0, 100], the whole budget; the noise follows. Or
        noise_multiplier: > 0; epsilon follows.
        sampling_rate: q in (0, 1], for "poisson".
        batch_size: units in a step, in [1, num_units], for "fixed_size" and "shuffle".
        num_units: >= 1, see `Plan`; needed with batch_size and for `plan.sampler`.
        histogram_epsilon: in [0, epsilon), part of the budget for label counts, see `Plan`; for "replace_one", which
            moves two counts, below epsilon / 2; 0 for "client", whose presence changes a count by more than one.
        count_noise_stddev: > 0 where adaptive clipping releases a count with every sum, see `Plan`; the sum and the
            count are within the budget together.

    Returns:
        A `Plan` whose `epsilon` is what is really spent, at most the budget. Found by privacy loss distributions,
        for "fixed_size" by Renyi divergences, for which alone its amplification is proven.

    Raises:
        ValueError: a setting out of its range, missing or superfluous; delta used up by truncation; a budget that the
            count alone exceeds, or that needs less noise than a multiplier of 0.2.

    Source: see `accounting.total_epsilon`; a blanked record is dominated by the pair of distributions that one which
        appears is, so "zero_out" costs what "add_or_remove_one" does (Kairouz et al. 2021, arXiv 2103.00039).
    """
    check.one_of("unit", unit, UNITS)
    check.one_of("sampling", sampling, SAMPLINGS)
    check.one_of("relation", relation, _PROVEN[sampling])
    check.fraction("delta", delta, zero=False, one=False)
    check.at_least("num_steps", num_steps, 1)
    check.non_negative("count_noise_stddev", count_noise_stddev)
    check.non_negative("histogram_epsilon", histogram_epsilon)
    check.require(unit == "record" or histogram_epsilon == 0, "histogram_epsilon", histogram_epsilon, "0 for clients")
    rate = _rate(sampling, sampling_rate, batch_size, num_units)
    accountant = "rdp" if sampling == "fixed_size" else "pld"
    plan = Plan(
        unit, relation, sampling, rate, num_steps, 1.0, histogram_epsilon, math.inf, delta,
        num_units, count_noise_stddev, 0.0, accountant,
    )  # fmt: skip
    if sampling == "poisson" and num_units is not None:
        plan = replace(plan, truncation_probability=plan.sampler.tail)
    check.require((epsilon is None) != (noise_multiplier is None), "epsilon", epsilon, "given or noise_multiplier is")
    if noise_multiplier is not None:
        check.positive("noise_multiplier", noise_multiplier)
        plan = replace(plan, noise_multiplier=float(noise_multiplier))
    else:
        assert epsilon is not None
        plan = replace(plan, noise_multiplier=_calibrated(plan, epsilon))
        while (spent := epsilon_spent(plan)) > epsilon:  # below a delta of 1e-12 the search's grid bounds a little less
            check.require(spent < math.inf, "delta", delta, "more, what the accountant leaves out is as much")
            plan = replace(plan, noise_multiplier=1.001 * plan.noise_multiplier)
    return replace(plan, epsilon=epsilon_spent(plan))


def _rate(sampling: str, sampling_rate: float | None, batch_size: int | None, num_units: int | None) -> float:
    """The share of units in a step, from what its sampling is described by."""
    if num_units is not None:
        check.at_least("num_units", num_units, 1)
    if sampling == "poisson":
        check.require(batch_size is None, "batch_size", batch_size, "None for poisson, whose batches have no size")
        check.require(sampling_rate is not None, "sampling_rate", sampling_rate, "given for poisson")
        assert sampling_rate is not None
        check.fraction("sampling_rate", sampling_rate, zero=False)
        return sampling_rate
    check.require(sampling_rate is None, "sampling_rate", sampling_rate, f"None for {sampling}: give batch_size")
    check.require(num_units is not None, "num_units", num_units, f"given for {sampling}")
    check.require(batch_size is not None, "batch_size", batch_size, f"given for {sampling}")
    assert batch_size is not None and num_units is not None
    check.at_least("batch_size", batch_size, 1)
    check.require(batch_size <= num_units, "batch_size", batch_size, f"<= num_units = {num_units}")
    return batch_size / num_units


def _calibrated(plan: Plan, epsilon: float) -> float:
    """The least noise multiplier of the sum within (epsilon, plan.delta), to 1e-3 and never below it.

    The search runs on a grid of privacy losses ten times coarser than the one that tells the epsilon: ten times
    faster, and still an upper bound, so that it can only ask for a little more noise than needed.
    """
    check.require(0 < epsilon <= 100, "epsilon", epsilon, "in (0, 100]")
    allowed = "epsilon / 2" if plan.relation == "replace_one" else "epsilon"
    histogram = plan.histogram_event
    fits = histogram is None or 1 / histogram.noise_multiplier < epsilon
    check.require(fits, "histogram_epsilon", plan.histogram_epsilon, f"in [0, {allowed})")
    truncated = (1 + math.exp(epsilon)) * plan.truncation_probability * plan.num_steps
    allowed = f"> {truncated:.2g}, what overfull batches cost at this epsilon"
    check.require(plan.delta > truncated, "delta", plan.delta, allowed)

    def releases(joint: float) -> dp_accounting.DpEvent:
        step = plan.event._replace(noise_multiplier=joint)
        every = [(step, plan.num_steps)] + ([] if histogram is None else [(histogram, 1)])
        return accounting.composed(every, plan.relation, plan.accountant)

    try:
        joint = dp_accounting.calibrate_dp_mechanism(
            lambda: accounting.new_accountant(plan.accountant, plan.relation, 1e-3),
            releases,
            epsilon,
            plan.delta - truncated,
            dp_accounting.LowerEndpointAndGuess(0.2, 1.0),
            tol=1e-3,
        )
    except mechanism_calibration.NoBracketIntervalFoundError:
        allowed = "what a noise multiplier above 0.2 reaches with this sampling_rate and num_steps"
        raise ValueError(f"epsilon is {epsilon!r}: must be {allowed}") from None
    if plan.count_noise_stddev == 0:
        return joint
    left = joint**-2 - _count_share(plan.count_noise_stddev, plan.relation)
    check.require(left > 0, "count_noise_stddev", plan.count_noise_stddev, "more, the count alone exceeds the budget")
    return left**-0.5


def federation_epsilon(plans: Sequence[Plan]) -> float:
    """What a federation costs one record, where each silo follows its own plan.

    A record lies in one silo, and whatever the other silos release does not depend on it: the guarantee of a silo
    holds against the server and all other silos together, and the federation's is that of the largest. Three
    conditions: silos are disjoint (a patient in two of them pays both); each silo noises before anything leaves it;
    what a silo does depends on the others through their releases alone.

    Args:
        plans: one per silo, of unit "record", one relation and one delta.

    Returns:
        The largest epsilon.

    Raises:
        ValueError: no plan, or plans that state different guarantees.
    """
    check.require(len(plans) > 0, "plans", len(plans), "at least one")
    for name, allowed in (("unit", "record"), ("relation", plans[0].relation), ("delta", plans[0].delta)):
        for plan in plans:
            check.require(getattr(plan, name) == allowed, f"plan.{name}", getattr(plan, name), f"{allowed!r} for all")
    return max(plan.epsilon for plan in plans)


def distributed_multiplier(noise_multiplier: float, *, num_shares: int, num_honest: int) -> float:
    """The noise multiplier that is left of a noise that many clients add in shares.

    Each of `num_shares` clients adds 1 / num_shares of the variance, and a secure sum shows the total alone. Clients
    that drop out take their share with them, and those that collude with the server know theirs. So shares are to be
    made for the least number of honest clients one is ready to trust in (`num_shares = num_honest` gives the whole
    noise; more clients then add more than the plan asks for).

    Args:
        noise_multiplier: of the whole noise, > 0.
        num_shares: how many clients the variance is divided by, >= 1.
        num_honest: how many of them are present and do not collude, >= 1.

    Returns:
        noise_multiplier * sqrt(min(num_honest, num_shares) / num_shares): what may be claimed.

    Raises:
        ValueError: an argument out of its range.

    Source: Kairouz, Liu, Steinke 2021 (arXiv 2102.06387), section 2, for distributed noise under secure aggregation.
    """
    check.positive("noise_multiplier", noise_multiplier)
    check.at_least("num_shares", num_shares, 1)
    check.at_least("num_honest", num_honest, 1)
    return noise_multiplier * math.sqrt(min(num_honest, num_shares) / num_shares)
