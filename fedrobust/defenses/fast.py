"""Adversarial training with a single step, and the regulariser that keeps it from fooling itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.types import Attack, Key, Loss, Params

Radius = float | jax.Array
"""A Python number, checked when the loss is built, or a JAX scalar (a warm-up inside `jit`), which is not."""


def fast_attack(pgd: Callable[..., Attack], *, norm: str, eps: Radius) -> Attack:
    """The attack of fast adversarial training: one step of 1.25 radii from a random start.

    One forward and backward pass for the sample instead of PGD's many. Longer steps, or a start at the clean image,
    end in catastrophic overfitting: FGSM finds nothing any more, and PGD everything. Guard it with `align_gradients`,
    and watch it with `evaluation.one_step_gap`.

    Args:
        pgd: builds the attack from the settings of `attacks.pgd`.
        norm: of the ball and of the step.
        eps: radius >= 0 in units of the image range [0, 1].

    Returns:
        An `Attack`, for `adversarial_loss(..., clean_share=0)`.

    Raises:
        ValueError: what `pgd` refuses.

    Source: Wong, Rice, Kolter 2020 (arXiv 2001.03994), Algorithm 3.
    """
    return pgd(norm=norm, eps=eps, step_size=1.25 * eps, num_steps=1, random_start=True, keep_best=False)


def align_gradients(loss: Loss, straightened: Loss, *, eps: Radius, weight: float) -> Loss:
    """Adds to a loss how much the direction of its input gradient changes within the ball.

        loss_i + weight (1 - cos(grad_x l(x_i), grad_x l(x_i + u_i))),  u_i uniform in [-eps, eps]^d, cut to the box

    A single step finds a good sample only where the loss is about linear. Where the two gradients agree it is.

    Args:
        loss: what is trained with, such as an adversarial loss with `fast_attack`.
        straightened: l, the loss that is to be straight around the clean image: a plain cross-entropy. It is called
            with one key for both points.
        eps: radius of the linf ball >= 0, in units of the image range [0, 1].
        weight: >= 0 (0.2 in the paper for CIFAR-10 at 8/255). At 0 the loss is returned as it is.

    Returns:
        A `Loss`; still one number per example, from its own image alone. Its gradient runs through both input
        gradients: the model must be differentiable twice, as with `fedrobust.ops` it is. Both points are one batch.

    Raises:
        ValueError: weight or eps negative or not finite.

    Guarantees:
        In [0, 2 weight] above `loss`, up to rounding. Where an input gradient is zero throughout, no direction is
        known, and nothing is added. Only directions count: tiny gradients (a confident model) weigh like any others.

    Source: Andriushchenko and Flammarion 2020 (arXiv 2007.02617), GradAlign. Deviation: the cut to the box.
    """
    check.non_negative("weight", weight)
    if not isinstance(eps, jax.Array):
        check.non_negative("eps", eps)
    if weight == 0:
        return loss

    def aligned(key: Key, params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        of_loss, of_start, of_gradient = jax.random.split(key, 3)
        size = image.shape[0]
        keys = jax.vmap(lambda i: jax.random.fold_in(of_start, i))(jnp.arange(size))
        start = jax.vmap(lambda k: jax.random.uniform(k, image.shape[1:], image.dtype, -1, 1))(keys)
        both = jnp.concatenate([image, jnp.clip(image + eps * start, 0, 1)])
        labels = jnp.concatenate([label, label])
        gradient = jax.grad(lambda x: jnp.sum(straightened(of_gradient, params, x, labels)))(both)
        return loss(of_loss, params, image, label) + weight * _misalignment(gradient[:size], gradient[size:])

    return aligned


def _misalignment(a: jax.Array, b: jax.Array) -> jax.Array:
    """1 - cosine of every pair of rows, [B]; 0 where one is all zero."""
    a, b = (x.reshape(x.shape[0], -1) for x in (a, b))
    # A cosine does not change with a constant scale, squares of small gradients leave float32.
    largest = [jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True)) for x in (a, b)]
    known = ((largest[0] > 0) & (largest[1] > 0))[:, 0]
    a, b = (jnp.where(known[:, None], x / jnp.where(m > 0, m, 1), 1) for x, m in zip((a, b), largest, strict=True))
    cosine = jnp.sum(a * b, axis=1) / jnp.sqrt(jnp.sum(a * a, axis=1) * jnp.sum(b * b, axis=1))
    return jnp.where(known, 1 - cosine, 0)
