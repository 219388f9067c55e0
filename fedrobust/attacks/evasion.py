"""Attacks at inference time that know the model: FGSM and PGD, compiled whole, one independent problem per example."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedrobust import check
from fedrobust.attacks import balls
from fedrobust.attacks.balls import Radius
from fedrobust.types import Attack, Key, LogitsFn

NORMS = ("linf", "l2")

Objective = Callable[[jax.Array, jax.Array], jax.Array]
"""`(logits[B,L], label[B]) -> value[B]`, what an attack makes large; every row from its own logits alone."""


class _Best(NamedTuple):
    image: jax.Array  # [B,H,W,C]
    wrong: jax.Array  # [B] bool
    value: jax.Array  # [B] float32


def fgsm(*, norm: str, eps: Radius) -> Attack:
    """One step of length `eps` along the gradient of the cross-entropy, from the clean image.

    Args:
        norm: "linf" (the sign of the gradient) or "l2" (the gradient over its norm, per example).
        eps: the radius >= 0 in units of the image range [0, 1].

    Returns:
        An `Attack`. It draws nothing from its key and returns its one sample, better than the clean image or not.

    Raises:
        ValueError: unknown norm, negative or infinite eps.

    Guarantees:
        Those of `pgd`.

    Source:
        Goodfellow, Shlens, Szegedy 2015, https://arxiv.org/abs/1412.6572, section 4; "l2": the same step
        in that norm.
    """
    return pgd(norm=norm, eps=eps, step_size=eps, num_steps=1, random_start=False, keep_best=False)


def pgd(
    *,
    norm: str,
    eps: Radius,
    step_size: Radius,
    num_steps: int,
    random_start: bool,
    num_restarts: int = 1,
    keep_best: bool = True,
    objective: Objective = optax.softmax_cross_entropy_with_integer_labels,
) -> Attack:
    """Projected gradient ascent: `x <- project(x + step_size * direction(gradient))`, `num_steps` times.

    Args:
        norm: "linf" or "l2", of the ball and of the step.
        eps: radius of the ball >= 0, in units of the image range [0, 1].
        step_size: length of a step >= 0, in the same units.
        num_steps: gradients per restart, >= 1.
        random_start: start uniformly inside the ball, not at the clean image.
        num_restarts: independent starts >= 1; more than one needs `random_start` and `keep_best`.
        keep_best: return the best of all iterates (a misclassified one before any that is not, then the largest
            objective), for one more forward pass per restart. False returns the last iterate: enough for training.
        objective: what to make large.

    Returns:
        An `Attack`. Example i draws from `fold_in(key, i)`, so a prefix of a batch gives a prefix of the result, and
        restart r from `fold_in(that, r)`, so more restarts only add candidates. Memory does not grow with steps or
        restarts. The model's parameters reach it inside `logits_fn` alone.

    Raises:
        ValueError: unknown norm; a number out of range; restarts that would all be the same.

    Guarantees:
        For images in [0, 1] the result is in [0, 1] and inside the ball up to float rounding (for "linf" one unit in
        the last place); `eps` 0 returns the image exactly; a zero or NaN gradient leaves the pixel where it is; a NaN
        objective is never the best. Rows are independent if those of `logits_fn` are. Not guaranteed: any of this for
        a NaN image, whose row alone is lost.

    Source:
        Madry et al. 2018, https://arxiv.org/abs/1706.06083, equation 2.1 and section 5. Deviation: the
        best iterate, not the last.
    """
    check.one_of("norm", norm, NORMS)
    for name, radius in (("eps", eps), ("step_size", step_size)):
        balls.check_radius(name, radius)
    check.at_least("num_steps", num_steps, 1)
    check.at_least("num_restarts", num_restarts, 1)
    check.require(
        num_restarts == 1 or (random_start and keep_best),
        "num_restarts",
        num_restarts,
        "1 unless random_start and keep_best are true",
    )

    def attack(key: Key, logits_fn: LogitsFn, image: jax.Array, label: jax.Array) -> jax.Array:
        chex.assert_rank([image, label], [4, 1])
        chex.assert_equal_shape_prefix([image, label], 1)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(image.shape[0]))

        def value(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            logits = logits_fn(x)
            values = objective(logits, label)
            return jnp.sum(values), (jnp.argmax(logits, axis=-1) != label, values)

        def step(carry: tuple[jax.Array, _Best], _: None) -> tuple[tuple[jax.Array, _Best], None]:
            x, best = carry
            gradient, (wrong, values) = jax.grad(value, has_aux=True)(x)
            best = _better(best, _Best(x, wrong, values)) if keep_best else best
            return (_project(norm, eps, image, x + step_size * _direction(norm, gradient)), best), None

        def restart(best: _Best, index: jax.Array) -> tuple[_Best, None]:
            start = _start(norm, eps, keys, index, image) if random_start else _project(norm, eps, image, image)
            (x, best), _ = jax.lax.scan(step, (start, best), length=num_steps)
            return (_better(best, _Best(x, *value(x)[1])) if keep_best else best._replace(image=x)), None

        none = jnp.zeros(label.shape, bool)
        best = _Best(image, none, jnp.full(label.shape, -jnp.inf, jnp.result_type(image, jnp.float32)))
        best, _ = jax.lax.scan(restart, best, jnp.arange(num_restarts))
        return best.image

    return attack


def _better(old: _Best, new: _Best) -> _Best:
    """The better candidate of every row; comparisons with NaN are false, so NaN never wins."""
    wins = jnp.where(new.wrong == old.wrong, new.value > old.value, new.wrong & ~jnp.isnan(new.value))
    return _Best(
        jnp.where(_as(wins, old.image), new.image, old.image),
        jnp.where(wins, new.wrong, old.wrong),
        jnp.where(wins, new.value.astype(old.value.dtype), old.value),
    )


def _start(norm: str, eps: Radius, keys: jax.Array, index: jax.Array, image: jax.Array) -> jax.Array:
    """A uniform draw from the ball around every image, cut to the box."""
    return jax.vmap(lambda key, x: balls.start(jax.random.fold_in(key, index), norm, eps, x))(keys, image)


def _project(norm: str, eps: Radius, image: jax.Array, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda image, x: balls.project(norm, eps, image, x))(image, x)


def _direction(norm: str, gradient: jax.Array) -> jax.Array:
    return jax.vmap(lambda gradient: balls.direction(norm, gradient))(gradient)


def _as(row: jax.Array, image: jax.Array) -> jax.Array:
    return row.reshape(row.shape + (1,) * (image.ndim - 1))
