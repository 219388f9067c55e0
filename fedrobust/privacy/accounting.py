"""What releases cost together: events in plain numbers, composed by dp-accounting."""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import dp_accounting
from dp_accounting import pld, rdp

from fedrobust import check
from fedrobust.privacy.clipping import RELATIONS

ACCOUNTANTS = ("pld", "rdp")
"""Privacy loss distributions: tight. Renyi divergences: the only ones known for batches of a fixed size."""

SAMPLINGS = ("poisson", "fixed_size", "shuffle")
"""How units enter a step: each independently; a uniform subset; batches of shuffled epochs, which amplify nothing."""

# One unit of noise multiplier is one sensitivity here; see `_dp_event` for the accountants' own units.
_RELATIONS = dict(
    zip(
        RELATIONS,
        (
            dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
            dp_accounting.NeighboringRelation.REPLACE_ONE,
            dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
        ),
        strict=True,
    )
)


class Event(NamedTuple):
    """One release, as the accountants and the ledger know it.

    Attributes:
        kind: "gaussian" or "laplace".
        noise_multiplier: standard deviation (gaussian) or scale (laplace) of the noise over the L2 or L1 sensitivity
            of what is released, for the relation in force; > 0.
        sampling: "none", or one of `SAMPLINGS` for "gaussian".
        sampling_rate: in (0, 1]: the chance of a unit to enter a step; 1 for "none".
        truncation_probability: in [0, 1), the chance that this release is not the one accounted for, because a
            Poisson draw exceeded its capacity.
    """

    kind: str
    noise_multiplier: float
    sampling: str = "none"
    sampling_rate: float = 1.0
    truncation_probability: float = 0.0


GRID = 1e-4
"""Discretization of privacy losses that every epsilon is told with; coarser ones are faster and never smaller."""

Releases = Sequence[tuple[Event, int]]
"""Events and how many of each."""


def check_event(event: Event) -> None:
    """Checks the fields of an event.

    Raises:
        ValueError: one of them is out of its range, or sampling of something that is not gaussian.
    """
    check.one_of("kind", event.kind, ("gaussian", "laplace"))
    check.one_of("sampling", event.sampling, ("none", *(SAMPLINGS if event.kind == "gaussian" else ())))
    check.positive("noise_multiplier", event.noise_multiplier)
    check.fraction("sampling_rate", event.sampling_rate, zero=False)
    check.require(event.sampling != "none" or event.sampling_rate == 1, "sampling_rate", event.sampling_rate, "1")
    check.fraction("truncation_probability", event.truncation_probability, one=False)


def accountant_for(events: Sequence[Event]) -> str:
    """The tightest accountant that knows all of these events."""
    return "rdp" if any(event.sampling == "fixed_size" for event in events) else "pld"


def total_epsilon(releases: Releases, *, relation: str, delta: float, accountant: str, grid: float = GRID) -> float:
    """Epsilon of all releases together, an upper bound.

    The releases may be chosen adaptively, each from the results of those before. Overfull Poisson draws: with p the
    sum of their probabilities, the real outputs and the accounted ones differ by at most p in total variation, so
    (1 + e^epsilon) p of delta is theirs.

    Args:
        releases: events and counts >= 0. Counts of "shuffle" events are the consecutive steps of ONE run from its
            start: of `ceil(1 / sampling_rate)` such steps each unit is in one.
        relation: one of `RELATIONS`.
        delta: in (0, 1).
        accountant: "pld" or "rdp".
        grid: discretization of privacy losses, for "pld"; coarser is faster and gives a larger epsilon.

    Returns:
        Epsilon >= 0; inf where delta is used up.

    Raises:
        ValueError: an argument out of its range, or an event that the accountant does not know for this relation.

    Source: Google dp-accounting, privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049; Doroshenko et al.
        2022, arXiv 2207.04380); Renyi (Mironov 2017, arXiv 1702.07476; without replacement: Wang, Balle,
        Kasiviswanathan 2019, arXiv 1808.00087, theorem 27).
    """
    check.fraction("delta", delta, zero=False, one=False)
    counts: Counter[Event] = Counter()
    kept: list[tuple[Event, int]] = []
    for event, count in releases:
        check_event(event)
        check.require(count >= 0, "count", count, ">= 0")
        if event.sampling == "shuffle":
            kept.append((event, count))  # runs apart: together they would seem to share an epoch
        else:
            counts[event] += count
    return _total_epsilon(tuple(sorted([*kept, *counts.items()])), relation, delta, accountant, grid)


