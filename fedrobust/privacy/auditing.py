"""Lower bounds on epsilon, measured: what an attacker on canaries was able to tell apart.

Every function here answers: the largest epsilon that the observations contradict. On a mechanism that is
(epsilon, delta)-DP it answers more than epsilon with probability at most 1 - confidence.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, intervals
from fedrobust.types import Batch, GradFn, Key, Params


class Scores(NamedTuple):
    """An attacker's scores, larger where it believes that the canary was there.

    Attributes:
        inside: [N] float64, one for every independent run with the canary.
        outside: [M] float64, without.
    """

    inside: np.ndarray
    outside: np.ndarray


def one_step_scores(
    gradient: GradFn, key: Key, params: Params, without: Batch, canary: Batch, *, num_trials: int, chunk_size: int
) -> Scores:
    """Runs one private step again and again, with and without the canary, watched by an attacker who knows the rest.

    The attacker knows parameters, all other records and what the canary contributes, u, and scores an output y by
    <y - y0, u> / <u, u>, y0 a mean output without the canary. For the Gaussian mechanism with noise multiplier sigma
    and |u| at the clip norm, scores are N(s, sigma^2) without and N(1 + s, sigma^2) with it: nothing tells better.

    Args:
        gradient: the private gradient as it trains, a function of its key. A loss that draws (adversarial samples)
            must be given with its draws fixed: the attacker may know them, and trials get cheap.
        key: of all trials.
        params: of the model.
        without: [B] a batch, the canary's place padding.
        canary: the same batch with the canary in its place.
        num_trials: N >= 10 with and as many without.
        chunk_size: trials at a time; memory is O(chunk_size * D).

    Returns:
        Scores, [N] and [N].

    Raises:
        ValueError: a number out of range.

    Source: Nasr et al. 2023 (arXiv 2302.07956), the white-box attack with Dirac-like canaries.
    """
    check.at_least("num_trials", num_trials, 10)
    check.at_least("chunk_size", chunk_size, 1)

    @jax.jit
    def outputs(keys: Key, batch: Batch) -> jax.Array:
        leaves = jax.tree.leaves(jax.vmap(lambda key: gradient(key, params, batch)[0])(keys))
        return jnp.concatenate([x.reshape(chunk_size, -1).astype(jnp.float32) for x in leaves], axis=1)

    num_chunks = -(-num_trials // chunk_size)
    base_keys, *trial_keys = jnp.split(jax.random.split(key, (1 + 2 * num_chunks, chunk_size)), [1, 1 + num_chunks])
    base = outputs(base_keys[0], without).mean(axis=0)
    contribution = outputs(base_keys[0], canary).mean(axis=0) - base  # equal keys, equal noise: it cancels
    direction = contribution / jnp.maximum(jnp.sum(contribution**2), np.finfo(np.float32).tiny)

    def run(keys: Key, batch: Batch) -> np.ndarray:
        rows = [jnp.dot(outputs(k, batch) - base, direction, precision="highest") for k in keys]
        return np.concatenate(rows)[:num_trials].astype(np.float64)

    return Scores(run(trial_keys[0], canary), run(trial_keys[1], without))


def epsilon_clopper_pearson(scores: Scores, *, delta: float, confidence: float) -> float:
    """Epsilon from the error rates of a threshold, whatever the mechanism.

        epsilon >= max(log((1 - fnr - delta) / fpr), log((1 - fpr - delta) / fnr)), rates at their upper bounds

    The threshold is the best on the first tenth of the scores; its rates are counted on the rest.

    Args:
        scores: at least 10 of each kind, independent.
        delta: in [0, 1).
        confidence: in (0, 1).

    Returns:
        Epsilon >= 0. With n scores of each kind it is below log(n), however weak the mechanism.

    Raises:
        ValueError: a setting out of range, a score that is NaN, or too few.

    Source: Jagielski, Ullman, Oprea 2020 (arXiv 2006.07709); Nasr et al. 2021 (arXiv 2101.04535).
    """
    check.fraction("delta", delta, one=False)

    def epsilon(errors: _Errors) -> np.ndarray:
        level = (1 + confidence) / 2  # two bounds, each at half of the significance
        fpr = intervals.upper(errors.false_positives, errors.num_outside, level)
        fnr = intervals.upper(errors.false_negatives, errors.num_inside, level)
        odds = np.maximum((1 - fnr - delta) / fpr, (1 - fpr - delta) / fnr)
        return np.log(np.maximum(odds, 1e-300))  # below 0 too: the best of weak thresholds is still the best

    check.fraction("confidence", confidence, zero=False, one=False)
    return _held_out(scores, epsilon)


def epsilon_gaussian(scores: Scores, *, delta: float, confidence: float) -> float:
    """Epsilon of a mechanism that claims to be Gaussian, from few trials.

        mu >= 2 Phi^-1(1 - (fpr + fnr) / 2), the mean of both rates at its upper bound, and then epsilon(mu, delta)

    No test between N(0, 1) and N(mu, 1) errs less than 2 Phi(-mu / 2) in sum, so a threshold where errors are common,
    and so well counted, tells mu. The price: this refutes the claim "as hard to tell apart as N(0, 1) and N(mu, 1)",
    the one that is made for a Gaussian sum, and not (epsilon, delta) for all mechanisms.

    Args:
        scores: as in `epsilon_clopper_pearson`, which also tells how the threshold is chosen; as many of one kind as
            of the other.
        delta: in (0, 1).
        confidence: in (0, 1).

    Returns:
        Epsilon >= 0 of the largest mu that is refuted.

    Raises:
        ValueError: as `epsilon_clopper_pearson`; another number of scores inside than outside.

    Source: Dong, Roth, Su 2019 (arXiv 1905.02383), Definition 6 and Corollary 2.13; Nasr et al. 2023 (arXiv
        2302.07956). The errors of both kinds together are no binomial but have lighter tails than the one of their
        mean rate (Hoeffding 1956), so that its Clopper-Pearson bound holds.
    """
    from scipy.stats import norm  # takes half a second to import

    check.fraction("delta", delta, zero=False, one=False)
    check.fraction("confidence", confidence, zero=False, one=False)
    equal = len(scores.inside) == len(scores.outside)
    check.require(equal, "outside", np.shape(scores.outside), "as many scores as inside")

    def mu(errors: _Errors) -> np.ndarray:
        both = errors.false_positives + errors.false_negatives
        return 2 * norm.isf(intervals.upper(both, errors.num_inside + errors.num_outside, confidence))

    largest = _held_out(scores, mu)
    return dp_accounting.get_epsilon_gaussian(1 / largest, delta) if largest > 0 else 0.0


def epsilon_one_run(
    scores: np.ndarray, included: np.ndarray, *, delta: float, confidence: float, num_guesses: Sequence[int]
) -> float:
    """Epsilon from many canaries in a single run.

    Each canary was in by its own fair coin. For r guesses the r/2 highest scores are guessed in, the r/2 lowest out,
    the rest not at all. Each r is a test of its own, at 1 - (1 - confidence) / len(num_guesses).

    Args:
        scores: [m] float; nothing in them but the run's output may depend on the coins.
        included: [m] bool, the coins.
        delta: in [0, 1). Large for m canaries: the bound loses about 2 m delta of its significance.
        confidence: in (0, 1).
        num_guesses: even numbers in [2, m], chosen without a look at the coins.

    Returns:
        Epsilon >= 0.

    Raises:
        ValueError: a setting out of range, a score that is NaN, or shapes that differ.

    Source: Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), Theorem 5.2.
    """
    scores, included = np.asarray(scores, np.float64), np.asarray(included, bool)
    check.require(scores.shape == included.shape == (scores.size,), "included", included.shape, "one for each score")
    check.require(not np.isnan(scores).any(), "scores", "NaN", "numbers")
    check.fraction("delta", delta, one=False)
    check.fraction("confidence", confidence, zero=False, one=False)
    check.at_least("number of num_guesses", len(num_guesses), 1)
    for r in num_guesses:
        check.require(r % 2 == 0 and 2 <= r <= scores.size, "num_guesses", r, f"even and in [2, {scores.size}]")
    order = np.argsort(scores, kind="stable")
    significance = (1 - confidence) / len(num_guesses)

    def bound(r: int) -> float:
        correct = int(np.sum(included[order[-(r // 2) :]]) + np.sum(~included[order[: r // 2]]))
        return _first_above(
            lambda epsilon: one_run_p_value(scores.size, r, correct, epsilon=epsilon, delta=delta), significance
        )

    return max(bound(r) for r in num_guesses)


def one_run_p_value(num_canaries: int, num_guesses: int, num_correct: int, *, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most, where the run is (epsilon, delta)-DP.

        P[W >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= W < v] / i,  W ~ Binomial(r, 1 / (1 + exp(-epsilon)))

    Args:
        num_canaries: m, with one fair coin each.
        num_guesses: r in [0, m].
        num_correct: v in [0, r].
        epsilon: >= 0.
        delta: in [0, 1].

    Returns:
        In [0, 1], never falling in epsilon.

    Source: Steinke, Nasr, Jagielski 2023 (arXiv 2305.08846), Theorem 5.2.
    """
    from scipy.stats import binom  # takes half a second to import

    q = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(num_correct - 1, num_guesses, q))
    i = np.arange(1, num_correct + 1)
    below = np.cumsum(binom.pmf(num_correct - i, num_guesses, q))
    return min(1.0, tail + 2 * num_canaries * delta * float(np.max(below / i, initial=0)))


