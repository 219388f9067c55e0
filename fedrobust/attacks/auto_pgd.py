"""Auto-PGD: gradient ascent with momentum that sets its own step size."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check
from fedrobust.attacks import balls, objectives
from fedrobust.attacks.balls import Radius
from fedrobust.attacks.l1_auto_pgd import l1_auto_pgd
from fedrobust.types import Answer, Key, Search

_INERTIA = 0.25  # 1 - alpha of the paper: the share of the last move in the next
_RISING = 0.75  # rho: the share of steps that must rise for the step size to stay


class _State(NamedTuple):
    image: jax.Array  # the clean one
    target: jax.Array
    x: jax.Array
    last_x: jax.Array
    last_value: jax.Array
    best_x: jax.Array
    best_value: jax.Array
    best_gradient: jax.Array
    step: jax.Array  # answers so far
    step_size: jax.Array
    num_rises: jax.Array  # since the last checkpoint
    checked_value: jax.Array  # `best_value` at the last checkpoint
    was_halved: jax.Array  # whether the last checkpoint halved the step size


def auto_pgd(
    *,
    norm: str,
    eps: Radius,
    num_steps: int,
    random_start: bool,
    objective: str | objectives.Objective,
    num_restarts: int = 1,
    num_targets: int = 1,
) -> Search:
    """`z = P(x + s d(g)); x <- P(x + 0.75 (z - x) + 0.25 (x - last x))`, the step s halved where it stops paying.

    P is the projection, d the unit direction of the gradient. s begins at 2 eps. At checkpoints it is halved and the
    search goes on from the best point so far, if less than 0.75 of the steps since the last checkpoint raised the
    objective, or if neither s nor the best value has changed since. "l1" has its own rules: see `l1_auto_pgd`.

    Args:
        norm: "linf", "l2" or "l1", of the ball and of the step.
        eps: radius of the ball >= 0, in units of the image range [0, 1].
        num_steps: gradients per try, >= 1; the point after the last is asked about as well ("l1": of each stage).
        random_start: start on the surface of the ball, in a random direction, not at the clean image.
        objective: a name in `OBJECTIVES`, or one of your own.
        num_restarts: independent starts >= 1 per target; more than one needs `random_start`.
        num_targets: the classes a targeted objective tries, in the order of the clean logits, in [1, L - 1].

    Returns:
        A `Search` of `num_targets * num_restarts` tries.

    Raises:
        ValueError: unknown norm or objective; a number out of range; restarts that would all be the same. When it is
            started: more targets than other classes; too few classes for the objective.

    Guarantees:
        Points are in [0, 1] and in the ball up to float rounding ("l1": those of the last stage; outside the ball none
        counts). A zero or NaN gradient takes no step of its own; a NaN value never counts as a rise or as the best.

    Source:
        Croce, Hein 2020, https://arxiv.org/abs/2003.01690, algorithm 1 with section 3's checkpoints and conditions 1
        and 2; the start is that of the authors' code. A rise is counted between points that were asked about, so the
        first after a return to the best point is measured from the point before it.
    """
    check.one_of("norm", norm, balls.NORMS)
    balls.check_radius("eps", eps)
    check.at_least("num_steps", num_steps, 1)
    check.at_least("num_restarts", num_restarts, 1)
    check.require(num_restarts == 1 or random_start, "num_restarts", num_restarts, "1 unless random_start is true")
    resolved = objectives.resolve(objective, num_targets)
    if norm == "l1":
        return l1_auto_pgd(
            eps=eps, num_steps=num_steps, random_start=random_start, objective=resolved,
            num_restarts=num_restarts, num_targets=num_targets,
        )  # fmt: skip
    window = _windows(num_steps)

    def start(key: Key, image: jax.Array, logits: jax.Array, label: jax.Array, index: jax.Array) -> _State:
        objectives.check_targets(num_targets, logits)
        target = objectives.target_class(logits, label, index // num_restarts)
        x = balls.surface_start(key, norm, eps, image) if random_start else image
        none, zero = jnp.full((), -jnp.inf, jnp.float32), jnp.int32(0)
        step_size = jnp.asarray(2 * eps, image.dtype)
        no_gradient = jnp.zeros_like(image)
        return _State(image, target, x, x, none, x, none, no_gradient, zero, step_size, zero, none, zero > 0)

    def learn(state: _State, answer: Answer) -> _State:
        state = _noted(state, answer)
        length = jnp.asarray(window)[state.step]
        halves = (length > 0) & _pays_no_more(state, length)
        x = jnp.where(halves, state.best_x, state.x)
        gradient = jnp.where(halves, state.best_gradient, answer.gradient)
        step_size = jnp.where(halves, state.step_size / 2, state.step_size)
        return state._replace(
            x=_moved(norm, eps, state, x, step_size * balls.direction(norm, gradient)),
            last_x=x,
            step=state.step + 1,
            step_size=step_size,
            num_rises=jnp.where(length > 0, 0, state.num_rises),
            checked_value=jnp.where((length > 0) | (state.step == 0), state.best_value, state.checked_value),
            was_halved=jnp.where(length > 0, halves, state.was_halved),
        )

    return Search(
        start=start,
        point=lambda state: state.x,
        learn=learn,
        ended=lambda state: jnp.zeros((), bool),
        objective=objectives.of_state(resolved),
        inside=lambda image, point: balls.inside(norm, eps, image, point),
        num_tries=num_targets * num_restarts,
        num_queries=num_steps + 1,
    )


def _noted(state: _State, answer: Answer) -> _State:
    """The state with an answer at `x` taken in."""
    is_best = answer.value > state.best_value
    return state._replace(
        last_value=answer.value,
        best_x=jnp.where(is_best, state.x, state.best_x),
        best_value=jnp.where(is_best, answer.value, state.best_value),
        best_gradient=jnp.where(is_best, answer.gradient, state.best_gradient),
        num_rises=state.num_rises + ((answer.value > state.last_value) & (state.step > 0)),
    )


def _moved(norm: str, eps: Radius, state: _State, x: jax.Array, step: jax.Array) -> jax.Array:
    """The point after a step from `x`, with a share of the last move."""
    ahead = balls.project(norm, eps, state.image, x + step)
    inertia = jnp.where(state.step == 0, 0, _INERTIA).astype(x.dtype)
    return balls.project(norm, eps, state.image, x + (1 - inertia) * (ahead - x) + inertia * (x - state.last_x))


def _pays_no_more(state: _State, length: jax.Array) -> jax.Array:
    """Conditions 1 and 2 of the paper, `length` steps after the last checkpoint."""
    few_rises = state.num_rises < _RISING * length
    return few_rises | (~state.was_halved & (state.best_value == state.checked_value))


def _windows(num_steps: int) -> np.ndarray:
    """[num_steps + 1] int32: at every checkpoint the steps since the one before, else 0.

    >>> [int(step) for step in np.flatnonzero(_windows(100))]
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    steps = sorted({math.ceil(round(share * num_steps, 6)) for share in shares})
    window = np.zeros(num_steps + 1, np.int32)
    for before, step in itertools.pairwise(steps):
        if step <= num_steps:
            window[step] = step - before
    return window
