"""Laws of cost."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.evaluation import cost, latencies


def apply(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]


PARAMS = {"w": np.ones((12, 5), np.float32), "b": np.zeros(5, np.float32)}


def test_cost_by_hand():
    found = cost(apply, PARAMS, image_shape=(3, 4, 1), file_bytes=321, batch_size=2, num_repeats=3)
    assert (found.parameters, found.bytes, found.flops) == (65, 321, 120)
    assert found.latency_ms > 0


def test_a_much_larger_model_takes_longer():
    """Compares a thousand-fold difference in arithmetic, so a busy machine does not fail it."""

    def slow(params, x):
        for _ in range(40):
            x = jnp.tanh(x @ params)
        return x

    small, large = latencies(
        (lambda p, x: x * p, jnp.float32(2)),
        (slow, jnp.eye(256)),
        image_shape=(4, 256, 256),
        batch_size=1,
        num_repeats=3,
    )
    assert large > 3 * small


@pytest.mark.parametrize("setting", ["batch_size", "num_repeats"])
def test_bad_counts_are_named(setting):
    with pytest.raises(ValueError, match=f"^{setting} is 0"):
        latencies((apply, PARAMS), **{"image_shape": (3, 4, 1), "batch_size": 1, setting: 0})
