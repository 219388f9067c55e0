"""Auto-PGD for the l1 ball: few pixels per step, as many as the best point so far suggests, in balls that shrink."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust.attacks import balls, objectives
from fedrobust.attacks.balls import Radius
from fedrobust.types import Answer, Key, Search

_SCALES = (3, 2, 1)  # radii of the stages, over eps
_CHECKED = 0.04  # of a stage's steps lie between its checkpoints
_FIRST = 5  # all entries over those that steps from the clean image may move
_FEWER = 1.5  # entries that the best point moves over those of the next steps; also a step size over the next
_STILL = 0.95  # share of the entries before, from which on the best point counts as no sparser
_SMALLEST = 10  # the first step size over the last


class _State(NamedTuple):
    image: jax.Array  # the clean one
    target: jax.Array
    x: jax.Array
    best_x: jax.Array  # of this stage
    best_value: jax.Array
    best_gradient: jax.Array
    step: jax.Array  # answers so far
    step_size: jax.Array
    num_kept: jax.Array  # entries that a step may move
    num_moved: jax.Array  # entries that the best point moved at the last checkpoint


class _Plan(NamedTuple):
    """What happens at each question, [num_queries]."""

    scale: np.ndarray  # of the radius
    next_scale: np.ndarray  # of the question after it
    first: np.ndarray  # of a stage
    last: np.ndarray
    checks: np.ndarray  # is a checkpoint


def l1_auto_pgd(
    *,
    eps: Radius,
    num_steps: int,
    random_start: bool,
    objective: objectives.Objective,
    num_restarts: int,
    num_targets: int,
) -> Search:
    """`x <- P(x + s sign(g_k) / |sign(g_k)|_1)`, g_k the gradient with all but its largest entries set to 0.

    P projects on the l1 ball and the box. Three stages in balls of radius 3 eps, 2 eps and eps take 30, 30 and 40 % of
    the steps, each from the best point of the one before. k is two thirds of the entries that a stage's first point
    moves (a fifth of all, if it moves none), from the first checkpoint on of those that its best point moves. There the
    step size s, at first the radius, is divided by 1.5, down to a tenth; or, where the best point moves less than 95 %
    of the entries it moved before, it is the radius again and the search goes on from that point.

    Args:
        eps: radius of the ball >= 0.
        num_steps: gradients per try, >= 1; each stage asks about one point more.
        random_start: start at a normal draw, projected, not at the clean image.
        objective: resolved.
        num_restarts: independent starts per target.
        num_targets: the classes a targeted objective tries.

    Returns:
        A `Search` of `num_targets * num_restarts` tries. Points of the first two stages may lie outside the ball of
        radius eps; there no success counts.

    Source:
        Croce, Hein 2021 ("Mind the box"), https://arxiv.org/abs/2103.01208, its l1-APGD in the multi-radius version;
        what a stage starts with is as in the authors' code. Deviation: shares of steps are rounded down, so that the
        last stage has one at least.
    """
    plan = _plan(num_steps)

    def start(key: Key, image: jax.Array, logits: jax.Array, label: jax.Array, index: jax.Array) -> _State:
        objectives.check_targets(num_targets, logits)
        target = objectives.target_class(logits, label, index // num_restarts)
        draw = jax.random.normal(key, image.shape, image.dtype)
        x = balls.project("l1", plan.scale[0] * eps, image, image + draw) if random_start else image
        none, zero = jnp.full((), -jnp.inf, jnp.float32), jnp.zeros((), image.dtype)
        return _State(image, target, x, x, none, jnp.zeros_like(image), jnp.int32(0), zero, zero, zero)

    def learn(state: _State, answer: Answer) -> _State:
        scale, next_scale, first, last, checks = (jnp.asarray(x)[state.step] for x in plan)
        radius = jnp.asarray(scale * eps, state.x.dtype)
        state = _noted(state, answer, first, radius)
        num_moved = _num_moved(state.image, state.best_x)
        is_sparser = checks & (num_moved < _STILL * state.num_moved)
        x = jnp.where(is_sparser, state.best_x, state.x)
        gradient = jnp.where(is_sparser, state.best_gradient, answer.gradient)
        num_kept = jnp.where(checks, num_moved / _FEWER, state.num_kept)
        smaller = jnp.maximum(state.step_size / _FEWER, radius / _SMALLEST)
        step_size = jnp.where(is_sparser, radius, jnp.where(checks, smaller, state.step_size))
        moved = jnp.where(last, state.best_x, x + step_size * _sparse_direction(gradient, num_kept))
        return state._replace(
            x=balls.project("l1", next_scale * eps, state.image, moved),
            step=state.step + 1,
            step_size=step_size,
            num_kept=num_kept,
            num_moved=jnp.where(checks, num_moved, state.num_moved),
        )

    return Search(
        start=start,
        point=lambda state: state.x,
        learn=learn,
        ended=lambda state: jnp.zeros((), bool),
        objective=objectives.of_state(objective),
        inside=lambda image, point: balls.inside("l1", eps, image, point),
        num_tries=num_targets * num_restarts,
        num_queries=len(plan.scale),
    )


def _noted(state: _State, answer: Answer, first: jax.Array, radius: jax.Array) -> _State:
    """The state with an answer at `x` taken in; at the first of a stage everything begins anew."""
    is_best = first | (answer.value > state.best_value)
    num_moved, size = _num_moved(state.image, state.x), jnp.asarray(state.x.size, state.x.dtype)
    num_kept = jnp.where(num_moved > 0, num_moved / _FEWER, size / _FIRST)
    return state._replace(
        best_x=jnp.where(is_best, state.x, state.best_x),
        best_value=jnp.where(is_best, jnp.nan_to_num(answer.value, nan=-jnp.inf), state.best_value),
        best_gradient=jnp.where(is_best, answer.gradient, state.best_gradient),
        step_size=jnp.where(first, radius, state.step_size),
        num_kept=jnp.where(first, num_kept, state.num_kept),
        num_moved=jnp.where(first, jnp.where(num_moved > 0, num_moved, size), state.num_moved),
    )


def _num_moved(image: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(x != image).astype(x.dtype)


def _sparse_direction(gradient: jax.Array, num_kept: jax.Array) -> jax.Array:
    """The signs of the largest entries of a gradient, equal ones together, over how many are not 0."""
    size = jnp.abs(jnp.nan_to_num(gradient))
    place = jnp.clip((size.size - num_kept).astype(jnp.int32), 0, size.size - 1)
    sign = jnp.sign(jnp.nan_to_num(gradient)) * (size >= jnp.sort(size.ravel())[place])
    return sign / jnp.maximum(jnp.sum(jnp.abs(sign)), 1)


def _plan(num_steps: int) -> _Plan:
    """Stages of num_steps in all; those without a step are left out.

    >>> _plan(10).scale.tolist()
    [3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1]
    """
    early = 3 * num_steps // 10
    stages = []
    for scale, n in zip(_SCALES, (early, early, num_steps - 2 * early), strict=True):
        place = np.arange(n + 1)
        every = max(int(_CHECKED * n), 1)
        # The checkpoint after the last step would change nothing: the next stage begins anew.
        checks = (place > 0) & (place % every == 0) & (place < n)
        stages += [np.stack([np.full(n + 1, scale), place == 0, place == n, checks])] if n else []
    scale, *flags = np.concatenate(stages, axis=1)
    return _Plan(scale, np.append(scale[1:], 1), *(flag.astype(bool) for flag in flags))
