"""Random views of one image: pure functions `(key, image[H,W,C]) -> image[H,W,C]`; batch them with `vmap`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.types import Key

Augment = Callable[[Key, jax.Array], jax.Array]


def random_shift(max_pixels: int) -> Augment:
    """Moves the image by whole pixels, up to `max_pixels` each way in height and in width; zeros come in.

    Args:
        max_pixels: >= 0.

    Returns:
        An `Augment`; every one of the (2 * max_pixels + 1)^2 shifts is equally likely.
    """
    check.at_least("max_pixels", max_pixels, 0)

    def augment(key: Key, image: jax.Array) -> jax.Array:
        corner = jax.random.randint(key, (2,), 0, 2 * max_pixels + 1)
        padded = jnp.pad(image, ((max_pixels, max_pixels), (max_pixels, max_pixels), (0, 0)))
        return jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), image.shape)

    return augment


def random_flip() -> Augment:
    """Mirrors left and right with probability one half."""

    def augment(key: Key, image: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)

    return augment


def compose(*augments: Augment) -> Augment:
    """One after the other, each with its own key; with none, the identity."""

    def augment(key: Key, image: jax.Array) -> jax.Array:
        for place, each in enumerate(augments):
            image = each(jax.random.fold_in(key, place), image)
        return image

    return augment
