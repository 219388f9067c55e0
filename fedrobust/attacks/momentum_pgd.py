"""PGD with momentum, which stops when it goes in circles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.attacks import balls, objectives
from fedrobust.attacks.balls import Radius
from fedrobust.types import Answer, Key, Search


class _State(NamedTuple):
    image: jax.Array  # the clean one
    target: jax.Array
    x: jax.Array
    momentum: jax.Array
    old_x: jax.Array  # where the search for a cycle began
    old_momentum: jax.Array
    length: jax.Array  # steps since then
    limit: jax.Array  # steps until it begins anew, a power of 2
    is_cycle: jax.Array


def momentum_pgd(
    *,
    norm: str,
    eps: Radius,
    step_size: Radius,
    num_steps: int,
    momentum: float,
    random_start: bool,
    objective: str | objectives.Objective = "cross_entropy",
    num_restarts: int = 1,
    num_targets: int = 1,
    detect_cycles: bool = True,
) -> Search:
    """`m <- momentum * m + g / mean|g|; x <- project(x + step_size * direction(m))`, g the gradient of the objective.

    Args:
        norm: "linf", "l2" or "l1", of the ball and of the step.
        eps: radius of the ball >= 0, in units of the image range [0, 1].
        step_size: length of a step >= 0, in the same units.
        num_steps: gradients per try, >= 1; the point after the last is asked about as well.
        momentum: share of the old direction that is kept, in [0, 1]; 0 is PGD.
        random_start: start uniformly inside the ball, not at the clean image.
        objective: a name in `OBJECTIVES`, or one of your own.
        num_restarts: independent starts >= 1 per target; more than one needs `random_start`.
        num_targets: the classes a targeted objective tries, in the order of the clean logits, in [1, L - 1].
        detect_cycles: end a try when point and momentum come back, entry for entry, to where they were. Set it to False
            for a model whose answers are random.

    Returns:
        A `Search` of `num_targets * num_restarts` tries.

    Raises:
        ValueError: unknown norm or objective; a number out of range; restarts that would all be the same. When it is
            started: more targets than other classes; too few classes for the objective.

    Guarantees:
        Points are in [0, 1] and in the ball up to float rounding. A zero or NaN gradient moves nothing by itself. The
        result is the same with and without `detect_cycles`: only equality of the whole state ends a try, found by
        Brent's rule with one remembered state, at most 3 times as late as the cycle closes.

    Source:
        Dong et al. 2018, https://arxiv.org/abs/1710.06081, equations 6, 7 and 11; Madry et al. 2018,
        https://arxiv.org/abs/1706.06083. Deviation: the mean of |g| in place of its sum, which scales m alone. Brent
        1980, https://doi.org/10.1007/BF01933190 ("An improved Monte Carlo factorization algorithm"), section 2.
    """
    check.one_of("norm", norm, balls.NORMS)
    balls.check_radius("eps", eps)
    balls.check_radius("step_size", step_size)
    check.at_least("num_steps", num_steps, 1)
    check.fraction("momentum", momentum)
    check.at_least("num_restarts", num_restarts, 1)
    check.require(num_restarts == 1 or random_start, "num_restarts", num_restarts, "1 unless random_start is true")
    resolved = objectives.resolve(objective, num_targets)

    def start(key: Key, image: jax.Array, logits: jax.Array, label: jax.Array, index: jax.Array) -> _State:
        objectives.check_targets(num_targets, logits)
        target = objectives.target_class(logits, label, index // num_restarts)
        x = balls.start(key, norm, eps, image) if random_start else image
        zero = jnp.zeros_like(image)
        return _State(image, target, x, zero, x, zero, jnp.int32(0), jnp.int32(1), jnp.zeros((), bool))

    def learn(state: _State, answer: Answer) -> _State:
        gradient = jnp.nan_to_num(answer.gradient)
        size = jnp.mean(jnp.abs(gradient))
        direction = momentum * state.momentum + gradient / jnp.where(size > 0, size, 1)
        x = balls.project(norm, eps, state.image, state.x + step_size * balls.direction(norm, direction))
        new = state._replace(x=x, momentum=direction)
        return _watched(new) if detect_cycles else new

    return Search(
        start=start,
        point=lambda state: state.x,
        learn=learn,
        ended=lambda state: state.is_cycle,
        objective=objectives.of_state(resolved),
        inside=lambda image, point: balls.inside(norm, eps, image, point),
        num_tries=num_targets * num_restarts,
        num_queries=num_steps + 1,
    )


def _watched(state: _State) -> _State:
    """Brent's rule: compare with a remembered state, and remember a new one after 1, 2, 4, ... steps."""
    length = state.length + 1
    is_cycle = jnp.all(state.x == state.old_x) & jnp.all(state.momentum == state.old_momentum)
    anew = length == state.limit
    return state._replace(
        old_x=jnp.where(anew, state.x, state.old_x),
        old_momentum=jnp.where(anew, state.momentum, state.old_momentum),
        length=jnp.where(anew, 0, length),
        limit=jnp.where(anew, 2 * state.limit, state.limit),
        is_cycle=is_cycle,
    )
