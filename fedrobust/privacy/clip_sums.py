"""How sums of clipped per-example gradients are computed: at once, in microbatches, or norms first."""

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fedrobust import trace, trees
from fedrobust.ops import KernelGradients
from fedrobust.types import Batch, Key, Loss, Params

Grouping = Callable[[tuple], Hashable]
"""From the path of a parameter, as `jax.tree_util.tree_flatten_with_path` gives it, to the group it is clipped with."""

PerExample = tuple[jax.Array, jax.Array]
"""The gradient's norm before the clip, [B], and the loss, [B]; both 0 for padding."""

ClippedSum = Callable[[Key, Params, Batch, jax.Array, float | jax.Array], tuple[Any, PerExample]]
"""`(keys[B], params, batch, weight[B], clip_norm) -> (sum, (norm[B], loss[B]))`, padding already blank."""

# float32 norms carry a relative error of about 1e-6; shrinking by four times that keeps the bound strict.
_ROUNDING = 4e-6

# Multiplications per entry of a kernel's gradient up to which its norm comes from products between places. 16 examples,
# milliseconds written out with its norm, and by products: 7 x 7 x 128 -> 128 (9 per entry) 3.4 and 1.2,
# 14 x 14 x 64 -> 128 (142) 7.1 and 8.1, 14 x 14 x 64 -> 64 (199) 3.6 and 5.3 (2 x86 cores, jax 0.10.2, 2026-11-24).
_MAX_PRODUCTS = 32


def clip_factor(norm: jax.Array, clip_norm: float | jax.Array) -> jax.Array:
    """What a gradient of this norm is multiplied by: min(1, C / norm), rounded down; 0 for a norm that is not finite.

    Args:
        norm: any shape, >= 0, inf or NaN.
        clip_norm: C > 0.

    Returns:
        Factors in [0, 1], of the same shape.
    """
    return jnp.where(jnp.isfinite(norm), clip_norm / jnp.maximum(norm * (1 + _ROUNDING), clip_norm), 0)


def per_example(loss: Loss, groups: Grouping | None, *, opened: bool) -> ClippedSum:
    """Differentiates every example by itself, then sums: B gradients at once.

    Args:
        loss: is called with one example at a time.
        groups: None clips the whole gradient to C, else each of the G groups to C / sqrt(G).
        opened: whether a convolution's gradients may stay unwritten where that takes less time. For CPUs: platforms
            whose products are rounded to fewer bits than float32 need a written gradient for a strict bound.
    """

    def gradients_of(key: Key, params: Params, image: Any, label: Any) -> tuple[jax.Array, Params]:
        return jax.vmap(partial(_value_and_grad, loss), (0, None, 0, 0))(key, params, image, label)

    find = trace.with_open_kernels(gradients_of, _is_open) if opened else gradients_of

    def clipped_sum(
        key: Key, params: Params, batch: Batch, weight: jax.Array, clip_norm: float | jax.Array
    ) -> tuple[Params, PerExample]:
        value, gradient = find(key, params, batch.image, batch.label)
        leaves, structure = jax.tree.flatten(gradient, is_leaf=lambda x: isinstance(x, KernelGradients))
        squares, bounds = zip(*map(_squares, leaves), strict=True)
        norm = jnp.sqrt(sum(squares))
        weight = jnp.where(batch.mask & jnp.isfinite(norm), weight, 0)
        places = _group_places(params, groups)
        for group in places:
            bound = jnp.sqrt(sum(bounds[i] for i in group))
            # The clip is a factor in the sum: clipped copies of the gradients would cost half as much as the gradients.
            factor = weight * clip_factor(bound, clip_norm / math.sqrt(len(places)))
            for i in group:
                leaves[i] = _weighted_sum(factor, leaves[i])
        return jax.tree.unflatten(structure, leaves), _without_padding(batch.mask, norm, value)

    return clipped_sum


def _is_open(gradients: KernelGradients) -> bool:
    return gradients.num_products <= _MAX_PRODUCTS * gradients.num_entries


def _squares(leaf: jax.Array | KernelGradients) -> tuple[jax.Array, jax.Array]:
    """The squared norms of a stack of gradients, [B], and bounds on them that rounding does not pass."""
    if isinstance(leaf, KernelGradients):
        return leaf.square_norms()
    x = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    square = jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))
    return square, square


def _weighted_sum(factor: jax.Array, leaf: jax.Array | KernelGradients) -> jax.Array:
    return leaf.weighted_sum(factor) if isinstance(leaf, KernelGradients) else trees.weighted_sum(factor, leaf)


