"""How an attack's radius, its step or a learning rate moves over the rounds: factors to multiply it by."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrobust import check

Schedule = Callable[[int | jax.Array], jax.Array]
"""`round[] int32, traced or not -> factor[] float32` in (0, 1]. Attacks take the product with a radius as it is."""


def linear_warmup(*, num_rounds: int, share: float) -> Schedule:
    """Rises linearly over the first rounds and then stays at 1.

        factor(r) = min(1, (r + 1) / w),  w = max(1, ceil(share num_rounds))

    Args:
        num_rounds: of the whole training, >= 1.
        share: of the rounds that the rise takes, in [0, 1]; at 0 the factor is 1 throughout.

    Returns:
        A `Schedule`; never 0, so that not even the first round goes without an attack.

    Raises:
        ValueError: a number out of range.

    >>> [float(linear_warmup(num_rounds=4, share=0.5)(r)) for r in range(4)]
    [0.5, 1.0, 1.0, 1.0]
    """
    check.at_least("num_rounds", num_rounds, 1)
    check.fraction("share", share)
    length = max(1, math.ceil(share * num_rounds - 1e-9))  # 0.07 * 100 is 7.000000000000001 in floats

    def factor(round: int | jax.Array) -> jax.Array:
        return jnp.minimum(1.0, (round + 1) / length)

    return factor


def cyclic(*, num_rounds: int, peak: float, num_cycles: int = 1) -> Schedule:
    """Rises linearly from 0 to 1 and falls back to 0, once or several times.

        factor(r) = min(p / peak, (1 - p) / (1 - peak)),  p = (r mod n + 1/2) / n,  n = num_rounds / num_cycles

    Args:
        num_rounds: of the whole training, >= 1.
        peak: where in a cycle the factor is 1, in (0, 1).
        num_cycles: a divisor of num_rounds.

    Returns:
        A `Schedule`. Rounds are taken at their middle: no round is spent at 0.

    Raises:
        ValueError: a number out of range.

    Source: Smith 2017 (arXiv 1506.01186), the triangular policy; as the learning rate of fast adversarial training:
        Wong, Rice, Kolter 2020 (arXiv 2001.03994).

    >>> [round(float(cyclic(num_rounds=4, peak=0.5)(r)), 6) for r in range(4)]
    [0.25, 0.75, 0.75, 0.25]
    """
    check.at_least("num_rounds", num_rounds, 1)
    check.fraction("peak", peak, zero=False, one=False)
    check.at_least("num_cycles", num_cycles, 1)
    allowed = f"a divisor of num_rounds = {num_rounds}"
    check.require(num_rounds % num_cycles == 0, "num_cycles", num_cycles, allowed)
    length = num_rounds // num_cycles

    def factor(round: int | jax.Array) -> jax.Array:
        position = (jnp.asarray(round) % length + 0.5) / length
        return jnp.minimum(position / peak, (1 - position) / (1 - peak))

    return factor
