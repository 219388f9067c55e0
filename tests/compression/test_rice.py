"""Whole numbers as bits, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.compression.codecs import rice


def test_places_of_a_random_set_cost_what_the_best_code_takes():
    num, size = 1500, 150_000
    place = np.sort(np.random.default_rng(1).choice(size, num, replace=False))
    entropy = size * (-0.01 * np.log2(0.01) - 0.99 * np.log2(0.99)) / 8
    assert entropy - 20 < len(rice.write(np.diff(place, prepend=-1) - 1)) < 1.01 * entropy


@pytest.mark.parametrize(
    "value",
    [
        *([], [0], [5], [0, 0, 0], [1000, 0, 3, 70_000, 2], [2**22] * 3, list(range(300)), [255] * 9),
        *([2**30] * 2, [2**30] * 5, [2**31 - 1, 0, 7]),  # their sums leave 32 bits
    ],
)
def test_numbers_come_back_and_their_length_is_known_beforehand(value):
    data = rice.write(np.asarray(value, np.int64))
    back, rest = rice.read(data + b"rest", len(value))
    assert (back.tolist(), rest) == (value, b"rest")
    padded = jnp.asarray([7, *value, 9], jnp.int32)
    present = jnp.asarray([False, *[True] * len(value), False])
    assert rice.num_bytes(padded, present) == len(data)


@pytest.mark.parametrize("data", [b"", b"\x18\xff", b"\x00\x00\x00", b"\x05\xff"])
def test_bytes_that_hold_no_numbers_are_refused(data):
    with pytest.raises(ValueError, match=r"^code is "):
        rice.read(data, 3)