# Seconds each, and silos that do the same, their plan and their ledger ask for the same. Not `threads.cached`: whoever
# charges holds the ledger's lock, and must not wait there for a thread that compiles.
@functools.lru_cache(maxsize=64)
def _total_epsilon(
    releases: tuple[tuple[Event, int], ...], relation: str, delta: float, accountant: str, grid: float
) -> float:
    composed_event = composed(releases, relation, accountant)
    found = new_accountant(accountant, relation, grid)
    if not found.supports(composed_event):
        names = ", ".join(sorted({event.sampling for event, _ in releases}))
        raise ValueError(f"accountant is {accountant!r}: must know {names} under {relation}")
    found.compose(composed_event)
    truncation = sum(event.truncation_probability * count for event, count in releases)
    if truncation == 0:
        return float(found.get_epsilon(delta))
    # The least epsilon with delta(epsilon) + (1 + e^epsilon) truncation <= delta, from below; `enough` checks it.
    epsilon, enough = -math.inf, 0.0
    while enough > epsilon:
        epsilon = enough * (1 + 1e-9)
        left = delta - (1 + math.exp(min(epsilon, 700))) * truncation
        if left <= 0:
            return math.inf
        enough = float(found.get_epsilon(left))
    return epsilon


def new_accountant(name: str, relation: str, grid: float) -> dp_accounting.PrivacyAccountant:
    """An empty accountant; arguments as `total_epsilon`."""
    check.one_of("accountant", name, ACCOUNTANTS)
    check.one_of("relation", relation, RELATIONS)
    if name == "pld":
        return pld.PLDAccountant(_RELATIONS[relation], value_discretization_interval=grid)
    return rdp.RdpAccountant(neighboring_relation=_RELATIONS[relation])


def composed(releases: Releases, relation: str, accountant: str) -> dp_accounting.DpEvent:
    """All releases as one event of dp-accounting; arguments as `total_epsilon`."""
    events = [
        dp_accounting.SelfComposedDpEvent(_dp_event(event, relation, accountant), _num_participations(event, count))
        for event, count in releases
        if count > 0
    ]
    return dp_accounting.ComposedDpEvent(events)


def _num_participations(event: Event, count: int) -> int:
    """How many of `count` steps one unit can be in, as far as accounting knows."""
    if event.sampling != "shuffle":
        return count
    steps_per_epoch = max(1, math.ceil(1 / event.sampling_rate - 1e-9))  # never one too many: that would count too few
    return -(-count // steps_per_epoch)


def _dp_event(event: Event, relation: str, accountant: str) -> dp_accounting.DpEvent:
    """The event in dp-accounting's units.

    Its multiplier of Gaussian noise is over the norm bound C of one contribution. That is our sensitivity where a
    unit appears or is blanked. Where it is replaced the sensitivity is 2 C, and the two accountants differ: PLD then
    takes the worst pair at a distance of 2 C, so its multiplier is twice ours; RDP takes a distance of one multiplier
    whatever the relation, as theorem 27 needs for fixed sizes, so its multiplier is ours. Tests hold both to the
    closed form of the unsampled Gaussian.
    """
    if event.kind == "laplace":
        if relation != "replace_one":
            return dp_accounting.LaplaceDpEvent(event.noise_multiplier)
        # PLD knows no Laplace here; randomized response dominates all that is 1 / multiplier-DP (Kairouz et al. 2015).
        flip = 2 / (1 + math.exp(min(1 / event.noise_multiplier, 700)))
        return dp_accounting.RandomizedResponseDpEvent(flip, 2)
    twice = accountant == "pld" and relation == "replace_one"
    gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier * (2 if twice else 1))
    if event.sampling == "poisson":
        return dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
    if event.sampling == "fixed_size":
        # Only the ratio counts; the accountant wants whole numbers but divides them, so a fraction over one will do.
        return dp_accounting.SampledWithoutReplacementDpEvent(1, event.sampling_rate, gaussian)  # type: ignore[arg-type]
    return gaussian
