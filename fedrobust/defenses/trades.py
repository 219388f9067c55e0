"""TRADES: accuracy on clean images, and predictions that do not change around them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fedrobust import check
from fedrobust.types import Attack, Key, Loss, Params

Objective = Callable[[jax.Array, jax.Array], jax.Array]
"""`(logits[B,L], label[B]) -> value[B]`, every row from its own logits alone."""


def trades_loss(
    apply: Callable[[Params, jax.Array], jax.Array],
    attack: Callable[[Objective], Attack],
    *,
    beta: float,
    start_stddev: float,
    clean_loss: Objective = optax.softmax_cross_entropy_with_integer_labels,
) -> Loss:
    """The loss of the clean image, plus how far an adversarial sample's prediction is from the clean one's.

        clean_loss(f(x), y) + beta KL(f(x) || f(x')),  x' = argmax over the ball of KL(f(x) || f(.))

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`.
        attack: what makes an objective large, such as `lambda objective: pgd(..., objective=objective)`. An attack that
            has an objective of its own is `lambda objective: attack`.
        beta: weight of the divergence >= 0, 1 / lambda in the paper (1 to 6 there). At 0 nothing is attacked.
        start_stddev: standard deviation >= 0 of the noise that is added, once per call, to whatever images the attack
            looks at, 0.001 in the paper: at the clean image itself the divergence is least, and its gradient nothing
            but rounding. 0 for an attack that starts elsewhere by itself.
        clean_loss: from logits and labels, so that both images share one forward pass.

    Returns:
        A `Loss`. Its gradient runs through both predictions and not through the attack. Example i draws its noise from
        a stream of its own. Clean image and sample are one batch; one more forward pass, whose gradient nobody takes,
        is the prediction that the attack moves away from.

    Raises:
        ValueError: beta or start_stddev negative or not finite.

    Source:
        Zhang et al. 2019, https://arxiv.org/abs/1901.08573, equation 5 and Algorithm 1. Deviation: the noise is not
        the start of the iteration but stays under it, so that any attack can be used and its sample lies in its ball;
        inside the ball and the box the iterates of both are the same.
    """
    check.non_negative("beta", beta)
    check.non_negative("start_stddev", start_stddev)

    def loss(key: Key, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        if beta == 0:
            return clean_loss(apply(params, image), label)
        of_attack, of_noise = jax.random.split(key)
        fixed, clean = jax.lax.stop_gradient((params, image))
        target = jax.nn.log_softmax(apply(fixed, clean))
        noise = start_stddev * _normal(of_noise, clean)

        def nearby(x: jax.Array) -> jax.Array:
            return apply(fixed, jnp.clip(x + noise, 0, 1))

        def divergence(logits: jax.Array, label: jax.Array) -> jax.Array:
            del label
            return _divergence(target, jax.nn.log_softmax(logits))

        sample = jax.lax.stop_gradient(attack(divergence)(of_attack, nearby, clean, label))
        logits = apply(params, jnp.concatenate([image, sample]))
        log_share = jax.nn.log_softmax(logits)
        size = image.shape[0]
        return clean_loss(logits[:size], label) + beta * _divergence(log_share[:size], log_share[size:])

    return loss


def _divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) in nats, [B], of log-probabilities [B,L]."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _normal(key: Key, image: jax.Array) -> jax.Array:
    """Standard normal numbers like `image`, example i from `fold_in(key, i)`."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(image.shape[0]))
    return jax.vmap(lambda k: jax.random.normal(k, image.shape[1:], image.dtype))(keys)
