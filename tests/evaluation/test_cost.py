"""Laws of cost."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.evaluation import costs, latencies


def apply(params, x):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"]


PARAMS = {"w": np.ones((12, 5), np.float32), "b": np.zeros(5, np.float32)}


def test_costs_by_hand():
    wide = {"w": np.ones((12, 50), np.float32), "b": np.zeros(50, np.float32)}
    models = (apply, PARAMS, 321), (apply, wide, 7)
    small, large = costs(*models, image_shape=(3, 4, 1), batch_sizes=(1, 2), num_repeats=3)
    assert (small.parameters, small.bytes, small.flops) == (65, 321, 120)
    assert (large.parameters, large.bytes, large.flops) == (650, 7, 1200)
    assert small.latency.keys() == large.peak_bytes.keys() == {1, 2}
    for found in (small, large):
        for size in (1, 2):
            assert 0 < found.latency[size].median_ms <= found.latency[size].p95_ms
    # Parameters, images and logits in float32, and whatever the compiler needs in between.
    assert small.peak_bytes[2] >= 4 * (65 + 2 * 12 + 2 * 5)
    assert large.peak_bytes[2] - small.peak_bytes[2] >= 4 * (585 + 2 * 45)


def test_peak_memory_counts_what_lies_in_between():
    def through_much(params, x):
        return jnp.sum(jnp.sort(x.reshape(-1, 1) * params, axis=0), axis=0)

    (found,) = costs((through_much, jnp.ones((1, 5000)), 1), image_shape=(4, 4, 1), batch_sizes=(1,), num_repeats=1)
    assert found.peak_bytes[1] >= 4 * 16 * 5000


def test_percentiles_of_known_times(monkeypatch):
    """A clock that says each call took as many milliseconds as its number: 0, 1, ..., 20, the first one discarded."""
    ticks = iter(t for call in range(21) for t in (10.0 * call, 10.0 * call + call / 1e3))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks, 0.0))
    (found,) = latencies((apply, PARAMS), image_shape=(3, 4, 1), batch_size=1, num_repeats=20)
    assert found == pytest.approx((10.5, 19.05))


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
    assert large.median_ms > 3 * small.median_ms


@pytest.mark.parametrize("setting", ["batch_size", "num_repeats"])
def test_bad_counts_are_named(setting):
    with pytest.raises(ValueError, match=f"^{setting} is 0"):
        latencies((apply, PARAMS), **{"image_shape": (3, 4, 1), "batch_size": 1, setting: 0})


def test_a_bad_batch_size_among_several_is_named():
    with pytest.raises(ValueError, match=r"^batch_size is 0: must be a whole number >= 1$"):
        costs((apply, PARAMS, 1), image_shape=(3, 4, 1), batch_sizes=(1, 0), num_repeats=1)
