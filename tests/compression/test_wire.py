"""Messages that no sender writes: places, levels and sizes that a code cannot hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.compression.codecs import qsgd, quantized, top_k

KEY = jax.random.key(0)
SHORT = [jnp.zeros(2), jnp.zeros(1), jnp.zeros(3)]
LONG = [*SHORT, jnp.zeros(3)]


def few(like, share, num_bits):
    return quantized(top_k(like, share=share), num_bits=num_bits)


def message(codec, like, value):
    """What a sender says whose update holds one number, and at its end the largest; others are small."""
    update = [0.1 * jnp.ones(x.shape) for x in like[:-1]] + [jnp.asarray([0.2, 0.1, value])]
    return codec.serialize(jax.jit(codec.encode)(KEY, (), update)[0])


NAMES = {
    "a place": (top_k(SHORT, share=1 / 3), top_k(LONG, share=2 / 9), "last place in the code is 8: must be at most 5"),
    "a level": (qsgd(SHORT, num_levels=2), qsgd(SHORT, num_levels=9), r"size in the code is [89]: must be at most 2"),
    "a size": (few(SHORT, 0.5, 2), few(SHORT, 0.5, 4), "size in the code is 7: must be at most 1"),
    "a place beside sizes": (few(SHORT, 0.5, 4), few(LONG, 1 / 3, 4), "last place in the code is 8: must be at most 5"),
    "a level beside sizes": (
        quantized(qsgd(SHORT, num_levels=2), num_bits=4),
        quantized(qsgd(SHORT, num_levels=9), num_bits=4),
        r"size in the code is [89]: must be at most 2",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_out_of_range_are_refused_in_one_line_and_the_largest_come_back(name):
    reader, writer, words = NAMES[name]
    like = LONG if "place" in name else SHORT
    with pytest.raises(ValueError, match=f"^{words}$"):
        reader.deserialize(message(writer, like, 9.0))
    own = message(reader, SHORT, 9.0)
    assert reader.serialize(reader.deserialize(own)) == own
    assert max(np.abs(x).max() for x in jax.jit(reader.decode)(reader.deserialize(own))) > 8
