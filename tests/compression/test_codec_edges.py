"""Codecs at their edges: one number, the last level, half precision, nothing to say."""

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust.compression.codecs import error_feedback, power_sgd, qsgd, random_k, sign, terngrad, top_k

KEY = jax.random.key(0)
UPDATE = {"b": jnp.asarray([1.0, -2.0, 0.5]), "w": jnp.arange(30.0).reshape(6, 5) + 1}


def test_a_level_never_leaves_its_range():
    """Of a leaf of one number rounding can make more than 100 levels, which a draw within 8e-6 of one takes for 101.

    Of 2^20 draws eight are, none with a probability of 4e-4.
    """
    x = np.linspace(1, 2, 101, dtype=np.float32)
    x = x[x / (x / np.float32(100)) > 100][:1]
    codec = qsgd(x, num_levels=100)
    level = jax.jit(jax.vmap(lambda key: codec.encode(key, (), x)[0].level))(jax.random.split(KEY, 2**20))
    assert np.unique(level).tolist() == [100]


def test_half_precision_comes_back_as_half_precision():
    like = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), UPDATE)
    codecs = (sign(like), terngrad(like), qsgd(like, num_levels=3), power_sgd(like, rank=1), top_k(like, share=0.5))
    for codec in (*codecs, random_k(like, share=0.5, unbiased=True)):
        found = jax.eval_shape(codec.decode, codec.shape)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), like)


def test_a_leaf_without_numbers_is_no_trouble():
    update = [jnp.zeros((0, 3)), jnp.asarray([1.0, -1.0])]
    codec = terngrad(update)
    empty, found = jax.jit(lambda key: codec.decode(codec.encode(key, (), update)[0]))(KEY)
    assert (empty.shape, found.tolist()) == ((0, 3), [1, -1])


def test_of_random_places_at_least_one_is_sent():
    assert random_k(UPDATE, share=1e-9, unbiased=False).shape.value.shape == (1,)


def test_an_update_of_zeros_does_not_blind_power_sgd():
    """From a start of zeros the next iteration would look at the first rows alone, where this matrix has nothing."""
    rng = np.random.default_rng(4)
    matrix = np.concatenate([np.zeros((2, 6)), rng.normal(size=(6, 2)) @ rng.normal(size=(2, 6))]).astype(np.float32)
    codec = power_sgd(matrix, rank=2)
    encode = jax.jit(codec.encode)
    start = codec.init(matrix)
    _, after = encode(KEY, start, 0 * matrix)
    jax.tree.map(np.testing.assert_array_equal, after, start)
    corner = np.zeros((8, 6), np.float32)
    corner[0, 0] = 1  # of rank one: the second column finds nothing
    _, after = encode(KEY, start, corner)
    np.testing.assert_allclose(codec.decode(encode(KEY, after, matrix)[0]), matrix, atol=1e-5)


def test_what_was_not_said_is_said_in_the_next_turns():
    update = jnp.asarray([5.0, -4.0, 1.0])
    codec = error_feedback(top_k(update, share=0.3))
    state, said, encode = codec.init(update), [], jax.jit(codec.encode)
    for now in (update, 0 * update, 0 * update):
        code, state = encode(KEY, state, now)
        said.append(codec.decode(code).tolist())
    assert said == [[5, 0, 0], [0, -4, 0], [0, 0, 1]]
