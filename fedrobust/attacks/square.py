"""Square attack: random squares, kept where they lower the margin. It sees logits and no gradient."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check
from fedrobust.attacks import balls, objectives
from fedrobust.types import Answer, Key, Search

NORMS = ("linf", "l2", "l1")

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10 000 queries


class Draw(NamedTuple):
    """The randomness of one proposal.

    Attributes:
        corner: [2,2] int32, (row, column) of the upper left corners of the square and, but for "linf", of the square
            that gives its budget away.
        sign: [C] float, -1 or 1, one per channel.
        is_turned: [] bool, but for "linf": the pattern's two halves lie side by side, not on top of each other.
    """

    corner: jax.Array
    sign: jax.Array
    is_turned: jax.Array


class _State(NamedTuple):
    key: jax.Array  # of the try
    image: jax.Array  # [H,W,C] the clean image
    label: jax.Array  # [] int32
    point: jax.Array  # [H,W,C] what is asked about next
    num_asked: jax.Array  # [] int32, answers so far
    best: jax.Array  # [H,W,C] the point of the largest margin so far
    value: jax.Array  # [] that margin, -inf before the first answer


def square(
    *,
    norm: str,
    eps: balls.Radius,
    num_queries: int,
    p_init: float,
    num_restarts: int = 1,
    rescale_schedule: bool = True,
) -> Search:
    """Random search by squares of shrinking side, each accepted if it raises the margin `max_{i != y} z_i - z_y`.

    "linf": the first point is the image with every column of every channel moved by +eps or -eps; a proposal moves one
    square to +eps or -eps per channel. "l2", "l1": a grid of peaks, steeper ones in "l1"; a proposal takes the change
    of one square away and spends it on another, as a pair of opposite peaks added to the direction that is there, and
    is projected ("l1": onto ball and box at once). A square covers the fraction p of
    the image; p halves after query 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000.

    Args:
        norm: "linf", "l2" or "l1".
        eps: radius >= 0 of the ball, in units of the image range [0, 1].
        num_queries: questions per try, the first point included, >= 1.
        p_init: the first fraction p, in (0, 1]; 0.8 in AutoAttack.
        num_restarts: independent tries, >= 1.
        rescale_schedule: those queries are of 10 000, and in proportion for another `num_queries`. AutoAttack does not.

    Returns:
        A `Search` without an objective: its driver computes no gradient.

    Raises:
        ValueError: unknown norm, a number out of range.

    Guarantees:
        Every point is in the ball (up to float rounding) and in [0, 1]; the margin of `best` never falls; NaN logits
        are never accepted; right for two classes. Draw i is `draw(fold_in(key, i), ...)`.

    Source:
        Andriushchenko, Croce, Flammarion, Hein 2020, https://arxiv.org/abs/1912.00049, algorithms 1 to 3, equation 2
        and the schedule of its appendix; the halving after 500 and the scaling of the schedule as in Croce, Hein 2020,
        https://arxiv.org/abs/2003.01690; "l1": Croce, Hein 2021, https://arxiv.org/abs/2103.01208, section 4, the peaks
        and budgets as in their code. Deviations: corners are uniform over all places that fit; "l1" draws whether a
        pattern is turned, as "l2" does; on images narrower than its smallest square (3) that covers the narrower side.
    """
    check.one_of("norm", norm, NORMS)
    balls.check_radius("eps", eps)
    check.at_least("num_queries", num_queries, 1)
    check.fraction("p_init", p_init, zero=False)
    check.at_least("num_restarts", num_restarts, 1)

    def start(key: Key, image: jax.Array, logits: jax.Array, label: jax.Array, index: jax.Array) -> _State:
        chex.assert_rank([image, logits, label], [3, 1, 0])
        del index  # the key is that of the try
        of_first = jax.random.fold_in(key, 0)
        change = eps * _stripes(of_first, image.shape) if norm == "linf" else _grid(norm, eps, of_first, image.shape)
        point = balls.project(norm, eps, image, image + change)
        worst = jnp.full((), -jnp.inf, logits.dtype)
        return _State(key, image, label, point, jnp.zeros((), jnp.int32), image, worst)

    def learn(state: _State, answer: Answer) -> _State:
        value = objectives.margin(answer.logits, state.label)
        is_better = value > state.value
        best = jnp.where(is_better, state.point, state.best)
        num_asked = state.num_asked + 1
        side = jnp.asarray(sides(norm, num_queries, p_init, state.image.shape, rescale_schedule))[num_asked]
        drawn = draw(jax.random.fold_in(state.key, num_asked), side, state.image.shape)
        move = _flat if norm == "linf" else functools.partial(_peaks, norm)
        point = move(eps, state.image, best, side, drawn)
        value = jnp.where(is_better, value, state.value)
        return state._replace(point=point, num_asked=num_asked, best=best, value=value)

    return Search(
        start=start,
        point=lambda state: state.point,
        learn=learn,
        ended=lambda state: jnp.zeros((), bool),
        objective=None,
        inside=lambda image, point: balls.inside(norm, eps, image, point),
        num_tries=num_restarts,
        num_queries=num_queries,
    )


def sides(norm: str, num_queries: int, p_init: float, shape: tuple[int, ...], rescale: bool = True) -> np.ndarray:
    """The side [num_queries] int32 of the square of query i >= 1; query 0 is the first point."""
    height, width = shape[:2]
    progress = np.arange(num_queries) * 10_000 // (num_queries if rescale else 10_000)
    num_halvings = np.searchsorted(_HALVED_AFTER, progress)  # how many marks lie below
    side = np.maximum(np.rint(np.sqrt(p_init / 2.0**num_halvings * height * width)), 1)
    if norm != "linf":
        side = np.maximum(side, 3)
        side += side % 2 == 0
    return np.minimum(side, min(height, width)).astype(np.int32)


def draw(key: Key, side: jax.Array, shape: tuple[int, ...]) -> Draw:
    """The randomness of a proposal: corners uniform over the places where a square of this side fits."""
    of_corner, of_sign, of_turn = jax.random.split(key, 3)
    corner = jax.random.randint(of_corner, (2, 2), 0, jnp.asarray(shape[:2], jnp.int32) - side + 1)
    return Draw(corner, jax.random.rademacher(of_sign, shape[2:], jnp.float32), jax.random.bernoulli(of_turn))


def _stripes(key: Key, shape: tuple[int, ...]) -> jax.Array:
    """[H,W,C] of -1 and 1, equal along a column."""
    return jnp.broadcast_to(jax.random.rademacher(key, (1, *shape[1:]), jnp.float32), shape)


def _grid(norm: str, eps: balls.Radius, key: Key, shape: tuple[int, ...]) -> jax.Array:
    """[H,W,C] pairs of peaks on tiles of a fifth of the image, a random sign per tile and channel.

    "l2": of length eps together; "l1": each of length 1, for a projection that keeps the highest.
    """
    height, width, channels = shape
    tile = max(min(height, width) // 5, 1)
    num = (height // tile, width // tile)
    of_sign, of_turn = jax.random.split(key)
    sign = jax.random.rademacher(of_sign, (*num, 1, 1, channels), jnp.float32)
    is_turned = jax.random.bernoulli(of_turn, shape=(*num, 1, 1, 1))
    place = jnp.arange(tile)
    upright = _unit(norm, pattern(norm, place[:, None], place[None], jnp.int32(tile), tile))
    peaks = sign * jnp.where(is_turned, upright.T[..., None], upright[..., None])  # [rows,columns,tile,tile,C]
    peaks = peaks.transpose(0, 2, 1, 3, 4).reshape(num[0] * tile, num[1] * tile, channels)
    rest = [size - n * tile for size, n in zip((height, width), num, strict=True)]
    peaks = jnp.pad(peaks, [(r // 2, r - r // 2) for r in rest] + [(0, 0)])
    return eps * _unit(norm, peaks) if norm == "l2" else peaks


def pattern(norm: str, row: jax.Array, column: jax.Array, side: jax.Array, max_side: int) -> jax.Array:
    """The update of "l2" and "l1" squares, not yet normalised: a peak in the upper half, its negative in the lower.

    A half of k rows and `side` columns holds `sum_{j = d + 1}^{n + 1} 1 / j^p` at the Chebyshev distance d from its
    centre, `n = side // 2`, p = 2 for "l2" and 4 for "l1"; each half has length 1.

    Args:
        norm: "l2" or "l1".
        row, column: integers from the corner of the square, any shapes that broadcast.
        side: [] int32.
        max_side: a static bound on it.

    Returns:
        Values at (row, column), 0 outside the square.

    Source:
        Andriushchenko et al. 2020, equation 2 and the text below it; Croce, Hein 2021 for "l1".
    """
    heights = 1 / np.arange(1.0, max_side + 3) ** {"l2": 2, "l1": 4}[norm]
    sums = jnp.asarray(np.concatenate([[0], np.cumsum(heights)]), jnp.float32)
    upper = side // 2

    def half(row: jax.Array, height: jax.Array) -> jax.Array:
        distance = jnp.maximum(jnp.abs(row - height // 2), jnp.abs(column - side // 2))
        value = sums[side // 2 + 1] - sums[jnp.clip(distance, 0, max_side + 2)]
        value = jnp.where((row >= 0) & (row < height) & (column >= 0) & (column < side), value, 0)
        return _unit(norm, value)

    return half(row, upper) - half(row - upper, side - upper)


def _within(corner: jax.Array, side: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[H,W,1] bool: the square of this corner (row, column)."""
    row, column = (jnp.arange(size) - at for size, at in zip(shape[:2], corner, strict=True))
    return (((row >= 0) & (row < side))[:, None] & ((column >= 0) & (column < side)))[..., None]


