"""Per-example losses."""

from collections.abc import Callable

import jax
import optax

from fedrobust.types import Key, Loss, Params


def cross_entropy(apply: Callable[[Params, jax.Array], jax.Array]) -> Loss:
    """Softmax cross-entropy in nats.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`.

    Returns:
        A `Loss`: `(key, params, image[B,H,W,C], label[B]) -> loss[B]`. The key is not used.
    """

    def loss(key: Key, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        del key
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, image), label)

    return loss
