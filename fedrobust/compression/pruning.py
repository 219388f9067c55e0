"""Structured pruning of any pure model: whole coupled channels are masked, then physically removed.

A unit is what has to go together: one channel of a convolution with its norm scale, its bias, the next layer's input
channel, every layer that adds to the same residual stream, all rows of a dense layer behind a flatten; with GroupNorm a
whole norm group, because zeroing part of a group and removing it are not the same function. Units are read from the
model's own equations (`fedrobust.trace`), so nothing has to be annotated.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, trace, trees
from fedrobust.types import Params

Apply = Callable[[Params, jax.Array], jax.Array]


class Channels(NamedTuple):
    """What can be removed from a model.

    Attributes:
        unit: for each parameter leaf and each of its axes, [n] int: the unit of each index, -1 where it has to stay.
        group: [U] int, the group of each unit. Units of one group touch the same axes of the same leaves (the channels
            of one layer or one residual stream) and are ranked against each other.
        shapes: the shape of each leaf.
        structure: of the pytree of parameters.
        unknown: names of the operations that are not understood and keep all they touch from being pruned.
        image: an image the model was read at, [1,H,W,C].
    """

    unit: tuple[tuple[np.ndarray, ...], ...]
    group: np.ndarray
    shapes: tuple[tuple[int, ...], ...]
    structure: jax.tree_util.PyTreeDef
    unknown: tuple[str, ...]
    image: jax.ShapeDtypeStruct


def find_channels(apply: Apply, params: Params, image: Any) -> Channels:
    """Reads the prunable units from a model.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, any pure function. Flax, Haiku and plain functions all fit.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`; values do not matter.
        image: an example [1,H,W,C] or its `jax.ShapeDtypeStruct`; values do not matter.

    Returns:
        The units, numbered in the order in which the leaves show them.

    Raises:
        ValueError: an image changes the logits of another one in its batch.

    Guarantees:
        Image channels and logits stay. Masking a unit and removing it give the same logits up to rounding.
    """
    ties = trace.ties_examples(apply, params, image)
    check.require(not ties, "apply", "a function of the whole batch", "one of each image alone, without BatchNorm")
    coupling = trace.couple(apply, params, image)
    leaves = coupling.leaf_axes()
    flat = np.concatenate([np.zeros(0, int), *(axis for leaf in leaves for axis in leaf)])
    components = np.unique(flat[flat > 0])
    unit = tuple(tuple(np.where(axis > 0, np.searchsorted(components, axis), -1) for axis in leaf) for leaf in leaves)
    touches: list[list[tuple[int, int]]] = [[] for _ in components]
    for i, leaf in enumerate(unit):
        for j, axis in enumerate(leaf):
            for u in np.unique(axis[axis >= 0]):
                touches[u].append((i, j))
    groups = {place: number for number, place in enumerate(dict.fromkeys(map(tuple, touches)))}
    group = np.array([groups[tuple(place)] for place in touches], int)
    shapes = tuple(x.shape for x in jax.tree.leaves(params))
    one = jax.ShapeDtypeStruct((1, *image.shape[1:]), image.dtype)
    return Channels(unit, group, shapes, jax.tree.structure(params), coupling.unknown, one)


def masks_from_units(channels: Channels, keep: Any) -> Params:
    """Masks from a choice of units.

    Args:
        channels: the model's units.
        keep: [U] bool, which units stay.

    Returns:
        A pytree like the parameters of float32 zeros and ones; `fedrobust.trees.multiply(params, masks)` is the masked
        model.

    Raises:
        ValueError: keep of another length.
    """
    check.require(
        np.shape(keep) == np.shape(channels.group), "shape of keep", np.shape(keep), f"{channels.group.shape}"
    )
    keep = np.append(np.asarray(keep, bool), True).astype(np.float32)  # index -1 always stays
    leaves = []
    for axes, shape in zip(channels.unit, channels.shapes, strict=True):
        mask = np.ones(shape, np.float32)
        for i, axis in enumerate(axes):
            mask *= keep[axis].reshape([-1 if j == i else 1 for j in range(len(shape))])
        leaves.append(jnp.asarray(mask))
    return channels.structure.unflatten(leaves)


def kept_units(channels: Channels, masks: Params) -> np.ndarray:
    """Which units masks leave standing: a unit is removed where the masks zero all of its parameters.

    Args:
        channels: the model's units.
        masks: a pytree of zeros and ones like the parameters, concrete.

    Returns:
        [U] bool.

    Raises:
        ValueError: masks of other shapes, or masks that remove every unit of some group.
    """
    require_like_params("masks", masks, channels)
    keep = np.zeros(len(channels.group), bool)
    for leaf, axes in zip(jax.tree.leaves(masks), channels.unit, strict=True):
        present = np.asarray(leaf) != 0
        for i, axis in enumerate(axes):
            alive = present.any(axis=tuple(j for j in range(present.ndim) if j != i))
            keep[axis[alive & (axis >= 0)]] = True
    empty = np.setdiff1d(channels.group, channels.group[keep])
    check.require(not len(empty), "masks", f"without any unit of groups {empty.tolist()}", "one unit or more per group")
    return keep


def slice_tree(channels: Channels, masks: Params, tree: Params) -> Params:
    """Cuts the removed units out of any tree of the parameters' structure, such as an optimizer's momentum.

    Args:
        channels: the model's units.
        masks: what `masks` returned.
        tree: a pytree of concrete arrays with the parameters' structure and shapes.

    Returns:
        The same tree with smaller leaves.
    """
    require_like_params("tree", tree, channels)
    keep = _keep(channels, kept_units(channels, masks))
    # On the host: cut by XLA, every new shape would cost a compilation.
    leaves = [np.asarray(x)[np.ix_(*axes)] for x, axes in zip(jax.tree.leaves(tree), keep, strict=True)]
    return channels.structure.unflatten([jnp.asarray(x) for x in leaves])


def shrink(
    apply: Apply,
    channels: Channels,
    params: Params,
    masks: Params,
    *,
    image: jax.Array | None = None,
    verify: bool = True,
) -> tuple[Params, Apply]:
    """A physically smaller model that computes what the masked one does, and is seen to.

    Args:
        apply: the model that `channels` was read from.
        channels: its units.
        params: its parameters.
        masks: what `masks` returned. Units that are masked only in part stay, with zeros in them.
        image: [B,H,W,C], where masked and small logits are compared; None for two of random pixels in [0, 1].
        verify: False compares nothing, and compiles nothing.

    Returns:
        `(small_params, small_apply)`. `small_apply` is a pure function like `apply`: it composes with `jit`, `grad`,
        `vmap` and `find_channels`, at any batch size.

    Raises:
        ValueError: masks of another structure, or masks that remove every unit of some group.
        RuntimeError: logits that differ by more than 1e-5 max(1, max |logit|), or are not finite.
    """
    require_like_params("params", params, channels)
    require_like_params("masks", masks, channels)
    masked = jax.tree.map(lambda x, m: np.asarray(x) * np.asarray(m, x.dtype), params, masks)
    small_params = slice_tree(channels, masks, masked)
    small_apply = shrink_apply(apply, channels, params, kept_units(channels, masks))
    if verify:
        if image is None:
            pixels = np.random.default_rng(0).uniform(size=(2, *channels.image.shape[1:]))
            image = jnp.asarray(pixels, channels.image.dtype)
        _require_equal(jax.jit(apply)(masked, image), jax.jit(small_apply)(small_params, image))
    return small_params, small_apply


def shrink_apply(apply: Apply, channels: Channels, params: Params, keep: np.ndarray) -> Apply:
    """The model for parameters of which only the units in `keep` are left.

    Args:
        apply: the full model.
        channels: its units.
        params: its full parameters, or their shapes.
        keep: [U] bool, which units stay.

    Returns:
        `(small params, image[B,H,W,C]) -> logits[B,L]`.
    """
    return trace.resize(apply, params, _keep(channels, keep))


def slice_shapes(channels: Channels, keep: np.ndarray) -> list[tuple[int, ...]]:
    """The shapes of the parameters of which only the units in `keep` ([U] bool) are left, leaf by leaf."""
    return [tuple(int(axis.sum()) for axis in axes) for axes in _keep(channels, keep)]


def max_difference(apply: Apply, channels: Channels, params: Params, masks: Params, image: jax.Array) -> float:
    """The largest difference between the logits of the masked and of the shrunk model.

    Args:
        apply: the full model.
        channels: its units.
        params: its parameters.
        masks: the masks to compare under.
        image: [B,H,W,C].

    Returns:
        max |masked - shrunk|, a float; NaN where either is.
    """
    small_params, small_apply = shrink(apply, channels, params, masks, verify=False)
    masked = jax.jit(apply)(trees.multiply(params, masks), image)
    return float(jnp.max(jnp.abs(masked - jax.jit(small_apply)(small_params, image))))


def require_like_params(name: str, tree: Params, channels: Channels) -> None:
    """Requires a tree of the full parameters' structure and shapes; the ValueError calls it `name`."""
    leaves, structure = jax.tree.flatten(tree)
    fits = structure == channels.structure and tuple(x.shape for x in leaves) == channels.shapes
    check.require(fits, name, f"a tree of {len(leaves)} leaves", "of the full parameters' structure and shapes")


def _require_equal(masked: jax.Array, shrunk: jax.Array) -> None:
    difference, largest = jnp.max(jnp.abs(masked - shrunk)), jnp.max(jnp.abs(masked))
    if not difference <= 1e-5 * jnp.maximum(1, largest):
        raise RuntimeError(f"the shrunk model differs by {difference:.2g} in its logits from the masked one")


def _keep(channels: Channels, keep: np.ndarray) -> list[list[np.ndarray]]:
    lookup = np.append(keep, True)
    return [[lookup[axis] for axis in axes] for axes in channels.unit]
