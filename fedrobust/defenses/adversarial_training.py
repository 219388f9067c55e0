"""Adversarial training as a transformation of a loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.types import Attack, Key, Loss, Params


def adversarial_loss(
    loss: Loss, apply: Callable[[Params, jax.Array], jax.Array], attack: Attack, *, clean_share: float
) -> Loss:
    """The loss of an adversarial sample of each example, found against the current parameters.

    `clean_share * loss(clean) + (1 - clean_share) * loss(adversarial)`: still one loss of one example, so under
    differential privacy still one gradient to clip per record.

    Args:
        loss: the loss to make robust.
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, the model the attack sees.
        attack: finds the sample. A warm-up of its radius: build attack and loss inside the compiled round, with `eps`
            (and `step_size`) a traced scalar; nothing is compiled again when it moves.
        clean_share: weight of the clean image in [0, 1]. At 0 no clean pass is computed, at 1 no attack.

    Returns:
        A `Loss`. Its gradient does not run through the attack: the sample and the parameters it was found with count as
        constants, which is Danskin's theorem for the inner maximum.

    Raises:
        ValueError: clean_share outside [0, 1].

    Source:
        Madry et al. 2018, https://arxiv.org/abs/1706.06083, equation 2.1; the share: Goodfellow et al. 2015,
        https://arxiv.org/abs/1412.6572, section 6.
    """
    check.fraction("clean_share", clean_share)
    if clean_share == 1:
        return loss

    def robust_loss(key: Key, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        of_attack, of_loss = jax.random.split(key)
        fixed, clean = jax.lax.stop_gradient((params, image))
        sample = attack(of_attack, lambda x: apply(fixed, x), clean, label)
        if clean_share == 0:
            return loss(of_loss, params, sample, label)
        # Both in one batch: one forward and backward pass in the program instead of two.
        both = loss(of_loss, params, jnp.concatenate([image, sample]), jnp.concatenate([label, label]))
        return clean_share * both[: len(label)] + (1 - clean_share) * both[len(label) :]

    return robust_loss
