"""Laws of dishonest updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import UPDATE_ATTACKS, sign_flip

KEY = jax.random.key(0)


def test_sign_flip_by_hand():
    updates = {"w": jnp.asarray([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.asarray([5.0, 6.0], jnp.bfloat16)}
    sent = sign_flip(3.0)(KEY, updates, jnp.asarray([True, False]))
    np.testing.assert_array_equal(sent["w"], [[-3, 6], [3, 4]])
    np.testing.assert_array_equal(np.asarray(sent["b"], np.float32), [-15, 6])
    assert sent["b"].dtype == jnp.bfloat16


@pytest.mark.parametrize("build", [lambda: sign_flip(2.0)])
def test_honest_rows_pass_bit_for_bit(build):
    rows = jnp.asarray([[jnp.nan, -0.0], [1.0, jnp.inf], [2.0, 3.0]])
    sent = jax.jit(build())(KEY, rows, jnp.asarray([False, False, True]))
    np.testing.assert_array_equal(np.asarray(sent)[:2].view(np.int32), np.asarray(rows)[:2].view(np.int32))
    assert set(UPDATE_ATTACKS) == {"sign_flip"}


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_a_bad_scale_is_named(scale):
    with pytest.raises(ValueError, match=r"^scale is "):
        sign_flip(scale)
