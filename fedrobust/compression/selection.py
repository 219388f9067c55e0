"""Which units stay: the best of every group, or the best of the whole model, with sizes that a machine likes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrobust import check
from fedrobust.compression.pruning import Channels, kept_units, masks_from_units, require_like_params
from fedrobust.compression.scores import SCORES
from fedrobust.types import Key, Params

SCOPES = ("uniform", "global")
"""Whether units compete within their group or all over the model."""


def masks(
    channels: Channels,
    params: Params,
    *,
    sparsity: float | Sequence[float],
    score: str | Any = "l2",
    scope: str = "uniform",
    multiple_of: int = 1,
    key: Key | None = None,
) -> Params:
    """Masks that remove the units with the lowest scores.

    Scores of weights alone cost no privacy where the weights are public already, as a server's are under privacy.

    Args:
        channels: the model's units.
        params: the parameters to score, concrete float arrays.
        sparsity: in [0, 1), the share of units to remove; with the scope "uniform" also one for every group, in the
            order of their numbers.
        score: a row of `SCORES`, or [U] finite numbers, larger for what is to be kept: of `taylor_scores`, learned
            ones, any other.
        scope: "uniform" removes floor(sparsity * n) of the n units of every group. "global" removes
            floor(sparsity * U) of all units, whichever groups they are in, each score over the root mean square of its
            group's: raw scores differ by orders of magnitude between layers.
        multiple_of: >= 1, such as 8: what is left of every axis of every parameter that the group touches is a multiple
            of it, as far as the group is concerned, by removing fewer units. A group with no such size stays whole.
        key: for "random", else unused.

    Returns:
        A pytree like `params` of float32 zeros and ones; `fedrobust.trees.multiply(params, masks)` is the masked model.

    Raises:
        ValueError: sparsity outside [0, 1) or not as many as groups, unknown score or scope, multiple_of < 1, scores
            that are not [U] finite numbers, parameters of other shapes, "random" without a key.

    Guarantees:
        One unit of every group stays. A higher sparsity keeps a subset. Of equal scores the earlier unit goes.

    Source: normalisation: Molchanov et al., Pruning Convolutional Neural Networks, 2017,
        https://arxiv.org/abs/1611.06440, "Normalization" in section 2. Deviation: the mean of the squares, not their
        sum, so that a layer does not look dispensable for being wide.
    """
    keep = choose(
        channels, scored(channels, params, score, key), sparsity=sparsity, scope=scope, multiple_of=multiple_of
    )
    return masks_from_units(channels, keep)


def choose(
    channels: Channels,
    scores: np.ndarray,
    *,
    sparsity: float | Sequence[float],
    scope: str = "uniform",
    multiple_of: int = 1,
) -> np.ndarray:
    """Which units stay, [U] bool, for [U] scores; see `masks`."""
    shares = np.atleast_1d(sparsity).tolist()
    for share in shares:
        check.fraction("sparsity", share, one=False)
    check.one_of("scope", scope, SCOPES)
    check.at_least("multiple_of", multiple_of, 1)
    groups = [np.flatnonzero(channels.group == number) for number in np.unique(channels.group)]
    order = [members[np.argsort(scores[members], kind="stable")] for members in groups]
    allowed = {1, len(groups)} if scope == "uniform" else {1}
    number = " or ".join(map(str, sorted(allowed)))
    check.require(len(shares) in allowed, "sparsity", sparsity, f"{number} in number for scope {scope!r}")
    if scope == "uniform":
        of_groups = shares * len(groups) if len(shares) == 1 else shares
        removed = [num_removed(share, len(members)) for share, members in zip(of_groups, groups, strict=True)]
    else:
        removed = _removed_globally(channels, scores, order, *shares)
    keep = np.ones(len(channels.group), bool)
    for members, num in zip(order, removed, strict=True):
        step = _step(channels, members, multiple_of)
        num_kept = min(len(members), -(-(len(members) - num) // step) * step)
        keep[members[: len(members) - num_kept]] = False
    return keep


def scored(channels: Channels, params: Params, score: str | Any, key: Key | None = None) -> np.ndarray:
    """The scores of all units, [U] float64, by the name of a score or from an array; see `masks`."""
    require_like_params("params", params, channels)
    if isinstance(score, str):
        check.one_of("score", score, SCORES)
        return SCORES[score](channels, params, key)
    scores = np.asarray(score, np.float64)
    fits = scores.shape == channels.group.shape and bool(np.isfinite(scores).all())
    check.require(fits, "score", f"an array {scores.shape}", f"{channels.group.shape} finite numbers, one per unit")
    return scores


def num_removed(sparsity: float, num: int) -> int:
    """How many of `num` >= 1 units go at a sparsity in [0, 1): the share rounded down, one stays."""
    # The small term undoes roundings such as 0.29 * 100 = 28.999...
    return min(math.floor(sparsity * num + 1e-9), num - 1)


def num_kept(channels: Channels, masks: Params) -> np.ndarray:
    """How many units masks leave in each group.

    Args:
        channels: the model's units.
        masks: a pytree of zeros and ones like the parameters, concrete.

    Returns:
        [G] int >= 1, in the order of the groups' numbers.

    Raises:
        ValueError: masks of other shapes, or masks that remove every unit of some group.
    """
    return np.bincount(channels.group[kept_units(channels, masks)])


def _removed_globally(channels: Channels, scores: np.ndarray, order: list[np.ndarray], sparsity: float) -> list[int]:
    """How many units of each group are among the lowest of the model; the best of a group is never asked for."""
    relative = np.zeros(len(scores))
    for members in order:
        size = np.sqrt(np.mean(np.square(scores[members])))
        relative[members] = scores[members] / (size if size > 0 else 1)
    spare = np.sort(np.concatenate([np.zeros(0, int), *(members[:-1] for members in order)]))
    removed = spare[np.argsort(relative[spare], kind="stable")[: num_removed(sparsity, max(len(scores), 1))]]
    return [int(np.isin(members, removed).sum()) for members in order]


def _step(channels: Channels, members: np.ndarray, multiple_of: int) -> int:
    """The number of units of a group whose sizes together are multiples on every axis."""
    num_units = len(channels.group)
    counts = [np.bincount(axis[axis >= 0], minlength=num_units)[members] for axes in channels.unit for axis in axes]
    common = int(np.gcd.reduce(np.concatenate(counts)))
    return multiple_of // math.gcd(multiple_of, common)