def norms_first(loss: Loss, microbatch_size: int) -> ClippedSum:
    """One pass for the norms, in microbatches, then one gradient of the sum of `factor_i * loss_i` over the batch.

    Args:
        loss: is called with one example at a time, in both passes.
        microbatch_size: of the first pass.
    """

    def norms_of(
        key: Key, params: Params, batch: Batch, weight: jax.Array, clip_norm: float | jax.Array
    ) -> tuple[tuple, PerExample]:
        del weight, clip_norm

        def one(key: Key, image: Any, label: Any) -> PerExample:
            value, gradient = _value_and_grad(loss, key, params, image, label)
            return trees.norm(gradient), value

        return (), _without_padding(batch.mask, *jax.vmap(one)(key, batch.image, batch.label))

    find_norms = in_microbatches(norms_of, microbatch_size, lambda _: ())

    def clipped_sum(
        key: Key, params: Params, batch: Batch, weight: jax.Array, clip_norm: float | jax.Array
    ) -> tuple[Params, PerExample]:
        _, (norm, value) = find_norms(key, params, batch, weight, clip_norm)
        good = batch.mask & jnp.isfinite(norm)
        # A factor 0 would not do for the others: 0 * inf is NaN. They become copies of a good example.
        place = jnp.where(good, jnp.arange(len(good)), jnp.argmax(good))
        key, image, label = jax.tree.map(lambda x: x[place], (key, batch.image, batch.label))

        def losses_of(params: Params) -> jax.Array:
            return jax.vmap(partial(_one_loss, loss), (0, None, 0, 0))(key, params, image, label)

        found, pull_back = jax.vjp(losses_of, params)
        factor = jnp.where(good, weight * clip_factor(norm, clip_norm), 0)
        (total,) = pull_back(factor.astype(found.dtype))
        return trees.where(jnp.any(good), total, trees.zeros_like(total)), (norm, value)

    return clipped_sum


def in_microbatches(part: ClippedSum, microbatch_size: int, zeros: Callable[[Params], Any]) -> ClippedSum:
    """The same sum, `microbatch_size` examples at a time, ending after the last real one.

    Args:
        part: what is looped over.
        microbatch_size: >= 1.
        zeros: from the parameters to an empty sum.
    """

    def looped(
        key: Key, params: Params, batch: Batch, weight: jax.Array, clip_norm: float | jax.Array
    ) -> tuple[Any, PerExample]:
        size = batch.mask.shape[0]
        if size <= microbatch_size:  # under a vmap over clients a loop of one turn costs selects of all it carries
            return part(key, params, batch, weight, clip_norm)
        num_chunks = -(-size // microbatch_size)
        padding = num_chunks * microbatch_size - size

        def chunks(x: jax.Array) -> jax.Array:
            x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (padding, *x.shape[1:]))])
            return x.reshape(num_chunks, microbatch_size, *x.shape[1:])

        real = jnp.arange(num_chunks * microbatch_size).reshape(num_chunks, -1) < size
        key, batch, weight = jax.tree.map(chunks, (key, batch, weight))
        batch = batch._replace(mask=batch.mask & real)
        last = jnp.max(jnp.where(jnp.any(batch.mask, axis=1), jnp.arange(num_chunks) + 1, 0))

        def body(i: jax.Array, carry: tuple) -> tuple:
            total, norm, value = carry
            chunk = jax.tree.map(lambda x: x[i], (key, batch, weight))
            more, (chunk_norm, chunk_value) = part(chunk[0], params, chunk[1], chunk[2], clip_norm)
            return trees.add(total, more), norm.at[i].set(chunk_norm), value.at[i].set(chunk_value)

        empty = jnp.zeros((num_chunks, microbatch_size))
        total, norm, value = jax.lax.fori_loop(0, last, body, (zeros(params), empty, empty))
        return total, (norm.reshape(-1)[:size], value.reshape(-1)[:size])

    return looped


def _one_loss(loss: Loss, key: Key, params: Params, image: Any, label: Any) -> jax.Array:
    image, label = jax.tree.map(lambda x: x[None], (image, label))
    return loss(key, params, image, label)[0]


def _value_and_grad(loss: Loss, key: Key, params: Params, image: Any, label: Any) -> tuple[jax.Array, Params]:
    return jax.value_and_grad(partial(_one_loss, loss, key))(params, image, label)


def _without_padding(mask: jax.Array, norm: jax.Array, value: jax.Array) -> PerExample:
    return jnp.where(mask, norm, 0), jnp.where(mask, value, 0)


def _group_places(params: Params, groups: Grouping | None) -> list[list[int]]:
    """The leaves of each group, by their place among all leaves."""
    found: dict[Hashable, list[int]] = {}
    for place, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
        found.setdefault(None if groups is None else groups(path), []).append(place)
    return list(found.values())
