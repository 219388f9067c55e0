"""Whether a loss ties records together, measured: no bound on one record's contribution holds where it does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check
from fedrobust.types import Key, Loss, Params

# What rounding may move, relative to 1 + |value|. Replacements run in one program on one shape, where rows that do not
# meet keep their very bits; a single example is another program, and an attack's signs may round either way.
_ROUNDING, _ROUNDING_ALONE = 1e-5, 1e-2


def coupling(loss: Loss, key: Key, params: Params, image: Any, label: Any) -> jax.Array:
    """How far each record's loss and gradient move when another record is replaced.

    Record j is replaced by its neighbour, record (j + 1) % B, image and label. Derivatives d loss_i / d x_j alone
    would not do: what an attack found stands under `stop_gradient`. The loss alone would not do either, as it is the
    gradient that is clipped: its change is measured along one random direction in the space of parameters.

    Args:
        loss: called with all B records, at full batch size, with the same key each time.
        key: for the loss and the direction.
        params: a pytree of float arrays. Where all gradients are zero there is little to see.
        image: pytree of arrays [B, ...], B >= 2, records that differ.
        label: pytree of arrays [B, ...].

    Returns:
        [B,B] float32: entry (i, j) is what replacing record j does to record i, the larger of the two changes, each
        over 1 + its value; NaN where something is not finite. The diagonal is what it does to itself.

    Raises:
        ValueError: fewer than two records, or a record that equals its neighbour.

    Guarantees:
        Zero up to rounding off the diagonal for a loss whose rows are independent. A coupling is seen at these records
        and parameters only: 2 to 8 records that look like real ones, at more than one set of parameters.
    """
    records = (image, label)
    size = jax.tree.leaves(records)[0].shape[0]
    check.require(size >= 2, "records", size, "at least 2")
    following = jax.tree.map(lambda x: jnp.roll(jnp.asarray(x), -1, axis=0), records)
    _require_distinct(records, following, size)
    of_loss, of_direction = jax.random.split(key)
    leaves = jax.tree.leaves(params)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(of_direction)))
    direction = [(rng.normal(size=x.shape) / max(1, x.size) ** 0.5).astype(x.dtype) for x in leaves]

    # One program of one shape, called in a loop: its roundings do not depend on the other records.
    before, *after = [
        _seen(loss, of_loss, params, records, following, direction, jnp.asarray(j)) for j in range(-1, size)
    ]
    change = jnp.abs(jnp.stack(after) - before) / (1 + jnp.abs(before))
    return jnp.max(change, axis=1).T


@functools.partial(jax.jit, static_argnums=0)
def _seen(
    loss: Loss, key: Key, params: Params, records: Any, following: Any, direction: list[jax.Array], replaced: jax.Array
) -> jax.Array:
    """[2,B]: losses, and their derivatives along the direction, with one record replaced; none for -1."""
    size = jax.tree.leaves(records)[0].shape[0]

    def row(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where((jnp.arange(size) == replaced).reshape(-1, *(1,) * (x.ndim - 1)), y, x)

    image, label = jax.tree.map(row, records, following)
    value, pull_back = jax.vjp(lambda p: loss(key, p, image, label), params)

    def slope(one: jax.Array) -> jax.Array:
        (gradient,) = pull_back(one)
        pairs = zip(jax.tree.leaves(gradient), direction, strict=True)
        return sum((jnp.sum(g * d) for g, d in pairs), jnp.float32(0))

    return jnp.stack([value, jax.lax.map(slope, jnp.eye(size, dtype=value.dtype))])


def require_isolated(loss: Loss, key: Key, params: Params, image: Any, label: Any) -> None:
    """Refuses a loss in which records see each other, before anything is trained with it.

    Args:
        loss: as for `coupling`.
        key: as for `coupling`.
        params: as for `coupling`.
        image: as for `coupling`; the time grows with B^2.
        label: as for `coupling`.

    Raises:
        ValueError: one line that names the two records and how far the loss moves; that a loss is not finite; or that a
            loss which does not depend on its key is another one for a record alone, as `clipped_grad` calls it.

    Guarantees:
        What `coupling` can see. A loss that passes may still couple other records at other parameters; `clipped_grad`
        keeps records apart by itself, and this says whether that changes what the loss means.
    """
    moved = np.array(coupling(loss, key, params, image, label))
    check.require(bool(np.isfinite(moved).all()), "loss", "not finite", "finite for these records and their neighbours")
    np.fill_diagonal(moved, 0)
    i, j = np.unravel_index(np.argmax(moved), moved.shape)
    if moved[i, j] > _ROUNDING:
        raise ValueError(
            f"loss[{i}] or its gradient moves by {moved[i, j]:.1g} when record {j} is replaced: BatchNorm, mixup, "
            "contrastive losses, a batch-normalised attack step and universal perturbations do this"
        )
    _require_same_alone(loss, key, params, image, label)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(loss: Loss, *args: Any) -> jax.Array:
    return loss(*args)


def _require_same_alone(loss: Loss, key: Key, params: Params, image: Any, label: Any) -> None:
    together = np.asarray(_compiled(loss, key, params, image, label))
    if not np.array_equal(together, _compiled(loss, jax.random.fold_in(key, 1), params, image, label)):
        return  # a record alone would draw other numbers
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], (image, label)) for i in range(len(together))]
    alone = np.array([_compiled(loss, key, params, *row)[0] for row in rows])
    gap = np.abs(alone - together) / (1 + np.abs(together))
    i = int(np.argmax(gap))
    if gap[i] > _ROUNDING_ALONE:
        raise ValueError(
            f"loss[{i}] is {together[i]:.4g} in the batch and {alone[i]:.4g} alone: the size of the batch or the place "
            "in it takes part"
        )


def _require_distinct(records: Any, following: Any, size: int) -> None:
    pairs = zip(jax.tree.leaves(records), jax.tree.leaves(following), strict=True)
    differs = np.zeros(size, bool)
    for x, y in pairs:
        differs |= (np.asarray(x) != np.asarray(y)).reshape(size, -1).any(axis=1)
    check.require(bool(differs.all()), "records", "with equal neighbours", "distinct from the record that follows")
