"""What an attack makes large, from the logits of one image; larger is worse for the model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedrobust import check

_TINY = 1e-12


class Objective(NamedTuple):
    """A value to make large.

    Attributes:
        value: `(logits[L], label[], target[]) -> []`, differentiable in the logits; untargeted ones ignore `target`.
        is_targeted: whether it pulls towards one class, so that one try per target makes sense.
        min_classes: the smallest L for which it is defined.
    """

    value: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    is_targeted: bool
    min_classes: int


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """`log sum_i exp z_i - z_y`: logits [L], label [] -> []."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def margin(logits: jax.Array, label: jax.Array) -> jax.Array:
    """`max_{i != y} z_i - z_y`: logits [L], label [] -> []. Positive only where the model is wrong; right for L >= 2.

    Source:
        Carlini, Wagner 2017, https://arxiv.org/abs/1608.04644, section V-A, f_6 without its bound at 0.
    """
    return jnp.max(_others(logits, label)) - logits[label]


def dlr(logits: jax.Array, label: jax.Array) -> jax.Array:
    """`-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))`, z_(k) the k-th largest: logits [L], label [] -> [].

    Not changed when the logits are scaled or shifted.

    Raises:
        ValueError: fewer than 3 classes.

    Source:
        Croce, Hein 2020, https://arxiv.org/abs/2003.01690, equation 6. With 1e-12 added to the denominator.
    """
    _need(logits, 3, "dlr")
    largest = jax.lax.top_k(logits, 3)[0]
    return margin(logits, label) / (largest[0] - largest[2] + _TINY)


def targeted_cross_entropy(logits: jax.Array, label: jax.Array, target: jax.Array) -> jax.Array:
    """`z_t - log sum_i exp z_i`: logits [L], label [] (not used), target [] -> []."""
    del label
    return -cross_entropy(logits, target)


def targeted_margin(logits: jax.Array, label: jax.Array, target: jax.Array) -> jax.Array:
    """`z_t - z_y`: logits [L], label [], target [] -> []. Positive only where the model is wrong; right for L >= 2."""
    return logits[target] - logits[label]


def targeted_dlr(logits: jax.Array, label: jax.Array, target: jax.Array) -> jax.Array:
    """`-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)`: logits [L], label [], target [] -> [].

    Raises:
        ValueError: fewer than 4 classes.

    Source:
        Croce, Hein 2020, https://arxiv.org/abs/2003.01690, equation 7. With 1e-12 added to the denominator.
    """
    _need(logits, 4, "targeted_dlr")
    largest = jax.lax.top_k(logits, 4)[0]
    spread = largest[0] - (largest[2] + largest[3]) / 2
    return targeted_margin(logits, label, target) / (spread + _TINY)


def target_class(logits: jax.Array, label: jax.Array, rank: jax.Array) -> jax.Array:
    """The class of rank 0, 1, ... in the order of falling logits [L], the label [] left out: [] int32.

    From rank L - 1 on there is none, and the label comes back: `check_targets` refuses that.
    """
    return jnp.argsort(-_others(logits, label), stable=True)[rank].astype(jnp.int32)


def check_targets(num_targets: int, logits: jax.Array) -> None:
    """Requires that L classes have `num_targets` others.

    Raises:
        ValueError: num_targets > L - 1.
    """
    check.require(num_targets < len(logits), "num_targets", num_targets, f"<= {len(logits) - 1}, the other classes")


def _untargeted(value: Callable[[jax.Array, jax.Array], jax.Array], min_classes: int) -> Objective:
    return Objective(lambda logits, label, target: value(logits, label), False, min_classes)


OBJECTIVES: Mapping[str, Objective] = {
    "cross_entropy": _untargeted(cross_entropy, 2),
    "margin": _untargeted(margin, 2),
    "dlr": _untargeted(dlr, 3),
    "targeted_cross_entropy": Objective(targeted_cross_entropy, True, 2),
    "targeted_margin": Objective(targeted_margin, True, 2),
    "targeted_dlr": Objective(targeted_dlr, True, 4),
}


def resolve(objective: str | Objective, num_targets: int) -> Objective:
    """The objective of a search, by its name or as it is.

    Raises:
        ValueError: an unknown name; num_targets < 1, or > 1 with an objective that has no target.
    """
    if not isinstance(objective, Objective):
        check.one_of("objective", objective, OBJECTIVES)
        objective = OBJECTIVES[objective]
    check.at_least("num_targets", num_targets, 1)
    fits = num_targets == 1 or objective.is_targeted
    check.require(fits, "num_targets", num_targets, "1 for an objective without a target")
    return objective


def of_state(objective: Objective) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
    """The `objective` field of a `Search` whose state has the field `target`."""
    return lambda logits, label, state: objective.value(logits, label, state.target)


def _others(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The logits with -inf at the label."""
    chex.assert_rank([logits, label], [1, 0])
    return jnp.where(jnp.arange(logits.shape[0]) == label, -jnp.inf, logits)


def _need(logits: jax.Array, num_classes: int, name: str) -> None:
    check.require(len(logits) >= num_classes, "number of classes", len(logits), f">= {num_classes} for {name}")
