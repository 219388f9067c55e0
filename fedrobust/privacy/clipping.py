"""Per-example clipped gradients whose sum has a known sensitivity."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from fedrobust import check, trace, trees
from fedrobust.privacy.clip_sums import (
    ClippedSum,
    Grouping,
    PerExample,
    clip_factor,
    in_microbatches,
    norms_first,
    per_example,
)
from fedrobust.types import Batch, Key, Loss, Params

RELATIONS = ("add_or_remove_one", "replace_one", "zero_out")
"""The neighbouring relations a sensitivity can be asked for."""

METHODS = ("per_example", "norms_first")
"""The ways to compute a clipped sum; they differ in speed and memory."""

# A whole batch on a CPU is taken in pieces of this size: 64 gradients of ResNet-9 at once are 156 MB of fresh memory,
# 250 ms, in pieces 226 (2 x86 cores, jax 0.10.2, 2026-11-23). Other platforms, not measured, take it at once.
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
        clip_norm: the L2 bound C of one example's contribution; traced where it was given so.
    """

    apply: Callable[[Key, Params, Batch, jax.Array | None], tuple[Params, ClipInfo]]
    clip_norm: float | jax.Array

    def __call__(
        self, key: Key, params: Params, batch: Batch, weight: jax.Array | None = None
    ) -> tuple[Params, ClipInfo]:
        """Same as `apply`, with unit weights by default."""
        return self.apply(key, params, batch, weight)

    def sensitivity(self, relation: str) -> float | jax.Array:
        """The largest L2 change of the sum between two neighbouring batches, for any grouping.

        Args:
            relation: "add_or_remove_one" or "zero_out" (one record appears, disappears or is blanked: C),
                "replace_one" (one record becomes another: 2 C).

        Raises:
            ValueError: unknown relation.
        """
        check.one_of("relation", relation, RELATIONS)
        return 2 * self.clip_norm if relation == "replace_one" else self.clip_norm


def clip(gradient: Params, clip_norm: float | jax.Array) -> tuple[Params, jax.Array]:
    """Scales one gradient into the L2 ball of radius `clip_norm`.

    Args:
        gradient: a pytree of float32 arrays, or wider: one example, one vector.
        clip_norm: C > 0.

    Returns:
        The clipped pytree, and the norm before the clip, shape (), which is not finite where a leaf was not.

    Raises:
        ValueError: a leaf of half precision.

    Guarantees:
        The result's norm is at most C, rounding included; a gradient that holds NaN or inf, or whose norm
        overflows, becomes exactly 0.
    """
    _require_precision("gradient", gradient)
    norm = trees.norm(gradient)
    factor = clip_factor(norm, clip_norm)
    return jax.tree.map(lambda g: jnp.where(factor == 0, 0, g * factor.astype(g.dtype)), gradient), norm


def _require_precision(name: str, tree: Params) -> None:
    """Half precision rounds a clipped vector out of its ball, and a sum of hundreds by more than any one of them."""
    for leaf in jax.tree.leaves(tree):
        dtype = jnp.result_type(leaf)
        check.require(dtype.itemsize >= 4, f"dtype of {name}", dtype.name, "float32 or wider")


def by_layer(path: tuple) -> Hashable:
    """Groups parameters by layer: those whose paths differ in the last key only, such as a kernel and its bias."""
    return path[:-1]


