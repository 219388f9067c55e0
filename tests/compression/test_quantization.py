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


KINDS = [(8, True), (8, False), (4, True), (4, False)]
LIMITS = {(8, True): (-127, 127), (8, False): (-128, 127), (4, True): (-7, 7), (4, False): (-8, 7)}


def skewed(shape, seed=0):
    """A bell per channel, off centre, with an outlier here and there."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) + rng.normal(size=shape[-1])
    return np.float32(np.where(rng.uniform(size=shape) < 0.02, 4 * w, w) * np.exp(rng.normal(size=shape[-1])))


def test_a_hand_computed_asymmetric_matrix():
    w = jnp.array([[-1.0, 2.0], [14.0, 4.0], [0.0, 0.0], [13.4, 30.0]])  # 15 steps of 1 from -1; 15 steps of 2 from 0
    quantized = quantize({"w": w}, bits=4, symmetric=False)
    np.testing.assert_array_equal(quantized.scale["w"], [1, 2])
    np.testing.assert_array_equal(quantized.zero["w"], [-7, -8])
    np.testing.assert_array_equal(quantized.value["w"].astype(int), [[-8, -7], [7, -6], [-7, -8], [6, 7]])
    np.testing.assert_array_equal(dequantize(quantized)["w"], [[-1, 2], [14, 4], [0, 0], [13, 30]])


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_each_weight_takes_the_nearest_value_of_its_channel(bits, symmetric):
    w = skewed((40, 6))
    quantized = quantize(w, bits=bits, symmetric=symmetric)
    low, high = LIMITS[bits, symmetric]
    zero = np.zeros(6) if symmetric else np.float64(quantized.zero)
    values = (np.arange(low, high + 1)[:, None] - zero) * np.float64(quantized.scale)
    distance = np.abs(np.float64(w)[:, None] - values)
    chosen = np.float64(dequantize(quantized))
    np.testing.assert_allclose(np.abs(chosen - w), distance.min(1), atol=1e-5 * np.abs(w).max())
    assert {x.dtype for x in (quantized.value,)} == {jnp.dtype(f"int{bits}")}
    assert (quantized.zero is None) == symmetric
    np.testing.assert_array_equal(dequantize(quantize(np.zeros((3, 2)), bits=bits, symmetric=symmetric)), 0)


def test_asymmetric_values_lie_closer_where_a_channel_is_off_centre_and_never_clip():
    w = skewed((200, 8))
    quantized = quantize(w, symmetric=False)
    error = np.abs(np.float64(w) - dequantize(quantized))
    assert (error <= 0.5 * np.float64(quantized.scale) * (1 + 1e-4)).all()
    off_centre = np.abs(w) + 1
    assert np.mean((dequantize(quantize(off_centre, symmetric=False)) - off_centre) ** 2) < 0.4 * np.mean(
        (dequantize(quantize(off_centre)) - off_centre) ** 2
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_four_bits_take_the_range_of_least_squared_error(symmetric):
    w = skewed((3, 3, 16, 12), seed=1)
    quantized = quantize(w, bits=4, symmetric=symmetric)
    error = np.square(np.float64(dequantize(quantized)) - w).sum((0, 1, 2))
    low, high = LIMITS[4, symmetric]
    tried = []
    for ratio in 1 - np.arange(11) / 20:
        least = np.zeros(12) if symmetric else np.minimum(w.min((0, 1, 2)), 0) * ratio
        most = (np.abs(w) if symmetric else np.maximum(w, 0)).max((0, 1, 2)) * ratio
        exact = (most - least) / (high if symmetric else high - low)
        near = exact.astype(np.float16)
        scale = np.where(near < exact, np.nextafter(near, np.float16(np.inf)), near).astype(np.float64)
        zero = 0 if symmetric else np.round(low - least / scale)
        tried.append(np.square((np.clip(np.round(w / scale) + zero, low, high) - zero) * scale - w).sum((0, 1, 2)))
    np.testing.assert_allclose(error, np.min(tried, 0), rtol=1e-4)
    assert (error < tried[0]).all()


def test_half_the_range_is_taken_where_it_is_the_best_that_is_tried():
    """One outlier of 1 beside a thousand weights below 1/2."""
    w = np.append(np.linspace(-0.5, 0.5, 1000), 1.0).astype(np.float32)[:, None]
    np.testing.assert_allclose(quantize(w, bits=4).scale, 0.5 / 7, rtol=1e-3)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_a_weight_without_inputs_stays_without(bits, symmetric):
    quantized = quantize(jnp.zeros((0, 3)), bits=bits, symmetric=symmetric)
    assert dequantize(quantized).shape == (0, 3) and quantized.scale.tolist() == [0, 0, 0]


def test_bits_that_are_not_known_are_named():
    with pytest.raises(ValueError, match=r"^bits is 3: must be one of 4, 8$"):
        quantize(jnp.ones((2, 2)), bits=3)
