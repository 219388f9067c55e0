"""Factors over rounds: by hand, at their edges, and as laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.defenses import cyclic, linear_warmup


def over(schedule, num_rounds):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(num_rounds)))


def test_a_warm_up_by_hand():
    np.testing.assert_allclose(over(linear_warmup(num_rounds=10, share=0.25), 5), [1 / 3, 2 / 3, 1, 1, 1], rtol=1e-6)
    assert over(linear_warmup(num_rounds=100, share=0.07), 7)[6] == 1  # 0.07 * 100 is 7.000000000000001 in floats


@pytest.mark.parametrize(("num_rounds", "share"), [(1, 0.0), (1, 1.0), (7, 0.0), (7, 0.5), (7, 1.0), (300, 0.3)])
def test_a_warm_up_rises_from_above_zero_to_exactly_one_in_its_share_of_the_rounds(num_rounds, share):
    factor = over(linear_warmup(num_rounds=num_rounds, share=share), num_rounds)
    assert factor[0] > 0 and (np.diff(factor) >= 0).all() and factor[-1] == 1
    assert np.sum(factor < 1) == max(0, np.ceil(share * num_rounds) - 1)


def test_cycles_by_hand():
    """Middles of five rounds: 0.1, 0.3, 0.5, 0.7, 0.9 with the peak at 0.2; then two cycles of two."""
    np.testing.assert_allclose(over(cyclic(num_rounds=5, peak=0.2), 5), [0.5, 0.875, 0.625, 0.375, 0.125], rtol=1e-5)
    found = over(cyclic(num_rounds=4, peak=0.5, num_cycles=2), 4)
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("num_rounds", "peak", "num_cycles"), [(1, 0.5, 1), (40, 0.4, 1), (40, 0.7, 4), (6, 0.1, 6)])
def test_cycles_repeat_rise_fall_and_average_one_half(num_rounds, peak, num_cycles):
    factor = over(cyclic(num_rounds=num_rounds, peak=peak, num_cycles=num_cycles), num_rounds)
    assert (factor > 0).all() and (factor <= 1).all()
    cycles = factor.reshape(num_cycles, -1)
    np.testing.assert_array_equal(cycles, np.repeat(cycles[:1], num_cycles, 0))
    turns = np.diff(np.sign(np.diff(cycles[0])))
    assert np.count_nonzero(turns) <= 1
    if cycles.shape[1] >= 10:
        assert cycles[0].mean() == pytest.approx(0.5, abs=0.01)
        assert np.argmax(cycles[0]) / cycles.shape[1] == pytest.approx(peak, abs=0.1)


@pytest.mark.parametrize(
    ("build", "settings", "name"),
    [
        (linear_warmup, {"num_rounds": 0, "share": 0.5}, "num_rounds"),
        (linear_warmup, {"num_rounds": 5, "share": 1.5}, "share"),
        (cyclic, {"num_rounds": 0, "peak": 0.5}, "num_rounds"),
        (cyclic, {"num_rounds": 5, "peak": 1.0}, "peak"),
        (cyclic, {"num_rounds": 5, "peak": 0.0}, "peak"),
        (cyclic, {"num_rounds": 5, "peak": 0.5, "num_cycles": 0}, "num_cycles"),
        (cyclic, {"num_rounds": 5, "peak": 0.5, "num_cycles": 2}, "num_cycles"),
    ],
)
def test_a_bad_setting_is_named(build, settings, name):
    with pytest.raises(ValueError, match=rf"^{name} is "):
        build(**settings)
