"""How a server combines client updates: the average, and rules that a minority of dishonest clients cannot steer."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedrobust import check, trees
from fedrobust.types import Aggregator, Key, Params


class AggregationInfo(NamedTuple):
    """What an aggregator saw.

    Attributes:
        num_present: [] int32, clients with a weight > 0.
        num_trimmed: [] int32, values left out at each end of every coordinate.
    """

    num_present: jax.Array
    num_trimmed: jax.Array


def mean() -> Aggregator:
    """The weighted average of the clients that are present.

    Returns:
        An `Aggregator` without state. An absent client (weight 0) contributes exactly nothing, NaN or not; with nobody
        present the update is 0. One dishonest client can move it anywhere, to NaN too.

    Source:
        McMahan et al. 2017, https://arxiv.org/abs/1602.05629, algorithm 1.
    """

    def combine(updates: Params, weight: jax.Array, num_present: jax.Array) -> tuple[Params, jax.Array]:
        total = jnp.sum(weight)
        return trees.weighted_sum(weight / jnp.where(total > 0, total, 1), updates), jnp.zeros_like(num_present)

    return _stateless(combine)


def coordinate_median() -> Aggregator:
    """The median of every coordinate over the clients that are present; of an even number, the mean of the middle two.

    Returns:
        An `Aggregator` without state. Weights only say who is present. The result does not depend on the order of the
        clients, absent rows may hold NaN, with nobody present it is 0, and while fewer than half of the clients present
        are dishonest it stays between honest values. A NaN sent by a present client counts as too large.

    Source:
        Yin, Chen, Ramchandran, Bartlett 2018, https://arxiv.org/abs/1803.01498, definition 1.
    """
    return _of_sorted(lambda num_present: (num_present - 1) // 2 if num_present else 0)


def trimmed_mean(trim_fraction: float) -> Aggregator:
    """The mean of every coordinate without its `floor(trim_fraction * present)` smallest and as many largest values.

    Args:
        trim_fraction: share left out at each end, in [0, 0.5). At least the share of dishonest clients to withstand.

    Returns:
        An `Aggregator` without state, with the guarantees of `coordinate_median` while at most `trim_fraction` of the
        clients present are dishonest.

    Raises:
        ValueError: trim_fraction outside [0, 0.5).

    Source:
        Yin, Chen, Ramchandran, Bartlett 2018, https://arxiv.org/abs/1803.01498, definition 2.
    """
    check.require(0 <= trim_fraction < 0.5, "trim_fraction", trim_fraction, "in [0, 0.5)")
    # 0.29 * 100 is 28.999999999999996 in floats; nobody means 28
    return _of_sorted(lambda num: min(math.floor(trim_fraction * num + 1e-9), max(num - 1, 0) // 2))


def _of_sorted(num_trimmed: Callable[[int], int]) -> Aggregator:
    """The mean of what is left of each sorted coordinate; `num_trimmed` by the number present, less than half of it."""

    def combine(updates: Params, weight: jax.Array, num_present: jax.Array) -> tuple[Params, jax.Array]:
        num_clients = weight.shape[0]
        trim = jnp.asarray([num_trimmed(n) for n in range(num_clients + 1)], jnp.int32)[num_present]
        rank = jnp.arange(num_clients)
        kept = (rank >= trim) & (rank < num_present - trim)
        share = jnp.where(kept, 1 / jnp.maximum(num_present - 2 * trim, 1), 0).astype(jnp.float32)

        def leaf(x: jax.Array) -> jax.Array:
            absent = (weight == 0).reshape(weight.shape + (1,) * (x.ndim - 1))
            return jnp.sort(jnp.where(absent, jnp.inf, x), axis=0)  # behind all that is finite, before NaN

        return trees.weighted_sum(share, jax.tree.map(leaf, updates)), trim

    return _stateless(combine)


def _stateless(combine: Callable[[Params, jax.Array, jax.Array], tuple[Params, jax.Array]]) -> Aggregator:
    def apply(key: Key, state: Any, updates: Params, weight: jax.Array) -> tuple[Params, Any, AggregationInfo]:
        del key
        chex.assert_rank(weight, 1)
        chex.assert_tree_shape_prefix(updates, weight.shape)
        num_present = jnp.sum(weight > 0).astype(jnp.int32)
        update, num_trimmed = combine(updates, weight, num_present)
        return update, state, AggregationInfo(num_present, num_trimmed)

    return Aggregator(init=lambda params: (), apply=apply)


AGGREGATORS: Mapping[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "coordinate_median": coordinate_median,
    "trimmed_mean": trimmed_mean,
}
