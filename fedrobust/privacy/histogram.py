"""Label counts under differential privacy."""

import numpy as np

from fedrobust import check


def private_class_weight(rng: np.random.Generator, silo_counts: np.ndarray, *, histogram_epsilon: float) -> np.ndarray:
    """Class weights in [0, 1] from label counts that every silo noises before it tells them.

    Weights are inversely proportional to the noised federation-wide counts, the rarest class at 1, to be
    used after the clip (`private_grad(class_weight=...)`), where they leave the sensitivity as it is.

    Args:
        rng: the noise; used once.
        silo_counts: [num_silos, L] label counts of disjoint silos.
        histogram_epsilon: > 0. One record is in one count of one silo, so Laplace noise of scale
            1 / histogram_epsilon makes each silo's counts histogram_epsilon-DP for "add_or_remove_one".

    Returns:
        [L] float32 in (0, 1].

    Raises:
        ValueError: histogram_epsilon not positive and finite, or counts of another rank.

    Source: Dwork et al. 2006, the Laplace mechanism on a histogram.
    """
    check.positive("histogram_epsilon", histogram_epsilon)
    check.require(np.ndim(silo_counts) == 2, "shape of silo_counts", np.shape(silo_counts), "[num_silos, L]")
    noisy = np.asarray(silo_counts, np.float64) + rng.laplace(scale=1 / histogram_epsilon, size=np.shape(silo_counts))
    counts = np.maximum(noisy.sum(axis=0), 1.0)
    return (counts.min() / counts).astype(np.float32)
