"""Who enters a step: random subsets with a fixed capacity, drawn as they are accounted for."""

import numpy as np

from fedrobust import check
from fedrobust.types import Sampler

TAIL = 1e-12
"""Bound on the probability that a Poisson draw does not fit. Not 1e-9: delta pays (1 + e^epsilon) times it per draw,
which at epsilon 8 and 1 000 draws is 3e-3 for 1e-9 and 3e-6 for 1e-12, and the capacity grows by a tenth only."""


def poisson(rate: float, num_units: int, *, multiple: int) -> Sampler:
    """Every unit enters independently.

    Args:
        rate: in (0, 1].
        num_units: the largest population to draw from, >= 1.
        multiple: the capacity is rounded up to a multiple of this, >= 1.

    Returns:
        A `Sampler` for populations of 1 to `num_units`. Its capacity is the smallest that a draw exceeds with a
        probability of at most `TAIL`, before rounding; a draw that exceeds it is cut.

    Raises:
        ValueError: an argument out of its range.
    """
    from scipy.stats import binom  # takes half a second to import

    check.fraction("rate", rate, zero=False)
    check.at_least("num_units", num_units, 1)
    check.at_least("multiple", multiple, 1)
    capacity = -(-max(1, int(binom.isf(TAIL, num_units, rate))) // multiple) * multiple

    def draw(rng: np.random.Generator, num: int) -> np.ndarray:
        return np.flatnonzero(rng.random(num) < rate)[:capacity]

    return Sampler(draw, capacity, float(binom.sf(capacity, num_units, rate)), range(1, num_units + 1))


def fixed_size(size: int, num_units: int) -> Sampler:
    """A uniform subset of a fixed size, without replacement.

    Args:
        size: in [1, num_units].
        num_units: the population, >= 1, public.

    Returns:
        A `Sampler` for populations of exactly `num_units`: with another one the rate would be another.

    Raises:
        ValueError: an argument out of its range.
    """
    check.at_least("num_units", num_units, 1)
    check.at_least("size", size, 1)
    check.require(size <= num_units, "size", size, f"<= num_units = {num_units}")

    def draw(rng: np.random.Generator, num: int) -> np.ndarray:
        return np.sort(rng.choice(num, size, replace=False))

    return Sampler(draw, size, 0.0, range(num_units, num_units + 1))
