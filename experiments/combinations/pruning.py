"""Pruning while the federation trains, then the physically smaller model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.combinations.federation import Apply
from experiments.combinations.settings import MC
from fedrobust import check, compression, threads, trees
from fedrobust.federated import CodedState, FederatedState
from fedrobust.types import Model, Params

State = FederatedState | CodedState

TOLERANCE = 1e-5
"""Largest difference between logits that must be equal, over the largest logit or 1, at which a run goes on."""


def _param_shapes(model: Model, image_shape: tuple[int, ...]) -> tuple[Params, jax.ShapeDtypeStruct]:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image), image


@threads.cached(maxsize=4)  # reading a model takes a second, and every pruned row asks
def channels(model: Model, image_shape: tuple[int, ...]) -> compression.Channels:
    """The model's prunable units."""
    params, image = _param_shapes(model, image_shape)
    return compression.find_channels(model.apply, params, image)


def require_groups(settings: MC, channels: compression.Channels) -> None:
    """Checks that there is a share for every group.

    Raises:
        ValueError: another number; the line lists the groups by the first kernel that makes their channels.
    """
    names = _group_names(channels)
    allowed = f"none, or {len(names)} shares with --mc.scope uniform: of {', '.join(names)}"
    fits = len(settings.group_sparsity) == len(names) and settings.scope == "uniform"
    check.require(fits, "--mc.group-sparsity", settings.group_sparsity, allowed)


def _group_names(channels: compression.Channels) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(channels.structure.unflatten(channels.shapes), is_leaf=_is_shape)
    found: dict[int, str] = {}
    for (path, shape), axes in zip(leaves, channels.unit, strict=True):
        of_outputs = axes[-1] if len(shape) > 1 else np.zeros(0, int)
        for group in np.unique(channels.group[of_outputs[of_outputs >= 0]]):
            found.setdefault(int(group), jax.tree_util.keystr(path[:-1], simple=True, separator="/"))
    return [found[group] for group in sorted(found)]


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def schedule(
    settings: MC, channels: compression.Channels, num_rounds: int
) -> tuple[Callable[[State, int], State], int, int]:
    """When the masks are renewed.

    Returns:
        `(state, rounds done) -> state` with new masks where the sparsity rises, the last round after which nothing has
        been pruned yet, and the one after which nothing is any more.
    """
    end = max(2, round(settings.end * num_rounds))
    begin = min(end - 1, max(1, round(settings.begin * num_rounds)))
    every = max(1, (end - begin) // settings.num_events)
    final = max(settings.group_sparsity or (settings.sparsity,))
    sparsity = compression.cubic_sparsity(final=final, begin=begin, end=end, every=every)

    def prune(state: State, rounds_done: int) -> State:
        # Scores come from the server's parameters, which under privacy are public already: masks cost nothing.
        now = sparsity(rounds_done)
        if now == sparsity(rounds_done - 1):
            return state
        shares = [share * now / final for share in settings.group_sparsity] or now
        mask = compression.masks(channels, state.params, sparsity=shares, scope=settings.scope)
        masked = {"params": trees.multiply(state.params, mask), "average": trees.multiply(state.average, mask)}
        return state._replace(mask=mask, **masked)

    return prune, begin, end


def shrink(
    model: Model, channels: compression.Channels, state: State, image: np.ndarray
) -> tuple[Apply, FederatedState, float]:
    """The small model, and everything the server carries cut to it; what senders of codes remember is forgotten.

    Args:
        model: the full model.
        channels: its units.
        state: with the final masks.
        image: [B,H,W,C], on which masked and small logits are compared.

    Returns:
        The small function, the small state, and the largest difference of the logits.

    Raises:
        RuntimeError: the small model is not the masked one.
    """
    num_kept = compression.num_kept(channels, state.mask)
    structure: Any = jax.tree.structure(state.params)

    def cut(tree: Any) -> Any:
        def like_params(x: Any) -> bool:
            return jax.tree.structure(x) == structure

        def leaf(x: Any) -> Any:
            return compression.slice_tree(channels, state.mask, x) if like_params(x) else x

        return jax.tree.map(leaf, tree, is_leaf=like_params)

    apply = _small_apply(model, image.shape[1:], tuple(num_kept.tolist()))
    small = FederatedState(*(cut(getattr(state, name)) for name in FederatedState._fields))
    masked, shrunk = jax.jit(model.apply)(state.params, image), jax.jit(apply)(small.params, image)
    return apply, small, require_equal(masked, shrunk, "the shrunk model")


def require_equal(expected: jax.Array, found: jax.Array, what: str) -> float:
    """The largest difference between two models' logits [B,L].

    Raises:
        RuntimeError: it is above `TOLERANCE`.
    """
    difference = float(jnp.max(jnp.abs(expected - found)))
    if not difference <= TOLERANCE * max(1.0, float(jnp.max(jnp.abs(expected)))):
        raise RuntimeError(f"{what} differs by {difference:.2g} in its logits from the model it must equal")
    return difference


@threads.cached(maxsize=16)
def _small_apply(model: Model, image_shape: tuple[int, ...], num_kept: tuple[int, ...]) -> Apply:
    """The model with `num_kept[g]` units left in group g: one function, and so one compilation, whichever they are.

    It is built for the first units of each group. In the study's architectures the units of a group are
    interchangeable; `shrink` compares the logits, so a model where they are not cannot slip through.
    """
    units = channels(model, image_shape)
    first = [np.flatnonzero(units.group == g)[:n] for g, n in enumerate(num_kept)]
    keep = np.isin(np.arange(len(units.group)), np.concatenate(first))
    return compression.shrink_apply(model.apply, units, _param_shapes(model, image_shape)[0], keep)
