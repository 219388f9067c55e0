"""FAB: the closest misclassified point by projections onto linearised decision boundaries, one target at a time."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.attacks import balls, objectives
from fedrobust.types import Answer, Key, Search


class _State(NamedTuple):
    image: jax.Array  # [H,W,C] the clean image
    label: jax.Array  # [] int32
    target: jax.Array  # [] int32
    point: jax.Array  # [H,W,C] what is asked about next
    is_candidate: jax.Array  # [] bool: the point is the end of a step, so a success there is followed by a way back
    num_steps: jax.Array  # [] int32, steps taken
    num_final_steps: jax.Array  # [] int32, points of the final search that were asked about
    best: jax.Array  # [H,W,C] the closest misclassified point
    best_length: jax.Array  # [] its distance, inf before there is one
    low: jax.Array  # [] the final search lies between these fractions of the way from the image to `best`
    high: jax.Array
    low_margin: jax.Array  # [] and these are the margins at them
    high_margin: jax.Array


def fab(
    *,
    norm: str,
    eps: balls.Radius,
    num_steps: int,
    num_targets: int,
    num_restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    num_final_steps: int = 3,
) -> Search:
    """Steps towards the boundary to one class, pulled back to the clean image: the smallest change of the class.

    With `v(x) = z_target - z_label`, its linearisation at the point `x` and the clean image `x0`, a step is

        d  = nearest(x, {v = 0}),  d0 = nearest(x0, {v = 0}),  alpha = min(|d| / (|d| + |d0|), alpha_max)
        x <- clip((1 - alpha) (x + eta d) + alpha (x0 + eta d0), 0, 1)
        x <- x0 + beta (x - x0)     if x is misclassified

    It minimises the distance, so it also walks outside the ball; only a success inside it counts. The step does not
    change when the logits are scaled.

    Args:
        norm: "linf", "l2" or "l1", of the distance.
        eps: radius >= 0 of the ball, in units of the image range [0, 1].
        num_steps: steps of one try, >= 1, with one question each and one more for every way back.
        num_targets: how many of the other classes, largest logits first, are targets: >= 1 and below L. L - 1 leaves
            none out; 1 is the whole attack for two classes.
        num_restarts: starts per target, >= 1: the clean image, then points at a distance of eps / 2.
        alpha_max: the largest share of the clean image's own projection, in [0, 1].
        eta: how far a step goes, 1 is onto the linearised boundary, > 0.
        beta: how much of the change a way back keeps, in (0, 1).
        num_final_steps: questions of the final search between the clean image and the closest success, >= 0.

    Returns:
        A `Search` of num_restarts * num_targets tries (all targets from the clean image first) and at most
        2 num_steps + num_final_steps questions each.

    Raises:
        ValueError: unknown norm, a number out of range; in `start`, more targets than other classes.

    Guarantees:
        Points are in [0, 1]. A zero or NaN gradient makes no step. With a linear model the first step from the clean
        image crosses the boundary at eta times the least distance.

    Source:
        Croce, Hein 2020, https://arxiv.org/abs/1907.02044, algorithm 1 and the final search of section 3.2; one target
        at a time as in Croce, Hein 2020, https://arxiv.org/abs/2003.01690, section 4. Deviations: a success that is not
        the end of a step is remembered too; the final search follows the margin to all other classes.
    """
    _check(norm, eps, num_steps, num_targets, num_restarts)
    check.fraction("alpha_max", alpha_max)
    check.positive("eta", eta)
    check.fraction("beta", beta, zero=False, one=False)
    check.at_least("num_final_steps", num_final_steps, 0)

    def start(key: Key, image: jax.Array, logits: jax.Array, label: jax.Array, index: jax.Array) -> _State:
        chex.assert_rank([image, logits, label], [3, 1, 0])
        num_others = logits.shape[0] - 1
        check.require(num_targets <= num_others, "num_targets", num_targets, f"<= {num_others}, the other classes")
        target = objectives.target_class(logits, label, index % num_targets)
        point = jnp.where(index < num_targets, image, balls.surface_start(key, norm, 0.5 * eps, image))
        return _begin(image, logits, label, target, point)

    def learn(state: _State, answer: Answer) -> _State:
        has_stepped = (state.num_steps == num_steps) & ~state.is_candidate
        new = _remember(norm, state, answer)
        goes_back = state.is_candidate & _is_wrong(state, answer)
        ends = state.num_steps == num_steps
        stepped = _step(norm, state, answer, alpha_max=alpha_max, eta=eta)
        back = state.image + beta * (state.point - state.image)
        new = new._replace(
            point=jnp.where(ends, _between(new), jnp.where(goes_back, back, stepped)),
            is_candidate=~ends & ~goes_back,
            num_steps=state.num_steps + (~ends & ~goes_back),
        )
        return jax.tree.map(lambda a, b: jnp.where(has_stepped, a, b), _narrow(state, answer), new)

    def ended(state: _State) -> jax.Array:
        done = (state.num_final_steps >= num_final_steps) | ~jnp.isfinite(state.best_length)
        return (state.num_steps == num_steps) & ~state.is_candidate & done

    return Search(
        start=start,
        point=lambda state: state.point,
        learn=learn,
        ended=ended,
        objective=lambda logits, label, state: objectives.targeted_margin(logits, label, state.target),
        inside=lambda image, point: balls.inside(norm, eps, image, point),
        num_tries=num_restarts * num_targets,
        num_queries=2 * num_steps + num_final_steps,
    )


def _begin(image: jax.Array, logits: jax.Array, label: jax.Array, target: jax.Array, point: jax.Array) -> _State:
    """Before the first question."""
    zero, none = jnp.zeros((), image.dtype), jnp.zeros((), jnp.int32)
    return _State(
        image=image,
        label=label,
        target=target,
        point=point,
        is_candidate=jnp.zeros((), bool),
        num_steps=none,
        num_final_steps=none,
        best=image,
        best_length=jnp.full((), jnp.inf, image.dtype),
        low=zero,
        high=jnp.ones((), image.dtype),
        low_margin=objectives.margin(logits, label).astype(image.dtype),
        high_margin=zero,
    )


def nearest(norm: str, point: jax.Array, normal: jax.Array, gap: jax.Array) -> jax.Array:
    """The shortest change of a point in the box [0, 1] that keeps it there and moves it by `gap` along a gradient.

    `argmin |d|` subject to `<normal, d> = gap` and `0 <= point + d <= 1`; where no `d` does, the `d` that comes
    closest.

    Every pixel can move by `room_i` towards the hyperplane. With `u_i = |normal_i|`, "linf" moves all by the same
    level, "l2" by the level times `u_i`, up to their room, and the level solves `sum_i a_i min(level, k_i) = |gap|`: `a
    = u`, `k = room` for "linf", `a = u^2`, `k = room / u` for "l2". "l1" fills the rooms of the largest `u_i` first.

    Args:
        norm: "linf", "l2" or "l1".
        point: [...] in [0, 1].
        normal: [...] of the same shape; NaN counts as 0.
        gap: [], NaN counts as 0.

    Returns:
        [...]; zero where the normal is.

    Guarantees:
        Exact up to float rounding (no iteration limit is ever met); not changed when normal and gap are scaled alike.

    Source:
        Croce, Hein 2020, https://arxiv.org/abs/1907.02044, section 2.2 and its appendix: the problem. Deviation: Newton
        steps in place of sorting.
    """
    chex.assert_equal_shape([point, normal])
    normal = jnp.nan_to_num(normal)
    largest = jnp.max(jnp.abs(normal))
    scale = jnp.where(largest > 0, largest, 1)
    size = jnp.clip(jnp.abs(normal) / scale, 0, 1)  # as in balls.direction: the clip keeps XLA from undoing the scaling
    gap = jnp.where(jnp.isnan(gap), 0, gap) / scale
    way = jnp.sign(normal) * jnp.sign(gap)
    room = jnp.where(way > 0, 1 - point, point) * (way != 0)
    reach = size * room
    need = jnp.minimum(jnp.abs(gap), jnp.sum(reach))
    if norm == "l1":
        change = _greedy(size, room, need)
    elif norm == "l2":
        kink = room / jnp.where(size > 0, size, 1)
        change = jnp.minimum(_level(jnp.square(size), kink, reach, need) * size, room)
    else:
        change = jnp.minimum(_level(size, room, reach, need), room)
    return way * jnp.where(jnp.abs(gap) >= jnp.sum(reach), room, change)


def _level(slope: jax.Array, kink: jax.Array, reach: jax.Array, need: jax.Array) -> jax.Array:
    """The smallest level with `sum_i slope_i min(level, kink_i) = need`, where `reach = slope * kink`.

    Newton from 0. The sum is concave, so its tangent never lies below it: no step goes too far, and a step that passes
    no further kink solves the last linear piece. So it ends, after as many steps as there are kinks at most (about 8
    for a photograph).
    """

    def go_on(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return carry[1] > carry[0]

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        level = carry[1]
        is_full = kink <= level
        rise = jnp.sum(jnp.where(is_full, 0, slope))
        target = (need - jnp.sum(jnp.where(is_full, reach, 0))) / jnp.where(rise > 0, rise, 1)
        return level, jnp.where(rise > 0, jnp.maximum(level, target), level)

    return jax.lax.while_loop(go_on, step, (-jnp.ones((), slope.dtype), jnp.zeros((), slope.dtype)))[1]


def _greedy(size: jax.Array, room: jax.Array, need: jax.Array) -> jax.Array:
    """Changes that add up to `sum size * change = need`, the largest sizes first: the least sum of changes."""
    order = jnp.argsort(-size.ravel())
    size, sorted_room = size.ravel()[order], room.ravel()[order]
    reach = size * sorted_room
    left = need - (jnp.cumsum(reach) - reach)
    change = jnp.clip(left / jnp.where(size > 0, size, 1), 0, sorted_room)
    return jnp.zeros_like(change).at[order].set(change).reshape(room.shape)


def _step(norm: str, state: _State, answer: Answer, *, alpha_max: float, eta: float) -> jax.Array:
    """The convex combination of the two projections, each overshot by eta."""
    offset = jnp.sum(jnp.nan_to_num(answer.gradient) * (state.image - state.point))
    points = jnp.stack([state.point, state.image])
    gaps = -jnp.stack([answer.value, answer.value + offset])
    here, clean = jax.vmap(nearest, (None, 0, None, 0))(norm, points, answer.gradient, gaps)
    length, length_clean = balls.length(norm, here), balls.length(norm, clean)
    total = length + length_clean
    alpha = jnp.minimum(jnp.where(total > 0, length / jnp.where(total > 0, total, 1), 1), alpha_max)
    mixed = (1 - alpha) * (state.point + eta * here) + alpha * (state.image + eta * clean)
    return jnp.clip(mixed, 0, 1)


def _is_wrong(state: _State, answer: Answer) -> jax.Array:
    """Whether the model errs; not with NaN logits."""
    return (jnp.argmax(answer.logits) != state.label) & ~jnp.any(jnp.isnan(answer.logits))


def _remember(norm: str, state: _State, answer: Answer) -> _State:
    """The state with its closest misclassified point renewed."""
    length = balls.length(norm, state.point - state.image)
    closer = _is_wrong(state, answer) & (length < state.best_length)
    return state._replace(
        best=jnp.where(closer, state.point, state.best),
        best_length=jnp.where(closer, length, state.best_length),
        high_margin=jnp.where(closer, objectives.margin(answer.logits, state.label), state.high_margin).astype(
            state.high_margin.dtype
        ),
    )


def _fraction(state: _State) -> jax.Array:
    """Where a margin that is linear between the ends of the final search is 0, as a fraction of the way to `best`."""
    rise = state.high_margin - state.low_margin
    share = jnp.where(rise > 0, jnp.clip(-state.low_margin / jnp.where(rise > 0, rise, 1), 0, 1), 0.5)
    return state.low + share * (state.high - state.low)


def _between(state: _State) -> jax.Array:
    return state.image + _fraction(state) * (state.best - state.image)


def _narrow(state: _State, answer: Answer) -> _State:
    """One step of the final search: the point that was asked about becomes the end of its own side."""
    middle, is_wrong = _fraction(state), _is_wrong(state, answer)
    margin = objectives.margin(answer.logits, state.label).astype(state.low.dtype)
    state = state._replace(
        low=jnp.where(is_wrong, state.low, middle),
        high=jnp.where(is_wrong, middle, state.high),
        low_margin=jnp.where(is_wrong, state.low_margin, margin),
        high_margin=jnp.where(is_wrong, margin, state.high_margin),
        num_final_steps=state.num_final_steps + 1,
    )
    return state._replace(point=_between(state))


def _check(norm: str, eps: balls.Radius, num_steps: int, num_targets: int, num_restarts: int) -> None:
    check.one_of("norm", norm, balls.NORMS)
    balls.check_radius("eps", eps)
    check.at_least("num_steps", num_steps, 1)
    check.at_least("num_targets", num_targets, 1)
    check.at_least("num_restarts", num_restarts, 1)
