"""One plan makes the sampling rate, the noise and the accounting event, so that they cannot disagree."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import dp_accounting
from dp_accounting import mechanism_calibration, pld

from fedrobust import check

UNITS = ("record", "client")


@dataclass(frozen=True)
class Plan:
    """What is sampled, what noise it gets, and what that costs.

    Attributes:
        unit: whose presence is hidden: one "record" of one silo, or one "client" with all its records.
        relation: always "add_or_remove_one", the relation that Poisson amplification is proven for.
        sampling: always "poisson": every unit enters every step independently.
        sampling_rate: q in (0, 1].
        num_steps: T, the number of noised sums that are released.
        noise_multiplier: standard deviation of the noise over the sensitivity of the sum.
        histogram_epsilon: privacy spent on the label counts released once with Laplace noise of scale
            1 / histogram_epsilon; 0 where none are released.
        epsilon: what all of this costs together, at `delta`.
        delta: in (0, 1), the truncation of overfull batches included.
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


def _event(
    noise_multiplier: float, sampling_rate: float, num_steps: int, histogram_epsilon: float
) -> dp_accounting.DpEvent:
    """The accounting event of a plan: T sampled Gaussian sums, and the label counts if they are released."""
    step = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    steps = dp_accounting.SelfComposedDpEvent(step, num_steps)
    if histogram_epsilon == 0:
        return steps
    return dp_accounting.ComposedDpEvent([steps, dp_accounting.LaplaceDpEvent(1 / histogram_epsilon)])


def epsilon_spent(
    *, noise_multiplier: float, delta: float, sampling_rate: float, num_steps: int, histogram_epsilon: float = 0.0
) -> float:
    """Epsilon of a plan by the privacy-loss-distribution accountant (pessimistic rounding).

    Args:
        noise_multiplier: > 0.
        delta: in (0, 1).
        sampling_rate: q in (0, 1].
        num_steps: T >= 0.
        histogram_epsilon: >= 0, see `Plan`.

    Returns:
        Epsilon >= 0 for the relation "add_or_remove_one".
    """
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(_event(noise_multiplier, sampling_rate, num_steps, histogram_epsilon))
    return accountant.get_epsilon(delta)


def make_plan(
    *,
    unit: str,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    num_steps: int,
    histogram_epsilon: float = 0.0,
    truncation_probability: float = 0.0,
) -> Plan:
    """The least noise that keeps T Poisson-sampled steps within (epsilon, delta).

    A batch has a fixed capacity. Should a Poisson draw ever exceed it, the excess is left out and the mechanism
    is no longer the one accounted. With p the probability of that in any step, the two differ by at most p in
    total variation, so (1 + e^epsilon) p is taken out of delta first.

    Args:
        unit: "record" (inside one silo) or "client".
        epsilon: in (0, 100], the whole budget.
        delta: in (0, 1).
        sampling_rate: q in (0, 1].
        num_steps: T >= 1.
        histogram_epsilon: in [0, epsilon), part of the budget for label counts, see `Plan`; 0 for "client", whose
            presence changes a count by more than one.
        truncation_probability: p >= 0 over all steps together.

    Returns:
        A `Plan` whose `epsilon` is what is really spent, at most the budget.

    Raises:
        ValueError: a setting out of its range, delta used up by truncation, or an epsilon that needs less noise than
            a multiplier of 0.2.

    Source: accountant: Google dp-accounting, privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049;
        Doroshenko et al. 2022, arXiv 2207.04380).
    """
    check.one_of("unit", unit, UNITS)
    check.require(0 < epsilon <= 100, "epsilon", epsilon, "in (0, 100]")
    check.fraction("delta", delta, zero=False, one=False)
    check.fraction("sampling_rate", sampling_rate, zero=False)
    check.at_least("num_steps", num_steps, 1)
    check.require(0 <= histogram_epsilon < epsilon, "histogram_epsilon", histogram_epsilon, "in [0, epsilon)")
    check.require(unit == "record" or histogram_epsilon == 0, "histogram_epsilon", histogram_epsilon, "0 for clients")
    check.non_negative("truncation_probability", truncation_probability)
    truncated = (1 + math.exp(epsilon)) * truncation_probability
    check.require(delta > truncated, "delta", delta, f"> {truncated:.2g}, what overfull batches cost at this epsilon")
    accounted_delta = delta - truncated
    noise_multiplier = _calibrate(
        lambda sigma: _event(sigma, sampling_rate, num_steps, histogram_epsilon), epsilon, accounted_delta
    )
    spent = epsilon_spent(
        noise_multiplier=noise_multiplier,
        delta=accounted_delta,
        sampling_rate=sampling_rate,
        num_steps=num_steps,
        histogram_epsilon=histogram_epsilon,
    )
    return Plan(
        unit=unit,
        relation="add_or_remove_one",
        sampling="poisson",
        sampling_rate=sampling_rate,
        num_steps=num_steps,
        noise_multiplier=noise_multiplier,
        histogram_epsilon=histogram_epsilon,
        epsilon=spent,
        delta=delta,
    )


def _calibrate(make_event: Callable[[float], dp_accounting.DpEvent], epsilon: float, delta: float) -> float:
    """The least noise multiplier within (epsilon, delta), to 1e-3 and never below it.

    The search runs on a grid of privacy losses ten times coarser than the accountant's default: ten times faster,
    and still an upper bound, so that it can only ask for a little more noise than needed.
    """
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    try:
        return dp_accounting.calibrate_dp_mechanism(
            lambda: pld.PLDAccountant(relation, value_discretization_interval=1e-3),
            make_event,
            epsilon,
            delta,
            dp_accounting.LowerEndpointAndGuess(0.2, 1.0),
            tol=1e-3,
        )
    except mechanism_calibration.NoBracketIntervalFoundError:
        allowed = "what a noise multiplier above 0.2 reaches with this sampling_rate and num_steps"
        raise ValueError(f"epsilon is {epsilon!r}: must be {allowed}") from None
