"""The discrete Gaussian, sampled exactly: noise on integers, out of reach of attacks on floating point."""

import decimal
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from fedrobust import check

Words = Callable[[int], np.ndarray]
"""`size -> [size] uint64`, uniform and independent: `system_words`, or a generator's in tests."""

# Bound on the error of a probability computed in float64, over 1 plus the size of the terms of its exponent. The true
# error is below 2^-50 of that. How often the slow way is taken follows from it, the distribution does not.
_FILTER = 2.0**-44


def discrete_gaussian(words: Words, size: int, *, variance: Fraction) -> np.ndarray:
    """Exact samples of the discrete Gaussian: P[X = x] proportional to exp(-x^2 / (2 variance)), x any integer.

    Args:
        words: the randomness, `system_words` in deployment.
        size: number of independent samples, >= 0.
        variance: sigma^2, the distribution's parameter, in [2^-20, 2^60]; that of the samples is at most this.

    Returns:
        [size] int64.

    Raises:
        ValueError: variance out of range.

    Guarantees:
        Exact, given uniform words. A proposal is accepted if an infinite binary fraction drawn bit by bit lies below a
        probability p. Float64 decides where the fraction's first 64 bits and a bound on the rounding of p leave no
        doubt, all but about 1 in 2^40; otherwise p is bounded in integer arithmetic of growing precision. Both ways
        give the same answer, so rounding never reaches the result. Not constant-time: how long it takes tells
        something about the samples.

    Source: Canonne, Kamath, Steinke 2020 (arXiv 2004.00010), Algorithm 3. Its discrete Laplace proposal's first
        rejection (exp(-U/t)) and its own are made at once: the product of both probabilities.
    """
    check.require(2**-20 <= variance <= 2**60, "variance", variance, "in [2^-20, 2^60]")
    variance = Fraction(variance)
    scale = math.isqrt(math.floor(variance)) + 1  # t = floor(sigma) + 1
    samples = [np.zeros(0, np.int64)]
    while (missing := size - sum(map(len, samples))) > 0:
        samples.append(_accepted(words, 2 * missing + 16, variance, scale)[:missing])
    return np.concatenate(samples)


def _accepted(words: Words, num_proposals: int, variance: Fraction, scale: int) -> np.ndarray:
    """What is left of so many proposals: integers of mass proportional to exp(-floor(|x| / t)), then thinned.

    |x| = u + t v is accepted with probability exp(-(x^2 / (2 sigma^2) + sigma^2 / (2 t^2) - v)), at most 1.
    """
    word = words(num_proposals)
    limit = 2**63 // scale * scale  # words beyond it would favour small residues
    sign = np.where(word >> np.uint64(63), -1, 1)
    word = word & np.uint64(2**63 - 1)
    fits = word < limit
    u = (word % np.uint64(scale)).astype(np.int64)
    v = _geometric(words, num_proposals)
    magnitude = u + scale * v
    keep = fits & ~((sign < 0) & (magnitude == 0))  # zero has one sign
    magnitude, v, sign = magnitude[keep], v[keep], sign[keep]
    square = magnitude.astype(np.float64) ** 2 / (2 * float(variance))
    rest = variance / (2 * scale**2)

    def exponent(i: int) -> Fraction:
        return Fraction(int(magnitude[i]) ** 2) / (2 * variance) + rest - int(v[i])

    terms = square + float(rest) + v
    return (sign * magnitude)[_below_exp(words, square + float(rest) - v, terms, exponent)]


def _geometric(words: Words, size: int) -> np.ndarray:
    """[size] int64: how many heads before the first tail of a coin with P[head] = exp(-1)."""
    count = np.zeros(size, np.int64)
    alive = np.arange(size)
    while len(alive):
        ones = np.ones(len(alive))
        alive = alive[_below_exp(words, ones, ones, lambda _: Fraction(1))]
        count[alive] += 1
    return count


def _below_exp(words: Words, gamma: np.ndarray, terms: np.ndarray, exact: Callable[[int], Fraction]) -> np.ndarray:
    """Independent coins with P[True] = exp(-gamma).

    Args:
        words: the randomness.
        gamma: [n] float64, the exponents >= 0 to float precision.
        terms: [n] float64, the sum of the sizes of the terms that gamma was computed from.
        exact: `i -> gamma[i]` without error.
    """
    word = words(len(gamma))
    uniform = word.astype(np.float64) * 2.0**-64
    margin = uniform - np.exp(-gamma)
    below = margin < 0
    for i in np.flatnonzero(np.abs(margin) <= _FILTER * (1 + terms)):
        below[i] = _fraction_below_exp(words, int(word[i]), exact(int(i)))
    return below


def _fraction_below_exp(words: Words, word: int, gamma: Fraction) -> bool:
    """Whether a binary fraction that begins with the 64 bits of `word` is below exp(-gamma)."""
    num_bits = 64
    while True:
        # `Decimal` rounds division and exp correctly, so one digit more than the bits need bounds both errors.
        with decimal.localcontext(decimal.Context(prec=num_bits // 3 + 20)) as context:
            exponent = -decimal.Decimal(gamma.numerator) / decimal.Decimal(gamma.denominator)
            value = Fraction(exponent.exp())
            error = (1 + gamma) / 10 ** (context.prec - 2)
        if Fraction(word + 1, 2**num_bits) <= value - error:
            return True
        if Fraction(word, 2**num_bits) >= value + error:
            return False
        word = (word << 64) + int(words(1)[0])
        num_bits += 64
