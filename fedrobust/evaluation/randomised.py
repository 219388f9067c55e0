"""A randomised model made deterministic, so that it can be evaluated, asked by the gate and attacked like any other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.evaluation.attacked import Apply
from fedrobust.types import Key, Params


def averaged(apply: Callable[[Params, Key, jax.Array], jax.Array], key: Key, *, num_samples: int) -> Apply:
    """The mean of a randomised model's logits over draws that are fixed beforehand.

        averaged(params, x) = 1/S sum_s apply(params, fold_in(key, s), x)

    Its gradient is that of expectation over transformation, over the same draws. Whoever attacks it knows the draws, so
    its robust accuracy is that of the mean of S draws against the strongest attacker; the accuracy of another key's
    draws on the samples says how much of an attack was fitted to these.

    Args:
        apply: `(params, key, image[B,H,W,C]) -> logits[B,L]`. Every example is asked alone (B = 1) by the same keys, so
            that what is drawn depends on neither its place in a batch nor the other examples.
        key: shape ().
        num_samples: S >= 1.

    Returns:
        `(params, image[B,H,W,C]) -> logits[B,L]`, deterministic and differentiable where `apply` is; make it once and
        keep it, what is compiled is remembered by it. Memory does not grow with S, in the backward pass either.

    Raises:
        ValueError: num_samples not a whole number >= 1.

    Source: Athalye et al. 2018, https://arxiv.org/abs/1707.07397, section 2. Deviation: the draws are fixed. An attack
        by fresh draws at every question: `attacks.run(search, num_samples=...)`.
    """
    check.at_least("num_samples", num_samples, 1)

    def mean(params: Params, image: jax.Array) -> jax.Array:
        @jax.checkpoint
        def draw(sample: jax.Array) -> jax.Array:
            own = jax.random.fold_in(key, sample)
            return jax.vmap(lambda x: apply(params, own, x[None])[0])(image)

        def add(total: jax.Array, sample: jax.Array) -> tuple[jax.Array, None]:
            return total + draw(sample), None

        shape = jax.eval_shape(draw, jnp.int32(0))
        total, _ = jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), jnp.arange(num_samples))
        return total / num_samples

    return mean
