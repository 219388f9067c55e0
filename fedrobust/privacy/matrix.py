"""Noise that is correlated over steps, so that the sum of many steps carries less of it (DP-FTRL, matrix mechanisms).

The steps' clipped sums G [T, D] are released as G + C^-1 Z with Z independent normal: what comes after the Gaussian
mechanism on C G. C is lower triangular, so a step needs no later one, and adaptive choices are covered. The whole
sequence is ONE release: its plan has one step, charged to the ledger before the first round.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, trees
from fedrobust.privacy.clipping import clip
from fedrobust.privacy.noise import add_gaussian
from fedrobust.privacy.plan import Plan
from fedrobust.types import Aggregator, Key, Params


class Strategy(NamedTuple):
    """A banded Toeplitz matrix C, and how often a unit takes part.

    Attributes:
        coefficients: c_0 = 1, c_1, ... c_(b-1): C[t, s] = c_(t-s).
        max_participations: k, the most steps one unit may be in, any two of them at least b apart. Whoever draws the
            cohorts has to see to it; more, or closer, and the guarantee is gone.
    """

    coefficients: tuple[float, ...]
    max_participations: int

    @property
    def sensitivity(self) -> float:
        """The largest L2 change of C G where each of a unit's steps changes G by at most 1.

        Steps b apart meet C in columns without a common row, so their squares add: sqrt(k) |c|.
        """
        return float(np.sqrt(self.max_participations) * np.linalg.norm(self.coefficients))


class CorrelatedNoise(NamedTuple):
    """Stateful noise as two pure functions.

    Attributes:
        init: `params -> state`: the noise of the last b - 1 steps, zeros. It is secret: with it the noise is known.
        apply: `(key, state, tree) -> (noisy tree, state)`; a new key at every step.
    """

    init: Callable[[Params], Any]
    apply: Callable[[Key, Any, Params], tuple[Params, Any]]


def toeplitz(num_bands: int, *, max_participations: int) -> Strategy:
    """The strategy for running sums: the square root of their matrix, cut to `num_bands`.

        c_0 = 1, c_i = c_(i-1) (1 - 1 / (2 i))

    Args:
        num_bands: b >= 1; 1 is independent noise. Each band holds one copy of the parameters.
        max_participations: k >= 1, see `Strategy`.

    Raises:
        ValueError: an argument out of its range.

    Source: Fichtenberger, Henzinger, Upadhyay 2022 (arXiv 2202.11205), equation 4, for the coefficients; Choquette-Choo
        et al. 2023 (arXiv 2306.08153) for bands and participation; Denisov et al. 2022 (arXiv 2202.08312) for
        adaptive inputs.
    """
    check.at_least("num_bands", num_bands, 1)
    check.at_least("max_participations", max_participations, 1)
    steps = np.arange(1, num_bands, dtype=np.float64)
    return Strategy((1.0, *np.cumprod(1 - 1 / (2 * steps)).tolist()), max_participations)


def correlated_noise(strategy: Strategy, stddev: float) -> CorrelatedNoise:
    """Adds row t of C^-1 Z at the t-th call: n_t = z_t - sum_i c_i n_(t-i), with z_t independent normal.

    Args:
        strategy: C.
        stddev: standard deviation >= 0 of each z, in the unit of what it is added to.
    """
    check.non_negative("stddev", stddev)
    past = jnp.asarray(strategy.coefficients[1:], jnp.float32) if len(strategy.coefficients) > 1 else None

    def init(params: Params) -> Any:
        num = len(strategy.coefficients) - 1
        return jax.tree.map(lambda x: jnp.zeros((num, *x.shape), x.dtype), params)

    def apply(key: Key, state: Any, tree: Params) -> tuple[Params, Any]:
        noise = add_gaussian(key, trees.zeros_like(tree), stddev)
        if past is not None:
            noise = jax.tree.map(lambda z, old: z - jnp.tensordot(past, old, axes=1).astype(z.dtype), noise, state)
            state = jax.tree.map(lambda n, old: jnp.concatenate([n[None], old[:-1]]), noise, state)
        return trees.add(tree, noise), state

    return CorrelatedNoise(init, apply)


def correlated_mean(plan: Plan, strategy: Strategy, *, clip_norm: float, clients_per_round: float) -> Aggregator:
    """Client-level DP-FTRL: clipped updates are summed, and noise correlated over rounds is added at the server.

        (sum_k clip(update_k) + (C^-1 Z)_t) / clients_per_round,  Z's deviation plan.noise_multiplier * sensitivity

    Nothing is sampled at random, so nothing is amplified: the guarantee rests on who takes part when, which
    `Strategy.max_participations` states.

    Args:
        plan: of unit "client", for the whole sequence: one step at a sampling_rate of 1.
        strategy: see `toeplitz`.
        clip_norm: C > 0, the L2 bound of one client's update.
        clients_per_round: a public constant > 0, never the realised size of a cohort.

    Returns:
        An `Aggregator`, whose state is the noise still to be taken back. Weights say only who is present (> 0).

    Raises:
        ValueError: a setting that is not positive and finite, or a plan of something else.

    Source: Kairouz et al. 2021 (arXiv 2103.00039), algorithm 1, with the matrices of `toeplitz`.
    """
    check.one_of("plan.unit", plan.unit, ("client",))
    check.require(plan.num_steps == 1, "plan.num_steps", plan.num_steps, "1: the whole sequence is one release")
    check.require(plan.sampling_rate == 1, "plan.sampling_rate", plan.sampling_rate, "1: nothing is amplified")
    check.positive("plan.noise_multiplier", plan.noise_multiplier)
    check.positive("clip_norm", clip_norm)
    check.positive("clients_per_round", clients_per_round)
    one_step = 2 * clip_norm if plan.relation == "replace_one" else clip_norm
    noise = correlated_noise(strategy, plan.noise_multiplier * strategy.sensitivity * one_step)

    def apply(key: Key, state: Any, updates: Params, weight: jax.Array) -> tuple[Params, Any, Any]:
        clipped, norm = jax.vmap(lambda update: clip(update, clip_norm))(updates)
        present = weight > 0
        total = trees.weighted_sum(present.astype(jnp.float32), clipped)
        noisy, state = noise.apply(key, state, total)
        return trees.scale(noisy, 1 / clients_per_round), state, jnp.where(present, norm, 0)

    return Aggregator(noise.init, apply)
