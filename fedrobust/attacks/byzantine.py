"""What dishonest clients send in place of their update."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.types import Key, Params, UpdateAttack


def sign_flip(scale: float) -> UpdateAttack:
    """Malicious clients send `-scale` times their honest update.

    Args:
        scale: how far the update is turned around, > 0.

    Returns:
        An `UpdateAttack`; its key is not used. Rows of honest clients are returned bit for bit, NaN included.

    Raises:
        ValueError: scale not a finite number > 0.

    Source:
        Li, Xu, Chen, Giannakis, Ling 2019 (RSA), https://arxiv.org/abs/1811.03761, section "Sign-flipping attack".
    """
    check.positive("scale", scale)

    def attack(key: Key, updates: Params, malicious: jax.Array) -> Params:
        del key

        def leaf(x: jax.Array) -> jax.Array:
            rows = malicious.reshape(malicious.shape + (1,) * (x.ndim - 1))
            return jnp.where(rows, (-scale * x).astype(x.dtype), x)

        return jax.tree.map(leaf, updates)

    return attack


UPDATE_ATTACKS: Mapping[str, Callable[..., UpdateAttack]] = {"sign_flip": sign_flip}