def clipped_grad(
    loss: Loss,
    *,
    clip_norm: float | jax.Array,
    method: str = "per_example",
    microbatch_size: int | None = None,
    groups: Grouping | None = None,
) -> ClippedGrad:
    """Builds the sum of per-example gradients, each clipped to L2 norm C and then weighted.

        sum_i mask_i * weight_i * g_i * min(1, C / |g_i|)

    The weight stands AFTER the clip: where most gradients exceed C a weight inside the loss is clipped away,
    and a weight in [0, 1] outside leaves the sensitivity as it is. Whatever the loss does with one record
    (augmented views, an adversarial copy), one record gives one vector and one clip. Convolutions of the loss that are
    plain `lax` become `fedrobust.ops.conv`, see `trace.fast_convolutions`.

    Args:
        loss: per-example loss; it is called with one example at a time, so no record sees another. Its `image` and
            `label` are any pytrees of arrays [B, ...], its parameters any pytree of float32 arrays, or wider.
        clip_norm: C, a Python number > 0 or a JAX scalar (built inside `jit`, as adaptive clipping does), which is not
            checked.
        method: "per_example" differentiates each example once and holds the gradients of a microbatch. "norms_first"
            differentiates twice, first for the norms, then the whole batch as one weighted sum; it holds the gradients
            of a microbatch while it measures them. Memory at batch 512, ResNet-9 of width 32 on 28 x 28: without
            privacy 560 MB; "per_example" 1779 whole, 66 in microbatches of 16; "norms_first" 560 (x86 CPU, jax 0.10.2,
            2026-11-23). The sum is the same to float rounding.
        microbatch_size: None, for "per_example" only, takes the whole batch at once (a CPU 16 examples at a time).
            m >= 1 loops over m examples at a time and stops after the last real example, so memory is O(m * D) and time
            follows the realised batch; for "norms_first" this is the pass for the norms. The sum is the same to float
            rounding.
        groups: None clips the whole gradient. Else a function from a parameter's key path to its group, such as
            `by_layer`: each of G groups is clipped to C / sqrt(G), so the total stays within C. "per_example" only: one
            weight per example cannot carry G factors.

    Returns:
        A `ClippedGrad`. Its `weight` argument is [B], clamped to [0, 1] (NaN to 0), and must not depend on private data
        beyond the example's own record.

    Raises:
        ValueError: clip_norm not positive and finite, microbatch_size < 1, unknown method, groups with "norms_first";
            where it is called, parameters of half precision.

    Guarantees:
        Padding contributes exactly 0 whatever it holds, and so does an example whose gradient is not finite. Example i
        draws from the i-th key of the batch, so replacing one record changes no other record's contribution by one bit.
        The bound C on a contribution is strict for "per_example": it scales the very gradient it measured or, where a
        CPU leaves a convolution's gradients unwritten, takes a bound on their norm that rounding does not pass. For
        "norms_first" it rests on both passes rounding alike: where they do not, a contribution exceeds C by as much as
        the two gradients differ, about 1e-6 for smooth losses, more where a rounding error decides a branch (an attack
        that takes signs). Not guaranteed: the same bits from different methods or microbatch sizes.

    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1; groups: McMahan et al. 2018 (arXiv 1710.06963),
    section 2.3, "per-layer clipping".
    """
    if not isinstance(clip_norm, jax.Array):
        check.positive("clip_norm", clip_norm)
    check.one_of("method", method, METHODS)
    if microbatch_size is not None:
        check.at_least("microbatch_size", microbatch_size, 1)
    needed = method == "norms_first" and microbatch_size is None
    check.require(not needed, "microbatch_size", microbatch_size, f"a whole number >= 1 for method {method!r}")
    check.require(groups is None or method == "per_example", "groups", groups, f"None for method {method!r}")
    clipped_sum = _choose(trace.fast_convolutions(loss), method, microbatch_size, groups)

    def apply(key: Key, params: Params, batch: Batch, weight: jax.Array | None) -> tuple[Params, ClipInfo]:
        chex.assert_rank(batch.mask, 1)
        chex.assert_tree_shape_prefix((batch.image, batch.label), batch.mask.shape)
        _require_precision("params", params)
        size = batch.mask.shape[0]
        weight = jnp.ones(size) if weight is None else jnp.where(jnp.isnan(weight), 0, jnp.clip(weight, 0, 1))
        batch, weight = blank_padding(batch, weight)
        total, (norm, value) = clipped_sum(jax.random.split(key, size), params, batch, weight, clip_norm)
        count = jnp.maximum(jnp.sum(batch.mask), 1)
        return total, ClipInfo(jnp.sum(value) / count, norm, jnp.sum(~jnp.isfinite(norm)))

    return ClippedGrad(apply, clip_norm)


def _choose(loss: Loss, method: str, microbatch_size: int | None, groups: Grouping | None) -> ClippedSum:
    if method == "norms_first":
        assert microbatch_size is not None
        return norms_first(loss, microbatch_size)
    looped = partial(in_microbatches, zeros=trees.zeros_like)
    on_cpu, elsewhere = (per_example(loss, groups, opened=opened) for opened in (True, False))
    on_cpu = looped(on_cpu, microbatch_size or _CPU_CHUNK)
    if microbatch_size is not None:
        elsewhere = looped(elsewhere, microbatch_size)

    def by_platform(
        key: Key, params: Params, batch: Batch, weight: jax.Array, clip_norm: float | jax.Array
    ) -> tuple[Params, PerExample]:
        return jax.lax.platform_dependent(key, params, batch, weight, clip_norm, cpu=on_cpu, default=elsewhere)

    return by_platform


def blank_padding(batch: Batch, weight: jax.Array) -> tuple[Batch, jax.Array]:
    """Replaces whatever padding holds by zeros, so that no NaN of it can travel.

    Args:
        batch: a padded batch.
        weight: [B] float32.

    Returns:
        The batch and the weights, both 0 where the mask is False.
    """
    mask = batch.mask

    def blank(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

    image, label = jax.tree.map(blank, (batch.image, batch.label))
    return Batch(image, label, mask), blank(weight)
