"""How much a model would miss each of its units.

Every score is one number per unit, larger for what is to be kept, and comparable within a group; `masks` removes the
lowest. Whether a score costs privacy depends on what it reads: the server's weights of a private training are public
once their noise is paid for, so every score of weights alone is free; a score of gradients is as private as those are.
"""

import math
from collections.abc import Callable

import jax
import numpy as np

from fedrobust import check
from fedrobust.compression.pruning import Channels, require_like_params
from fedrobust.types import Key, Params

Score = Callable[[Channels, Params, Key | None], np.ndarray]
"""`(channels, params, key) -> [U] float64`."""


def l1_scores(channels: Channels, params: Params, key: Key | None = None) -> np.ndarray:
    """The sum of |w| over all parameters that go with a unit.

    Args:
        channels: the model's units.
        params: the parameters to score, concrete float arrays. A parameter that two units share counts for both.
        key: not used.

    Returns:
        [U] float64 >= 0.

    Source: Li et al., Pruning Filters for Efficient ConvNets, 2017, https://arxiv.org/abs/1608.08710, section 3.1, and
        Fang et al., DepGraph, 2023, https://arxiv.org/abs/2301.12900, section 3.3 (over all coupled parameters).
    """
    return unit_sums(channels, jax.tree.map(lambda x: np.abs(np.asarray(x, np.float64)), params))


def l2_scores(channels: Channels, params: Params, key: Key | None = None) -> np.ndarray:
    """The sum of w^2 over all parameters that go with a unit; see `l1_scores`."""
    return unit_sums(channels, jax.tree.map(lambda x: np.square(np.asarray(x, np.float64)), params))


def fpgm_scores(channels: Channels, params: Params, key: Key | None = None) -> np.ndarray:
    """How far a unit's parameters are from those of the other units of its group: the sum of the L2 distances.

    A unit that is close to all others is what they can make up for. It is also the point of the group that is nearest
    to their geometric median, where this sum is least.

    Args:
        channels: the model's units.
        params: the parameters to score, concrete float arrays.
        key: not used.

    Returns:
        [U] float64 >= 0; 0 for the only unit of a group. Units of unequal sizes are compared as if padded with zeros.

    Source: He et al., Filter Pruning via Geometric Median, 2019, https://arxiv.org/abs/1811.00250, section 3.
        Deviation: of all coupled parameters, not of a filter alone.
    """
    require_like_params("params", params, channels)
    scores = np.zeros(len(channels.group))
    for group in np.unique(channels.group):
        members = np.flatnonzero(channels.group == group)
        square = np.zeros((len(members), len(members)))
        for leaf, axes in zip(jax.tree.leaves(params), channels.unit, strict=True):
            for i, axis in enumerate(axes):
                if np.isin(members[0], axis):
                    square += _square_distances(_rows(np.asarray(leaf, np.float64), i, axis, members))
        scores[members] = np.sqrt(square).sum(axis=1)
    return scores


def random_scores(channels: Channels, params: Params, key: Key | None) -> np.ndarray:
    """Uniform numbers in [0, 1): what every other score has to be better than.

    Args:
        channels: the model's units.
        params: not used.
        key: of the draw.

    Returns:
        [U] float64.

    Raises:
        ValueError: no key.
    """
    check.require(key is not None, "key", key, "given where units are drawn at random")
    assert key is not None
    return np.asarray(jax.random.uniform(key, (len(channels.group),)), np.float64)


def taylor_scores(channels: Channels, params: Params, gradient: Params) -> np.ndarray:
    """The square of what removing a unit does to the loss, to first order: (sum of gradient * weight)^2.

    Args:
        channels: the model's units.
        params: the parameters to score, concrete float arrays.
        gradient: of any loss at them, an adversarial one included; a tree like `params`. Under privacy it has to be
            the clipped and noised one, of `fedrobust.privacy.private_grad`, charged to the ledger as a step of its own
            like any other look at the records. A score of it then costs nothing more. Never one without noise.

    Returns:
        [U] float64 >= 0, for `masks(score=...)`.

    Raises:
        ValueError: a tree of another structure or other shapes.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, https://arxiv.org/abs/1906.10771,
        section 3, joint importance of a set of parameters. Deviation: one gradient, not a mean of squares over
        mini-batches, which would take one noised gradient for each.
    """
    require_like_params("params", params, channels)
    require_like_params("gradient", gradient, channels)
    products = jax.tree.map(lambda w, g: np.asarray(w, np.float64) * np.asarray(g, np.float64), params, gradient)
    return np.square(unit_sums(channels, products))


SCORES: dict[str, Score] = {
    "fpgm": fpgm_scores,
    "l1": l1_scores,
    "l2": l2_scores,
    "random": random_scores,
}
"""Score name -> the function that computes it."""


def unit_sums(channels: Channels, tree: Params) -> np.ndarray:
    """The sum of all entries that go with a unit.

    Args:
        channels: the model's units.
        tree: a tree like the parameters, concrete.

    Returns:
        [U] float64. An entry that two units share counts for both; one that a unit holds by two axes counts once.

    Raises:
        ValueError: a tree of another structure or other shapes.
    """
    require_like_params("params", tree, channels)
    sums = np.zeros(len(channels.group))
    for leaf, axes in zip(jax.tree.leaves(tree), channels.unit, strict=True):
        values = np.asarray(leaf, np.float64)
        for i, axis in enumerate(axes):
            counted = values
            for j, earlier in enumerate(axes[:i]):
                if np.intersect1d(axis[axis >= 0], earlier).size:
                    there = [1] * values.ndim
                    there[j] = -1
                    here = [1] * values.ndim
                    here[i] = -1
                    counted = np.where(earlier.reshape(there) == axis.reshape(here), 0, counted)
            total = counted.sum(axis=tuple(j for j in range(values.ndim) if j != i))
            np.add.at(sums, axis[axis >= 0], total[axis >= 0])
    return sums


def _rows(values: np.ndarray, place: int, axis: np.ndarray, members: np.ndarray) -> np.ndarray:
    """[n, ...] what each unit in `members` holds of an array by its axis `place`, padded with zeros to one length."""
    slices = np.moveaxis(values, place, 0).reshape(len(axis), -1)
    longest = max(int((axis == unit).sum()) for unit in members)
    rows = np.zeros((len(members), longest, slices.shape[1]))
    for row, unit in zip(rows, members, strict=True):
        own = slices[axis == unit]
        row[: len(own)] = own
    return rows.reshape(len(members), math.prod(rows.shape[1:]))


def _square_distances(rows: np.ndarray) -> np.ndarray:
    """[n, n] between the rows of [n, d]; in float64, so that what cancels is far below any difference that matters."""
    products = rows @ rows.T
    lengths = np.diag(products)
    return np.maximum(lengths[:, None] + lengths[None] - 2 * products, 0)
