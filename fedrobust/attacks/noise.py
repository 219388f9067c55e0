"""Random points of the ball: what no attack that follows gradients may lose to."""

from typing import NamedTuple

import jax

from fedrobust import check
from fedrobust.attacks import balls
from fedrobust.types import Answer, Key, Search


class _State(NamedTuple):
    key: Key
    image: jax.Array
    point: jax.Array


def random_noise(*, norm: str, eps: balls.Radius, num_queries: int) -> Search:
    """Independent random points as far out as the ball and the box allow.

    Args:
        norm: "linf" (a random corner), "l2" or "l1" (uniform on the surface).
        eps: radius of the ball >= 0, in units of the image range [0, 1].
        num_queries: points >= 1.

    Returns:
        A `Search` of one try, without an objective.

    Raises:
        ValueError: unknown norm, a number out of range.

    Source: Carlini et al. 2019 (arXiv 1902.06705), section 5: a gradient attack that loses to noise is broken.
    """
    check.one_of("norm", norm, balls.NORMS)
    balls.check_radius("eps", eps)
    check.at_least("num_queries", num_queries, 1)

    def draw(key: Key, image: jax.Array) -> jax.Array:
        if norm != "linf":
            return balls.surface_start(key, norm, eps, image)
        corner = jax.random.rademacher(key, image.shape, image.dtype)
        return balls.project(norm, eps, image, image + eps * corner)

    def start(key: Key, image: jax.Array, logits: jax.Array, label: jax.Array, index: jax.Array) -> _State:
        del logits, label, index
        return _State(key, image, draw(key, image))

    def learn(state: _State, answer: Answer) -> _State:
        del answer
        key, of_draw = jax.random.split(state.key)
        return _State(key, state.image, draw(of_draw, state.image))

    return Search(
        start=start,
        point=lambda state: state.point,
        learn=learn,
        ended=lambda state: state.image.ravel()[0] != state.image.ravel()[0],  # a NaN image
        objective=None,
        inside=lambda image, point: balls.inside(norm, eps, image, point),
        num_tries=1,
        num_queries=num_queries,
    )
