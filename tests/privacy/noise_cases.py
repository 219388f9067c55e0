"""The plans, sums and sample sizes that the tests of noise share.

Statistical tests draw N = 200 000 normals at a fixed key. Their standard deviation has a relative error of
1 / sqrt(2 N) = 0.0016, so a tolerance of 1 % is six of them: a right implementation fails for one key in 5e8.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust.privacy import Plan, clipped_grad, private_mean
from fedrobust.types import Batch

KEY = jax.random.key(3)
N = 200_000


def loss(key, params, image, label):
    """Its gradient is the image's first pixel in every one of the parameters' first three entries."""
    return image[:, 0, 0, 0] * jnp.sum(params["a"][:3])


PARAMS = {"a": jnp.zeros(N), "b": jnp.zeros(N)}
CLIPPED = clipped_grad(loss, clip_norm=0.5)
SIZE = 6


def make_batch(mask=True, label=0):
    image = np.linspace(-2, 2, SIZE, dtype=np.float32).reshape(-1, 1, 1, 1)
    return Batch(image, np.full(SIZE, label, np.int32), np.full(SIZE, mask))


PLAN = Plan(
    unit="record",
    relation="add_or_remove_one",
    sampling="poisson",
    sampling_rate=0.25,
    num_steps=3,
    noise_multiplier=1.2,
    histogram_epsilon=0.0,
    epsilon=8.0,
    delta=1e-5,
)


def assert_normal(sample, stddev):
    sample = np.asarray(sample, np.float64)
    assert abs(sample.std() / stddev - 1) < 0.01
    assert abs(sample.mean()) < 6 * stddev / np.sqrt(sample.size)
    inside = np.mean(np.abs(sample) < stddev)  # 0.6827 of a normal; 0.58 of a uniform, 0.76 of a Laplace
    assert abs(inside - 0.6827) < 0.01


NUM_CLIENTS = 5
CLIENT_PLAN = replace(PLAN, unit="client", noise_multiplier=0.7)
MEAN = private_mean(CLIENT_PLAN, clip_norm=2.0, num_clients=16)
