"""Balls around one image, cut to the box [0, 1]: lengths, projections, steepest directions, uniform draws."""

import math

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.types import Key

NORMS = ("linf", "l2", "l1")

Radius = float | jax.Array
"""A Python number, checked when the attack is built, or a JAX scalar (a warm-up inside `jit`), which is not."""

_NUM_HALVINGS = 40  # of the interval that holds the shrinkage of an l1 projection: float32 has 24 bits


def length(norm: str, x: jax.Array) -> jax.Array:
    """The norm [] of an array."""
    if norm == "linf":
        return jnp.max(jnp.abs(x))
    return jnp.sqrt(jnp.sum(jnp.square(x))) if norm == "l2" else jnp.sum(jnp.abs(x))


def direction(norm: str, gradient: jax.Array) -> jax.Array:
    """The direction of unit length along which a function of this gradient grows fastest.

    Args:
        norm: "linf" (the sign), "l2" (the gradient over its length) or "l1" (the sign of its largest entry alone).
        gradient: of any shape.

    Returns:
        Of the same shape; zero where the gradient is all zero, NaN entries count as 0.
    """
    gradient = jnp.nan_to_num(gradient)
    if norm == "linf":
        return jnp.sign(gradient)
    if norm == "l1":
        flat = gradient.ravel()
        largest = jnp.argmax(jnp.abs(flat))
        return jnp.zeros_like(flat).at[largest].set(jnp.sign(flat[largest])).reshape(gradient.shape)
    largest = jnp.max(jnp.abs(gradient))
    # Squares of tiny or huge gradients leave float32: scale first. The clip changes no value; without it XLA moves the
    # scaling out of the sum of squares again, and gradients of 1e-30 gave NaN (jax 0.10.2, CPU).
    scaled = jnp.clip(gradient / jnp.where(largest > 0, largest, 1), -1, 1)
    return scaled / jnp.maximum(length("l2", scaled), 1)  # the largest entry is 1, or all are 0


def project(norm: str, eps: Radius, image: jax.Array, x: jax.Array) -> jax.Array:
    """A point in the ball around the image and in the box.

    Args:
        norm: "linf" and "l1": the closest such point; "l2": the closest point of the ball, then of the box, which stays
            in the ball.
        eps: the radius >= 0.
        image: [H,W,C] in [0, 1], the centre.
        x: [H,W,C], what to project.

    Returns:
        [H,W,C] in [0, 1], within eps of the image up to rounding; the image itself for eps 0.

    Source:
        "l1": Croce, Hein 2021 ("Mind the box"), https://arxiv.org/abs/2103.01208, proposition 2.1. Deviation: the
        shrinkage is found by bisection, not by sorting, and errs to the inner side.
    """
    if norm == "linf":
        return jnp.clip(x, jnp.maximum(image - eps, 0), jnp.minimum(image + eps, 1))
    delta = x - image
    if norm == "l2":
        shrink = jnp.minimum(1, eps / jnp.maximum(length("l2", delta), jnp.finfo(x.dtype).tiny))
        return jnp.clip(image + delta * shrink, 0, 1)
    size, room = jnp.abs(delta), jnp.where(delta > 0, 1 - image, image)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        fits = jnp.sum(jnp.clip(size - middle, 0, room)) <= eps
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    fits = jnp.sum(jnp.minimum(size, room)) <= eps
    _, shrinkage = jax.lax.fori_loop(0, _NUM_HALVINGS, halve, (jnp.zeros((), x.dtype), jnp.max(size)))
    kept = jnp.clip(size - jnp.where(fits, 0, shrinkage), 0, room)
    return jnp.clip(image + jnp.sign(delta) * kept, 0, 1)


def start(key: Key, norm: str, eps: Radius, image: jax.Array) -> jax.Array:
    """A uniform draw [H,W,C] from the ball around the image, projected into the box."""
    return project(norm, eps, image, image + eps * _uniform(key, norm, image))


def surface_start(key: Key, norm: str, eps: Radius, image: jax.Array) -> jax.Array:
    """A draw as of `start`, moved out to the surface of the ball before it is projected into the box."""
    offset = _uniform(key, norm, image)
    scale = jnp.maximum(length(norm, offset), jnp.finfo(image.dtype).tiny)
    return project(norm, eps, image, image + eps * (offset / scale))


def _uniform(key: Key, norm: str, image: jax.Array) -> jax.Array:
    """A uniform draw from the unit ball around 0, of the image's shape and dtype."""
    shape = image.shape
    if norm == "linf":
        return jax.random.uniform(key, shape, image.dtype, -1, 1)
    if norm == "l2":
        of_direction, of_length = jax.random.split(key)
        offset = direction(norm, jax.random.normal(of_direction, shape, image.dtype))
        return offset * jax.random.uniform(of_length, (), image.dtype) ** (1 / math.prod(shape))
    of_sign, of_size = jax.random.split(key)
    share = jax.random.exponential(of_size, (math.prod(shape) + 1,), image.dtype)
    share = (share / jnp.sum(share))[1:].reshape(shape)
    return share * jax.random.rademacher(of_sign, shape, image.dtype)


def inside(norm: str, eps: Radius, image: jax.Array, point: jax.Array) -> jax.Array:
    """Whether a point [H,W,C] lies in the ball around the image, up to float rounding, and in the box: [] bool.

    The tolerance is 1e-5 of the radius and one unit in the last place of 1 (per entry for "l1"); none for radius 0.
    """
    delta = jnp.abs(point - image)
    slack = 1.2e-7 * (delta.size if norm == "l1" else 1)
    limit = jnp.where(eps > 0, eps * (1 + 1e-5) + slack, 0)
    return (length(norm, delta) <= limit) & (jnp.min(point) >= 0) & (jnp.max(point) <= 1)


def check_radius(name: str, radius: Radius) -> None:
    """Requires a finite number >= 0, unless it is a JAX scalar."""
    if not isinstance(radius, jax.Array):
        check.non_negative(name, radius)
