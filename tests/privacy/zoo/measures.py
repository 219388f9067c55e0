"""What the laws compare: a trainer's records, its clipped sums, its noise."""

import functools
import math
from typing import Any

import jax
import numpy as np

KEY = jax.random.key


def vector(tree: Any) -> np.ndarray:
    """All scalars of a tree, float64."""
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


def leaves(tree: Any) -> list[np.ndarray]:
    """Every leaf as a vector, float64."""
    return [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]


def some(t: Any, seed: int, size: int = 12) -> Any:
    """A few records: short and long gradients among them."""
    rng = np.random.default_rng([seed, 7])
    rows = rng.choice(t.NUM_SILOS * t.NUM_RECORDS, size, replace=False)
    found = t.records(seed)
    stretch = rng.choice([0.05, 1.0, 3.0], size).astype(np.float32)[:, None, None, None]
    return found._replace(image=found.image[rows] * stretch, label=found.label[rows])


def without(batch: Any, index: int) -> Any:
    """The batch when one record is not in it."""
    mask = batch.mask.copy()
    mask[index] = False
    return batch._replace(mask=mask)


@functools.cache
def compiled(function: Any) -> Any:
    """One compilation for all seeds."""
    return jax.jit(function)


def clipped_sum(t: Any, seed: int, params: Any, batch: Any, weight: Any = None) -> np.ndarray:
    """The clipped sum as a float64 vector."""
    weight = np.ones(len(batch.label), np.float32) if weight is None else weight
    return vector(compiled(t.clipped().apply)(KEY(seed), params, batch, weight)[0])


def close_std(sample: np.ndarray, stddev: float) -> None:
    """A sample of a normal distribution with mean 0: by its mean, its spread, its tails."""
    n = sample.size
    assert abs(sample.mean()) < 6 * stddev / math.sqrt(n), "biased"
    assert abs(sample.std() / stddev - 1) < 6 / math.sqrt(2 * n), (
        f"spread {sample.std() / stddev:.3f} of what it must be"
    )
    for limit, share in ((1, 0.6826895), (2, 0.9544997)):
        inside = np.mean(np.abs(sample) < limit * stddev)
        assert abs(inside - share) < 6 * math.sqrt(share * (1 - share) / n) + 1e-3, "not normal"


def unrelated(a: np.ndarray, b: np.ndarray) -> None:
    """No correlation."""
    assert abs(np.corrcoef(a, b)[0, 1]) < 6 / math.sqrt(a.size), "correlated"
