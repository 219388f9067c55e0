"""Bounds on a rate from counts of independent trials, and on a mean from a few values, in float64 on the host.

And on a number as people read it.
"""

import decimal

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


def of_mean(values: npt.ArrayLike, confidence: float) -> tuple[float, float]:
    """The interval around the mean of a few values in which the mean of all such values lies, two-sided.

    Args:
        values: [n] float, n >= 2, independent draws from one normal distribution.
        confidence: in (0, 1).

    Returns:
        `(low, high)`, which misses the true mean with probability 1 - confidence.

    Raises:
        ValueError: an argument out of its range.

    Source: Student 1908, "The probable error of a mean" (Biometrika 6).

    >>> tuple(round(float(x), 3) for x in of_mean([0.0, 2.0], 0.5))  # t with one degree of freedom: quartiles at -1, 1
    (0.0, 2.0)
    """
    from scipy.stats import t  # takes half a second to import

    check.fraction("confidence", confidence, zero=False, one=False)
    values = np.asarray(values, np.float64)
    finite = values.ndim == 1 and values.size >= 2 and bool(np.isfinite(values).all())
    check.require(finite, "values", values.tolist(), "at least two finite numbers")
    half = t.ppf((1 + confidence) / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    return float(values.mean() - half), float(values.mean() + half)


def upper_text(value: float, digits: int) -> str:
    """A number in few digits, never less than it is, for bounds such as an epsilon.

    Args:
        value: any number, no NaN.
        digits: significant ones, >= 1.

    Returns:
        The text of the smallest number of so many digits that is not below the shortest text of `value`.

    >>> upper_text(7.9921, 3), upper_text(8.0, 3), upper_text(float("inf"), 3)
    ('8', '8', 'inf')
    """
    rounded = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING).create_decimal(repr(float(value)))
    return f"{float(rounded):.{digits}g}"


def _checked(count: npt.ArrayLike, total: npt.ArrayLike, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    check.fraction("confidence", confidence, zero=False, one=False)
    count, total = np.asarray(count), np.asarray(total)
    check.require(bool((total >= 1).all()), "total", total.min(initial=1), ">= 1")
    inside = bool(((count >= 0) & (count <= total)).all())
    check.require(inside, "count", count.tolist(), f"in [0, total = {total.tolist()}]")
    return count, total