class _Errors(NamedTuple):
    """Errors of every threshold, at or above which a score is taken for inside. [T] int, and the totals."""

    false_positives: np.ndarray
    num_outside: int
    false_negatives: np.ndarray
    num_inside: int


def _errors(inside: np.ndarray, outside: np.ndarray, thresholds: np.ndarray) -> _Errors:
    false_positives = len(outside) - np.searchsorted(np.sort(outside), thresholds, side="left")
    return _Errors(
        false_positives, len(outside), np.searchsorted(np.sort(inside), thresholds, side="left"), len(inside)
    )


def _held_out(scores: Scores, bound: Callable[[_Errors], np.ndarray]) -> float:
    """The bound, >= 0, at the threshold that is best on a tenth of the scores, from the errors on the rest."""
    parts = []
    for name, kind in zip(Scores._fields, scores, strict=True):
        kind = np.asarray(kind, np.float64)
        check.require(kind.ndim == 1 and len(kind) >= 10, name, kind.shape, "at least 10 scores")
        check.require(not np.isnan(kind).any(), name, "NaN", "numbers")
        parts.append((kind[: len(kind) // 10], kind[len(kind) // 10 :]))
    (inside, held_inside), (outside, held_outside) = parts
    thresholds = np.unique(np.concatenate([inside, outside]))
    chosen = thresholds[[np.argmax(bound(_errors(inside, outside, thresholds)))]]
    return max(0.0, float(bound(_errors(held_inside, held_outside, chosen))[0]))


def _first_above(p_value: Callable[[float], float], significance: float) -> float:
    """The epsilon up to which a p-value that never falls stays within the significance, to 1e-6 from below."""
    if p_value(0.0) > significance:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(high) <= significance:
        low, high = high, 2 * high
        if high > 100:
            return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(middle) <= significance else (low, middle)
    return low
