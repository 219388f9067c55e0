import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.compression import dequantize, quantize


def test_a_hand_computed_matrix():
    w = jnp.array([[127.0, 0.0, -1.0], [-63.4, 0.0, 0.5]])
    quantized = quantize({"w": w})
    np.testing.assert_array_equal(quantized.value["w"][:, 0], [127, -63])
    np.testing.assert_array_equal(quantized.value["w"][:, 1], [0, 0])
    assert quantized.value["w"].dtype == jnp.int8
    assert quantized.scale["w"][0] == 1 and quantized.scale["w"][1] == 0
    np.testing.assert_array_equal(dequantize(quantized)["w"][:, 0], [127.0, -63.0])


@pytest.mark.parametrize("magnitude", [1e-12, 1e-6, 1e-4, 1e-2, 1.0, 1e3, 1e6])
def test_no_weight_moves_by_more_than_half_a_step(magnitude):
    w = magnitude * jax.random.normal(jax.random.key(0), (3, 3, 5, 64))
    quantized = quantize(w)
    error = np.abs(np.float64(w) - np.float64(quantized.value) * np.float64(quantized.scale))
    assert (error <= 0.5 * np.float64(quantized.scale) * (1 + 1e-6)).all()  # 1e-6: the division is float32
    assert quantized.scale.shape == (64,)


def test_the_scale_belongs_to_the_output_channel():
    w = jax.random.normal(jax.random.key(0), (50, 2)) * jnp.array([1.0, 1000.0])
    error = jnp.max(jnp.abs(dequantize(quantize(w)) - w), axis=0)
    assert error[0] < 0.05  # one scale for all channels would round the first one to zero


def test_vectors_keep_sixteen_bits_and_zeros_stay_zero():
    tree = {"bias": jnp.array([0.1, 0.0]), "gain": jnp.array(0.3), "w": jnp.array([[0.0, 1.0], [2.0, 0.0]])}
    quantized = quantize(tree)
    assert quantized.value["bias"].dtype == quantized.value["gain"].dtype == jnp.float16
    back = dequantize(quantized)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(back))
    np.testing.assert_allclose(back["bias"], tree["bias"], rtol=2**-11)
    np.testing.assert_array_equal(back["w"] == 0, tree["w"] == 0)


def test_quantizing_twice_changes_nothing_and_jit_agrees():
    w = jax.random.normal(jax.random.key(3), (7, 5))
    once = dequantize(quantize(w))
    np.testing.assert_allclose(dequantize(quantize(once)), once, rtol=1e-3)
    for a, b in zip(jax.tree.leaves(jax.jit(quantize)(w)), jax.tree.leaves(quantize(w)), strict=True):
        np.testing.assert_array_equal(a, b)
