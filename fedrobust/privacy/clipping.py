"""Per-example clipped gradients whose sum has a known sensitivity."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedrobust import check, trees
from fedrobust.types import Batch, Key, Loss, Params

RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
"""The neighbouring relations a sensitivity can be asked for."""

# float32 norms carry a relative error of about 1e-6; shrinking by four times that keeps the bound strict.
_ROUNDING = 4e-6

# A whole batch on a CPU is taken in pieces of this size: 64 gradients of ResNet-9 at once are 156 MB of fresh memory,
# whose page faults take as long as the clipping: 288 ms at once, 207 in pieces (2 x86 cores, jax 0.10.2, 2026-11-23).
_CPU_CHUNK = 16


class ClipInfo(NamedTuple):
    """Diagnostics of one clipped sum. NOT private: nothing here may be released.

    Attributes:
        loss: [] mean loss of the real examples, before the step (0 for an empty batch).
        norm: [B] L2 norm of each example's gradient before the clip; 0 for padding, inf or NaN where it was dropped.
        num_dropped: [] int32, real examples whose gradient was not finite; they contribute exactly 0.
    """

    loss: jax.Array
    norm: jax.Array
    num_dropped: jax.Array


@dataclass(frozen=True)
class ClippedGrad:
    """A clipped gradient sum that knows its own sensitivity.

    Attributes:
        apply: `(key, params, batch, weight[B] | None) -> (sum over examples of weight * clip(gradient), ClipInfo)`.
        clip_norm: the L2 bound C of one example's contribution.
    """

    apply: Callable[[Key, Params, Batch, jax.Array | None], tuple[Params, ClipInfo]]
    clip_norm: float

    def __call__(
        self, key: Key, params: Params, batch: Batch, weight: jax.Array | None = None
    ) -> tuple[Params, ClipInfo]:
        """Same as `apply`, with unit weights by default."""
        return self.apply(key, params, batch, weight)

    def sensitivity(self, relation: str) -> float:
        """The largest L2 change of the sum between two neighbouring batches.

        Args:
            relation: "add_or_remove_one" or "zero_out" (one record appears, disappears or is blanked: C),
                "replace_one" (one record becomes another: 2 C).

        Raises:
            ValueError: unknown relation.
        """
        check.one_of("relation", relation, RELATIONS)
        return 2 * self.clip_norm if relation == "replace_one" else self.clip_norm


def clip(gradient: Params, clip_norm: float) -> tuple[Params, jax.Array]:
    """Scales one gradient into the L2 ball of radius `clip_norm`.

    Args:
        gradient: a pytree of float arrays: one example, one vector.
        clip_norm: C > 0.

    Returns:
        The clipped pytree, and the norm before the clip, shape (), which is not finite where a leaf was not.

    Guarantees:
        The result's norm is at most C, rounding included; a gradient that holds NaN or inf, or whose norm
        overflows, becomes exactly 0.
    """
    norm = trees.norm(gradient)
    factor = clip_factor(norm, clip_norm)
    return jax.tree.map(lambda g: jnp.where(factor == 0, 0, g * factor.astype(g.dtype)), gradient), norm


def clip_factor(norm: jax.Array, clip_norm: float) -> jax.Array:
    """What a gradient of this norm is multiplied by: min(1, C / norm), rounded down; 0 for a norm that is not finite.

    Args:
        norm: any shape, >= 0, inf or NaN.
        clip_norm: C > 0.

    Returns:
        Factors in [0, 1], of the same shape.
    """
    return jnp.where(jnp.isfinite(norm), clip_norm / jnp.maximum(norm * (1 + _ROUNDING), clip_norm), 0)


def clipped_grad(loss: Loss, *, clip_norm: float, microbatch_size: int | None = None) -> ClippedGrad:
    """Builds the sum of per-example gradients, each clipped to L2 norm C and then weighted.

        sum_i mask_i * weight_i * g_i * min(1, C / |g_i|)

    The weight stands AFTER the clip: where most gradients exceed C a weight inside the loss is clipped away,
    and a weight in [0, 1] outside leaves the sensitivity as it is. Whatever the loss does with one record
    (augmented views, an adversarial copy), one record gives one vector and one clip.

    Args:
        loss: per-example loss; it is called with one example at a time, so no record sees another.
        clip_norm: C > 0.
        microbatch_size: None differentiates the whole batch at once. m >= 1 loops over m examples at a time and
            stops after the last real example, so memory is O(m * D) and time follows the realised batch.
            The result is the same to float rounding.

    Returns:
        A `ClippedGrad`. Its `weight` argument is [B], clamped to [0, 1], and must not depend on private data
        beyond the example's own record.

    Raises:
        ValueError: clip_norm not positive and finite, microbatch_size < 1.

    Guarantees:
        Padding contributes exactly 0 whatever it holds. Example i draws from the i-th key of the batch, so
        replacing one record changes no other record's contribution by one bit.

    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1.
    """
    check.positive("clip_norm", clip_norm)
    if microbatch_size is not None:
        check.at_least("microbatch_size", microbatch_size, 1)

    def one(key: Key, params: Params, image: jax.Array, label: jax.Array) -> tuple[Params, jax.Array, jax.Array]:
        value, gradient = jax.value_and_grad(lambda p: loss(key, p, image[None], label[None])[0])(params)
        return gradient, trees.norm(gradient), value

    def clipped_sum(
        key: Key, params: Params, batch: Batch, weight: jax.Array
    ) -> tuple[Params, tuple[jax.Array, jax.Array]]:
        gradient, norm, value = jax.vmap(one, in_axes=(0, None, 0, 0))(key, params, batch.image, batch.label)
        # The clip is a factor in the sum: clipped copies of the gradients would cost half as much as the gradients.
        total = trees.weighted_sum(weight * batch.mask * clip_factor(norm, clip_norm), gradient)
        return total, (jnp.where(batch.mask, norm, 0), jnp.where(batch.mask, value, 0))

    def apply(key: Key, params: Params, batch: Batch, weight: jax.Array | None) -> tuple[Params, ClipInfo]:
        chex.assert_rank([batch.image, batch.label, batch.mask], [4, 1, 1])
        size = batch.mask.shape[0]
        weight = jnp.ones(size) if weight is None else jnp.clip(weight, 0, 1)
        batch, weight = blank_padding(batch, weight)
        keys = jax.random.split(key, size)
        if microbatch_size is not None:
            total, per_example = _by_microbatches(clipped_sum, microbatch_size)(keys, params, batch, weight)
        elif size <= _CPU_CHUNK:
            total, per_example = clipped_sum(keys, params, batch, weight)
        else:
            looped = _by_microbatches(clipped_sum, _CPU_CHUNK)
            total, per_example = jax.lax.platform_dependent(
                keys, params, batch, weight, cpu=looped, default=clipped_sum
            )
        norm, value = per_example
        count = jnp.maximum(jnp.sum(batch.mask), 1)
        return total, ClipInfo(jnp.sum(value) / count, norm, jnp.sum(~jnp.isfinite(norm)))

    return ClippedGrad(apply, clip_norm)


def blank_padding(batch: Batch, weight: jax.Array) -> tuple[Batch, jax.Array]:
    """Replaces whatever padding holds by zeros, so that no NaN of it can travel.

    Args:
        batch: a padded batch.
        weight: [B] float32.

    Returns:
        The batch and the weights, both 0 where the mask is False.
    """
    mask = batch.mask
    image = jnp.where(mask.reshape(mask.shape + (1,) * (batch.image.ndim - 1)), batch.image, 0)
    return Batch(image, jnp.where(mask, batch.label, 0), mask), jnp.where(mask, weight, 0)


def _by_microbatches(clipped_sum: Callable, microbatch_size: int) -> Callable:
    """The same sum, `microbatch_size` examples at a time, ending after the last real one."""

    def looped(key: Key, params: Params, batch: Batch, weight: jax.Array) -> tuple[Params, tuple]:
        size = batch.mask.shape[0]
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
            part, (part_norm, part_value) = clipped_sum(chunk[0], params, chunk[1], chunk[2])
            return trees.add(total, part), norm.at[i].set(part_norm), value.at[i].set(part_value)

        empty = jnp.zeros((num_chunks, microbatch_size))
        total, norm, value = jax.lax.fori_loop(0, last, body, (trees.zeros_like(params), empty, empty))
        return total, (norm.reshape(-1)[:size], value.reshape(-1)[:size])

    return looped
