"""RayS: an attack that sees the predicted class alone and walks along rays of signs to the boundary."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.attacks import balls
from fedrobust.types import Answer, Key, Search


class _State(NamedTuple):
    image: jax.Array  # [H,W,C] the clean image
    label: jax.Array  # [] int32
    direction: jax.Array  # [H,W,C] of -1 and 1, the best so far
    radius: jax.Array  # [] where its ray is misclassified, inf before there is one
    level: jax.Array  # [] int32, blocks are the image cut in 2^level parts
    block: jax.Array  # [] int32, the block whose signs are turned in the attempt
    is_halving: jax.Array  # [] bool: the attempt has passed the check and its radius is being searched
    low: jax.Array  # [] that radius lies between these
    high: jax.Array
    num_failures: jax.Array  # [] int32, attempts in a row that were no better


def rays(*, eps: balls.Radius, num_queries: int, tolerance: float) -> Search:
    """Finds the direction of signs whose ray leaves the class soonest, by turning the signs of ever smaller blocks.

    An attempt is the best direction with the signs of one block turned. It is worth a search only if it is
    misclassified at the best radius so far; then halving finds its own radius. Blocks are the whole image, its halves,
    its quarters, down to single values, in the order channel, row, column.

    Args:
        eps: radius >= 0 of the "linf" ball, in units of the image range [0, 1], where a success counts.
        num_queries: questions in all, >= 1.
        tolerance: how closely a radius is searched, in the same units, > 0.

    Returns:
        A `Search` of one try without an objective; it reads the argmax of the logits and nothing else, and draws
        nothing.

    Raises:
        ValueError: a number out of range.

    Guarantees:
        Points are in [0, 1]; the radius never grows; at the radius found the best ray is misclassified. It ends when no
        single sign can be turned to any use.

    Source:
        Chen, Gu 2020, https://arxiv.org/abs/2006.12792, algorithms 2 and 3. Deviation: radii are those of the "linf"
        ball throughout, so the tolerance does not depend on the number of pixels.
    """
    balls.check_radius("eps", eps)
    check.at_least("num_queries", num_queries, 1)
    check.positive("tolerance", tolerance)

    def start(key: Key, image: jax.Array, logits: jax.Array, label: jax.Array, index: jax.Array) -> _State:
        chex.assert_rank([image, logits, label], [3, 1, 0])
        del key, index
        no = jnp.zeros((), jnp.int32)
        return _State(
            image=image,
            label=label,
            direction=jnp.ones_like(image),
            radius=jnp.full((), jnp.inf, image.dtype),
            level=no,
            block=no,
            is_halving=jnp.zeros((), bool),
            low=jnp.zeros((), image.dtype),
            high=jnp.ones((), image.dtype),
            num_failures=no,
        )

    def point(state: _State) -> jax.Array:
        radius = jnp.where(state.is_halving, (state.low + state.high) / 2, _reach(state))
        return jnp.clip(state.image + radius * _attempt(state), 0, 1)

    def learn(state: _State, answer: Answer) -> _State:
        is_wrong = jnp.argmax(answer.logits) != state.label
        middle = (state.low + state.high) / 2
        low = jnp.where(state.is_halving, jnp.where(is_wrong, state.low, middle), 0)
        high = jnp.where(state.is_halving, jnp.where(is_wrong, middle, state.high), _reach(state))
        passed = state.is_halving | is_wrong
        is_halving = passed & (high - low > tolerance)
        return _advance(state._replace(low=low, high=high, is_halving=is_halving), passed & (high < state.radius))

    def ended(state: _State) -> jax.Array:
        return state.num_failures >= state.image.size

    return Search(
        start=start,
        point=point,
        learn=learn,
        ended=ended,
        objective=None,
        inside=lambda image, point: balls.inside("linf", eps, image, point),
        num_tries=1,
        num_queries=num_queries,
    )


def _reach(state: _State) -> jax.Array:
    """The radius of the check: the best one, or 1, which leads to a corner of the box."""
    return jnp.minimum(state.radius, 1)


def _size(state: _State) -> jax.Array:
    """The values in a block, all but perhaps the last: the image's over 2^level, rounded up."""
    return (state.image.size + (1 << state.level) - 1) >> state.level


def _attempt(state: _State) -> jax.Array:
    """The best direction with the signs of the block turned."""
    height, width, channels = state.image.shape
    place = jnp.arange(state.image.size).reshape(channels, height, width).transpose(1, 2, 0)
    return jnp.where(place // _size(state) == state.block, -state.direction, state.direction)


def _advance(state: _State, is_better: jax.Array) -> _State:
    """After an answer: unless the radius is still being searched, the attempt's result and the next block."""
    deepest = math.ceil(math.log2(state.image.size))
    over = ~state.is_halving
    wins = over & is_better
    is_last = (state.block + 1) * _size(state) >= state.image.size
    return state._replace(
        direction=jnp.where(wins, _attempt(state), state.direction),
        radius=jnp.where(wins, state.high, state.radius),
        level=jnp.where(over & is_last, jnp.minimum(state.level + 1, deepest), state.level),
        block=jnp.where(over, jnp.where(is_last, 0, state.block + 1), state.block),
        num_failures=jnp.where(wins, 0, state.num_failures + (over & (state.level == deepest))),
    )
