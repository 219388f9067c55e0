"""Gaussian noise on pytrees, and the mechanisms made from it."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from fedrobust import check, trees
from fedrobust.privacy.clipping import ClipInfo, ClippedGrad, clip
from fedrobust.types import Aggregator, Batch, GradFn, Key, Params


def add_gaussian(key: Key, tree: Params, stddev: float | jax.Array) -> Params:
    """Adds independent normal noise to every scalar.

    Args:
        key: used once, for one draw of as many numbers as the tree has scalars.
        tree: a pytree of float arrays.
        stddev: standard deviation >= 0 of each scalar's noise, in the tree's own unit.

    Returns:
        `tree + N(0, stddev^2)`, same shapes and dtypes.
    """
    leaves, structure = jax.tree.flatten(tree)
    noise = stddev * jax.random.normal(key, (trees.size(tree),))
    ends = list(itertools.accumulate(x.size for x in leaves))
    pieces = jnp.split(noise, ends[:-1])
    noisy = [x + piece.reshape(x.shape).astype(x.dtype) for x, piece in zip(leaves, pieces, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def private_grad(
    clipped: ClippedGrad,
    *,
    noise_multiplier: float,
    relation: str,
    expected_batch_size: float,
    class_weight: jax.Array | None = None,
) -> GradFn:
    """The Gaussian mechanism on a clipped gradient sum: one step of DP-SGD.

        (sum_i w_i clip(g_i) + N(0, (noise_multiplier * sensitivity)^2)) / expected_batch_size

    Args:
        clipped: knows its sensitivity.
        noise_multiplier: standard deviation over sensitivity, > 0; the plan's.
        relation: the neighbouring relation of the guarantee, see `ClippedGrad.sensitivity`.
        expected_batch_size: a public constant > 0 (sampling rate times nominal size), never the realised size.
        class_weight: [L] in [0, 1], multiplies each example's clipped gradient by its label's weight. Must be
            public or itself released privately, and accounted.

    Returns:
        A `GradFn` `(key, params, batch) -> (gradient, ClipInfo)`. An empty batch gives pure noise.

    Raises:
        ValueError: a setting out of range or an unknown relation.

    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1.
    """
    check.positive("noise_multiplier", noise_multiplier)
    check.positive("expected_batch_size", expected_batch_size)
    stddev = noise_multiplier * clipped.sensitivity(relation)

    def grad(key: Key, params: Params, batch: Batch) -> tuple[Params, ClipInfo]:
        loss_key, noise_key = jax.random.split(key)
        weight = None if class_weight is None else class_weight[batch.label]
        total, info = clipped(loss_key, params, batch, weight)
        return trees.scale(add_gaussian(noise_key, total, stddev), 1 / expected_batch_size), info

    return grad


def private_mean(*, clip_norm: float, noise_multiplier: float, expected_num_clients: float) -> Aggregator:
    """Client-level DP-FedAvg: every client's update is clipped, the sum is noised once, at the server.

        (sum_k clip(update_k) + N(0, (noise_multiplier * clip_norm)^2)) / expected_num_clients

    Args:
        clip_norm: L2 bound of one client's update, > 0.
        noise_multiplier: standard deviation over clip_norm, > 0, for the relation "add_or_remove_one".
        expected_num_clients: a public constant > 0 (sampling rate times population), never the realised number.

    Returns:
        An `Aggregator`. Client weights only say who is present (> 0): unequal weights would change the
        sensitivity. Absent clients contribute exactly nothing, NaN or not.

    Raises:
        ValueError: a setting that is not positive and finite.

    Source: McMahan et al. 2018 (arXiv 1710.06963), Algorithm 1, with the fixed-denominator estimator.
    """
    check.positive("clip_norm", clip_norm)
    check.positive("noise_multiplier", noise_multiplier)
    check.positive("expected_num_clients", expected_num_clients)

    def init(params: Params) -> tuple:
        del params
        return ()

    def apply(key: Key, state: tuple, updates: Params, weight: jax.Array) -> tuple[Params, tuple, Any]:
        clipped, norm = jax.vmap(lambda update: clip(update, clip_norm))(updates)
        present = weight > 0
        total = trees.weighted_sum(present.astype(jnp.float32), clipped)
        noisy = add_gaussian(key, total, noise_multiplier * clip_norm)
        return trees.scale(noisy, 1 / expected_num_clients), state, jnp.where(present, norm, 0)

    return Aggregator(init, apply)