def _flat(eps: balls.Radius, image: jax.Array, best: jax.Array, side: jax.Array, drawn: Draw) -> jax.Array:
    """The best point with one square moved to the edge of the ball."""
    moved = balls.project("linf", eps, image, image + eps * drawn.sign.astype(image.dtype))
    return jnp.where(_within(drawn.corner[0], side, image.shape), moved, best)


def _peaks(norm: str, eps: balls.Radius, image: jax.Array, best: jax.Array, side: jax.Array, drawn: Draw) -> jax.Array:
    """The best point with the change of one square, and what the ball still allows, spent on another."""
    change = best - image
    to, of = (_within(corner, side, image.shape) for corner in drawn.corner)
    row, column = (jnp.arange(size) - at for size, at in zip(image.shape[:2], drawn.corner[0], strict=True))
    upright = pattern(norm, row[:, None], column[None], side, max(image.shape))
    turned = pattern(norm, column[None], row[:, None], side, max(image.shape))
    peaks = _unit(norm, jnp.where(drawn.is_turned, turned, upright))[..., None]
    by_channel = jax.vmap(functools.partial(balls.length, norm), in_axes=-1)  # [C]

    there = jnp.where(to, change, 0)
    new = drawn.sign.astype(image.dtype) * peaks + there / jnp.maximum(by_channel(there), 1e-12)
    available, channels = by_channel(jnp.where(to | of, change, 0)), image.shape[2]
    if norm == "l2":
        unused = jnp.maximum(jnp.square(eps) - jnp.sum(jnp.square(change)), 0)
        available = jnp.sqrt(jnp.square(available) + unused / channels)
    else:  # more than there is, for a projection that keeps the highest
        unused = jnp.maximum(eps - jnp.sum(jnp.abs(change)), 0)
        available = channels * available + unused
    new = new / jnp.maximum(by_channel(new), 1e-12) * available
    return balls.project(norm, eps, image, image + jnp.where(to, new, jnp.where(of, 0, change)))


def _unit(norm: str, x: jax.Array) -> jax.Array:
    """An array divided by its length; 0 stays 0."""
    return x / jnp.maximum(balls.length(norm, x), 1e-12)
