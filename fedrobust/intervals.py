"""Exact bounds on a rate from counts of independent trials, in float64 on the host."""

import numpy as np
import numpy.typing as npt

from fedrobust import check


def upper(count: npt.ArrayLike, total: npt.ArrayLike, confidence: float) -> np.ndarray:
    """The largest rate that so few successes do not contradict, one-sided.

    Args:
        count: [...] int, successes in [0, total].
        total: [...] int, trials >= 1, independent and of one rate.
        confidence: in (0, 1).

    Returns:
        [...] float64 in (0, 1]; 1 where every trial succeeded. The true rate lies above it with probability at most
        1 - confidence.

    Raises:
        ValueError: an argument out of its range.

    Source: Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the
        binomial" (Biometrika 26), by quantiles of the beta distribution.

    >>> float(upper(0, 1, 0.95).round(12))
    0.95
    """
    from scipy.stats import beta  # takes half a second to import

    count, total = _checked(count, total, confidence)
    return np.where(count < total, beta.ppf(confidence, count + 1, np.maximum(total - count, 1)), 1.0)


def lower(count: npt.ArrayLike, total: npt.ArrayLike, confidence: float) -> np.ndarray:
    """The smallest rate that so many successes do not contradict, one-sided: `1 - upper(total - count)`.

    Args:
        count: as for `upper`.
        total: as for `upper`.
        confidence: as for `upper`.

    Returns:
        [...] float64 in [0, 1); 0 where no trial succeeded. The true rate lies below it with probability at most
        1 - confidence.

    Raises:
        ValueError: an argument out of its range.

    Source: as `upper`.

    >>> float(lower(1, 1, 0.95).round(12))
    0.05
    """
    from scipy.stats import beta  # takes half a second to import

    count, total = _checked(count, total, confidence)
    return np.where(count > 0, beta.ppf(1 - confidence, np.maximum(count, 1), total - count + 1), 0.0)


def _checked(count: npt.ArrayLike, total: npt.ArrayLike, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    check.fraction("confidence", confidence, zero=False, one=False)
    count, total = np.asarray(count), np.asarray(total)
    check.require(bool((total >= 1).all()), "total", total.min(initial=1), ">= 1")
    inside = bool(((count >= 0) & (count <= total)).all())
    check.require(inside, "count", count.tolist(), f"in [0, total = {total.tolist()}]")
    return count, total
