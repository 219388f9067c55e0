"""Losses for one example; a batch is a `vmap` away."""

from collections.abc import Callable

import jax
import optax

from fedrobust.types import Key, Loss, Params


def cross_entropy(apply: Callable[[Params, jax.Array], jax.Array]) -> Loss:
    """Softmax cross-entropy of one example, in nats.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`.

    Returns:
        A `Loss`; its key is not used.
    """

    def loss(key: Key, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        del key
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, image[None])[0], label)

    return loss
