"""A clip norm that follows a quantile of the gradients' norms, found privately."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.types import Key

_LEAST, _MOST = 1e-10, 1e10
"""The clip norms there can be; their squares are far from the ends of float32."""


class AdaptiveClipNorm(NamedTuple):
    """How a clip norm is learned.

    Attributes:
        init: `() -> clip_norm`, shape () float32.
        update: `(key, clip_norm, norm[B], mask[B]) -> clip_norm`: one private look at the norms.
        count_noise_stddev: the noise of that look, which a plan has to account for.
    """

    init: Callable[[], jax.Array]
    update: Callable[[Key, jax.Array, jax.Array, jax.Array], jax.Array]
    count_noise_stddev: float


def adaptive_clip_norm(
    *, initial: float, quantile: float, learning_rate: float, count_noise_stddev: float, expected_size: float
) -> AdaptiveClipNorm:
    """Moves C towards the norm that a given share of the gradients stay within.

        C <- C * exp(-learning_rate * (share - quantile))
        share = 1/2 + (sum_i ([norm_i <= C] - 1/2) + N(0, count_noise_stddev^2)) / expected_size

    Args:
        initial: the first C, in [1e-10, 1e10].
        quantile: the share wanted within C, in [0, 1].
        learning_rate: of the geometric step, > 0; the source takes 0.2.
        count_noise_stddev: sigma_b > 0, standard deviation of the noise on the count, in records (or clients). Small
            noise costs privacy, see `Plan.count_noise_stddev`; the source takes expected_size / 20.
        expected_size: expected number of records in a batch (or clients in a cohort), a public constant > 0, never
            the realised one.

    Returns:
        An `AdaptiveClipNorm`. `update` takes the norms under the C it is given, before the clip: `ClipInfo.norm`.

    Raises:
        ValueError: a setting out of range.

    Guarantees:
        Adding, removing or blanking one record moves the sum before the noise by exactly 1/2, replacing one by at most
        1. Padding counts 0 whatever it holds; a norm that is not finite counts as above C. C stays in
        [1e-10, 1e10]. Each update is one Gaussian mechanism of its own: a plan has to account for it.

    Source: Andrew, Thakkar, McMahan, Ramaswamy 2021 (arXiv 1905.03871), Algorithm 1, geometric update.
    """
    check.require(_LEAST <= initial <= _MOST, "initial", initial, f"in [{_LEAST}, {_MOST}]")
    check.fraction("quantile", quantile)
    check.positive("learning_rate", learning_rate)
    check.positive("count_noise_stddev", count_noise_stddev)
    check.positive("expected_size", expected_size)

    def init() -> jax.Array:
        return jnp.float32(initial)

    def update(key: Key, clip_norm: jax.Array, norm: jax.Array, mask: jax.Array) -> jax.Array:
        noise = count_noise_stddev * jax.random.normal(key)
        share = 0.5 + (centred_count(clip_norm, norm, mask) + noise) / expected_size
        return jnp.clip(clip_norm * jnp.exp(-learning_rate * (share - quantile)), _LEAST, _MOST)

    return AdaptiveClipNorm(init, update, count_noise_stddev)


def centred_count(clip_norm: jax.Array, norm: jax.Array, mask: jax.Array) -> jax.Array:
    """Half the number of norms within C minus half the number of those above: not private before it is noised.

    Args:
        clip_norm: C, shape ().
        norm: [B]; NaN and inf are above.
        mask: [B] bool; False counts 0.

    Returns:
        A multiple of 1/2, shape (), that one record moves by 1/2 when it comes or goes.
    """
    chex.assert_rank([norm, mask], 1)
    return jnp.sum(jnp.where(mask, jnp.where(norm <= clip_norm, 0.5, -0.5), 0))
