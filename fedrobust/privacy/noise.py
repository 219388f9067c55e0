"""Gaussian noise on pytrees, and the mechanisms made from it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedrobust import check, trees
from fedrobust.privacy.adaptive import AdaptiveClipNorm
from fedrobust.privacy.clipping import ClipInfo, ClippedGrad, clip
from fedrobust.privacy.plan import Plan
from fedrobust.types import Aggregator, Batch, GradFn, Key, Params

Noise = Callable[[Key, Params, float | jax.Array], Params]
"""`(key, tree, stddev) -> tree + N(0, stddev^2)`: `add_gaussian` or `add_system_gaussian`."""


def add_gaussian(key: Key, tree: Params, stddev: float | jax.Array) -> Params:
    """Adds independent normal noise to every scalar.

    Args:
        key: used once, for one draw of as many numbers as the tree has scalars.
        tree: a pytree of float arrays.
        stddev: standard deviation >= 0 of each scalar's noise, in the tree's own unit.

    Returns:
        `tree + N(0, stddev^2)`, same shapes and dtypes.
    """
    return trees.add_flat(tree, stddev * jax.random.normal(key, (trees.size(tree),)))


def private_grad(
    clipped: ClippedGrad,
    plan: Plan,
    *,
    num_records: float,
    class_weight: jax.Array | None = None,
    num_shares: int = 1,
    num_replays: int = 1,
    noise: Noise = add_gaussian,
) -> GradFn:
    """The Gaussian mechanism on a clipped gradient sum: one step of DP-SGD, as the plan accounts for it.

        (sum_i w_i clip(g_i) + N(0, stddev^2)) / (plan.sampling_rate * num_records)
        stddev = plan.noise_multiplier * sensitivity * sqrt(num_replays / num_shares)

    Args:
        clipped: knows its sensitivity for the plan's relation.
        plan: of unit "record". Batches must be sampled as it says; each call is one of its steps, or with replays all
            calls on one batch are.
        num_records: nominal size of a silo, a public constant > 0, never the realised size of a batch.
        class_weight: [L] in [0, 1], multiplies each example's clipped gradient by its label's weight. Must be
            public or itself released privately, and accounted.
        num_shares: K >= 1. 1: the gradient carries the plan's whole noise and may be seen by anyone. K > 1: it carries
            1/K of the variance and may be seen by NO ONE. A secure sum must add it up with those of K - 1 other silos,
            which hold other records and draw from other keys; only that sum has the plan's noise, and the plan's
            epsilon, a silo's own, holds for it alone. The server is honest but curious, and no silo drops out: with d
            shares missing the sum has (K - d) / K of the variance. Who knows c of the shares (silos that collude, or
            one silo that takes off its own) faces (K - c) / K of it: less noise than the plan accounts for.
        num_replays: m >= 1, gradients that are taken on one and the same sampled batch, each at parameters and images
            that may depend on those before. Each then has m times the variance: m Gaussians of multiplier
            sqrt(m) z, one after the other, tell what a single one of multiplier z does, and it is this one that the
            plan samples. To count the m calls as m steps, each of a sample of its own, would report too little. 1 with
            num_shares > 1.
        noise: where the noise comes from: the key, or with `add_system_gaussian` the operating system.

    Returns:
        A `GradFn` `(key, params, batch) -> (gradient, ClipInfo)`. An empty batch gives pure noise.

    Raises:
        ValueError: a setting out of range, an unknown relation, or a plan of another unit.

    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1; shares of the noise: Dwork, Kenthapadi, McSherry,
        Mironov, Naor 2006, "Our data, ourselves: privacy via distributed noise generation" (EUROCRYPT); replays: Dong,
        Roth, Su 2019 (arXiv 1905.02383), Corollary 3.3, inside the sample.
    """
    check.one_of("plan.unit", plan.unit, ("record",))
    check.positive("plan.noise_multiplier", plan.noise_multiplier)
    check.positive("num_records", num_records)
    check.at_least("num_shares", num_shares, 1)
    check.at_least("num_replays", num_replays, 1)
    # A share alone is too little noise for what the next replay of the same silo reads.
    check.require(num_replays == 1 or num_shares == 1, "num_replays", num_replays, "1 where noise comes in shares")
    stddev = plan.noise_multiplier * clipped.sensitivity(plan.relation) * math.sqrt(num_replays) / math.sqrt(num_shares)
    expected_batch_size = plan.sampling_rate * num_records
    weight_of = None if class_weight is None else jnp.asarray(class_weight)  # NumPy cannot be indexed by traced labels

    def grad(key: Key, params: Params, batch: Batch) -> tuple[Params, ClipInfo]:
        loss_key, noise_key = jax.random.split(key)
        weight = None if weight_of is None else weight_of[batch.label]
        total, info = clipped(loss_key, params, batch, weight)
        return trees.scale(noise(noise_key, total, stddev), 1 / expected_batch_size), info

    return grad


def private_mean(
    plan: Plan, *, clip_norm: float | AdaptiveClipNorm, num_clients: float, noise: Noise = add_gaussian
) -> Aggregator:
    """Client-level DP-FedAvg: every client's update is clipped, the sum is noised once, at the server.

        (sum_k clip(update_k) + N(0, (plan.noise_multiplier * clip_norm)^2)) / (plan.sampling_rate * num_clients)

    Args:
        plan: of unit "client" and relation "add_or_remove_one". Cohorts must be sampled as it says; each call is one
            of its steps.
        clip_norm: L2 bound of one client's update, > 0; or how it is learned, whose count must have the plan's noise.
        num_clients: the population, a public constant > 0, never the realised size of a cohort.
        noise: as in `private_grad`; the count of a learned clip norm draws from the key.

    Returns:
        An `Aggregator`; its state is the clip norm where that is learned. Client weights only say who is present (> 0):
        unequal weights would change the sensitivity. Absent clients contribute exactly nothing, NaN or not.

    Raises:
        ValueError: a setting that is not positive and finite, a plan of another unit or relation, or one that accounts
            for another count.

    Source: McMahan et al. 2018 (arXiv 1710.06963), Algorithm 1, with the fixed-denominator estimator; a learned clip
        norm: Andrew et al. 2021 (arXiv 1905.03871), Algorithm 1.
    """
    check.one_of("plan.unit", plan.unit, ("client",))
    check.one_of("plan.relation", plan.relation, ("add_or_remove_one",))
    check.positive("plan.noise_multiplier", plan.noise_multiplier)
    check.positive("num_clients", num_clients)
    learned, constant = (clip_norm, 0.0) if isinstance(clip_norm, AdaptiveClipNorm) else (None, clip_norm)
    if learned is None:
        check.positive("clip_norm", constant)
    count = 0.0 if learned is None else learned.count_noise_stddev
    check.require(plan.count_noise_stddev == count, "plan.count_noise_stddev", plan.count_noise_stddev, f"{count}")
    expected_num_clients = plan.sampling_rate * num_clients

    def init(params: Params) -> Any:
        del params
        return () if learned is None else learned.init()

    def apply(key: Key, state: Any, updates: Params, weight: jax.Array) -> tuple[Params, Any, Any]:
        bound: Any = constant if learned is None else state
        clipped, norm = jax.vmap(lambda update: clip(update, bound))(updates)
        present = weight > 0
        total = trees.weighted_sum(present.astype(jnp.float32), clipped)
        if learned is not None:
            key, of_count = jax.random.split(key)
            state = learned.update(of_count, bound, norm, present)
        noisy = noise(key, total, plan.noise_multiplier * bound)
        return trees.scale(noisy, 1 / expected_num_clients), state, jnp.where(present, norm, 0)

    return Aggregator(init, apply)
