"""What one client does in one round. The same function serves simulation and deployment."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedrobust import trees
from fedrobust.types import Batch, ClientUpdate, GradFn, Key, Loss, Params


class GradInfo(NamedTuple):
    """Diagnostics of one gradient. Attributes: loss: [] mean loss of the real examples, 0 for an empty batch."""

    loss: jax.Array


def mean_grad(loss: Loss) -> GradFn:
    """The gradient of the mean loss over the real examples of a batch, without privacy.

    Args:
        loss: per-example loss.

    Returns:
        A `GradFn`. Padding contributes exactly 0 whatever it holds; an empty batch gives a zero gradient.
    """

    def grad(key: Key, params: Params, batch: Batch) -> tuple[Params, GradInfo]:
        chex.assert_rank([batch.image, batch.label, batch.mask], [4, 1, 1])
        image = jnp.where(batch.mask[:, None, None, None], batch.image, 0)
        label = jnp.where(batch.mask, batch.label, 0)

        def mean_loss(p: Params) -> jax.Array:
            value = jnp.where(batch.mask, loss(key, p, image, label), 0)
            return jnp.sum(value) / jnp.maximum(jnp.sum(batch.mask), 1)

        value, gradient = jax.value_and_grad(mean_loss)(params)
        return gradient, GradInfo(value)

    return grad


def local_update(grad_fn: GradFn, optimizer: optax.GradientTransformation, *, skip_empty: bool) -> ClientUpdate:
    """Local training: S optimizer steps on the client's S batches.

    Args:
        grad_fn: `(key, params, batch) -> (gradient, info)`; `mean_grad`, or a private one.
        optimizer: any optax optimizer; its state starts afresh in every round.
        skip_empty: whether a batch without real examples leaves parameters and optimizer as they are. True for
            plain training, where it is padding. False under privacy, where an empty Poisson batch is a step like any
            other and gets its noise.

    Returns:
        A `ClientUpdate` `(key, params, batch[S,B]) -> (update, info[S])`; step s draws from `fold_in(key, s)`.
    """

    def update(key: Key, params: Params, batch: Batch) -> tuple[Params, Any]:
        chex.assert_rank([batch.image, batch.label, batch.mask], [5, 2, 2])

        def step(carry: tuple[Params, Any], xs: tuple[jax.Array, Batch]) -> tuple[tuple[Params, Any], Any]:
            index, one = xs
            gradient, info = grad_fn(jax.random.fold_in(key, index), carry[0], one)
            change, state = optimizer.update(gradient, carry[1], carry[0])
            new = (optax.apply_updates(carry[0], change), state)
            return (trees.where(jnp.any(one.mask), new, carry) if skip_empty else new), info

        steps = jnp.arange(batch.mask.shape[0])
        (local, _), info = jax.lax.scan(step, (params, optimizer.init(params)), (steps, batch))
        return trees.subtract(local, params), info

    return update
