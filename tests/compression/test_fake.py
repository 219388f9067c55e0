import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import ops
from fedrobust.compression import (
    calibrate,
    dequantize,
    fake_quantize,
    fake_quantize_inputs,
    integer_apply,
    quantize,
)

KINDS = [(8, True), (4, False)]
RNG = np.random.default_rng(0)


@pytest.mark.optimized
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_values_are_those_that_are_served_to_the_bit_and_the_slope_is_one(bits, symmetric):
    params = {"w": RNG.normal(size=(30, 7)).astype(np.float32), "b": RNG.normal(size=7).astype(np.float32)}
    served = dequantize(quantize(params, bits=bits, symmetric=symmetric))

    @jax.jit
    def value_and_slope(params):
        return jax.vjp(lambda p: fake_quantize(p, bits=bits, symmetric=symmetric), params)

    found, transpose = value_and_slope(params)
    jax.tree.map(np.testing.assert_array_equal, found, served)
    assert not np.array_equal(found["w"], params["w"])
    jax.tree.map(np.testing.assert_array_equal, transpose(params)[0], params)


def test_per_example_gradients_are_those_at_the_rounded_weights_and_see_their_own_example_only():
    x, y = RNG.normal(size=(3, 6)).astype(np.float32), RNG.normal(size=(3, 2)).astype(np.float32)
    params = {"w": RNG.normal(size=(6, 2)).astype(np.float32), "b": RNG.normal(size=2).astype(np.float32)}

    def plain(params, x, y):
        return jnp.sum(jnp.square(jnp.tanh(x @ params["w"] + params["b"]) - y))

    def aware(params, x, y):
        return plain(fake_quantize(params, bits=4), x, y)

    def gradients(loss, params, x):
        return jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0)))(params, x, y)

    found, moved = gradients(aware, params, x), gradients(aware, params, x * np.float32([[1], [2], [1]]))
    expected = gradients(plain, dequantize(quantize(params, bits=4)), x)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(found[name][::2], moved[name][::2])
        assert np.abs(found[name][1] - moved[name][1]).max() > 1e-3


def test_weights_trained_with_the_rounding_serve_better_than_weights_rounded_after():
    x = RNG.normal(size=(256, 24)) + 3 * RNG.normal(size=(256, 1))  # features go together: errors can make up
    y = x @ RNG.normal(size=(24, 8))
    best = {"w": jnp.asarray(np.linalg.lstsq(x, y)[0], jnp.float32)}

    def error(params):
        return jnp.mean(jnp.square(x.astype(np.float32) @ params["w"] - y.astype(np.float32)))

    def served(params):
        return float(error(dequantize(quantize(params, bits=4))))

    gradient = jax.jit(jax.grad(lambda p: error(fake_quantize(p, bits=4))))
    params = best
    for i in range(200):
        params = jax.tree.map(lambda w, g, i=i: w - 0.01 * (1 - i / 200) * g, params, gradient(params))
    assert served(params) < 0.5 * served(best)


NET = {
    "conv": RNG.normal(size=(3, 3, 2, 8)) / 4,
    "gain": 1 + RNG.normal(size=8) / 9,
    "dense": RNG.normal(size=(128, 3)) / 9,
}
IMAGE = RNG.normal(size=(20, 4, 4, 2)).astype(np.float32)


def net(params, image):
    x = jax.nn.relu(ops.group_norm(ops.conv(image, params["conv"]), 2) * params["gain"])
    return x.reshape(len(x), -1) @ params["dense"]


@pytest.mark.optimized
@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_with_rounded_inputs_it_says_what_the_integers_say(bits, symmetric):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), NET)
    quantized = quantize(params, bits=bits, symmetric=symmetric)
    ranges = calibrate(net, dequantize(quantized), IMAGE, percentile=98.0)
    aware = fake_quantize_inputs(net, ranges)
    found = jax.jit(lambda p: aware(fake_quantize(p, bits=bits, symmetric=symmetric), IMAGE))(params)
    expected = jax.jit(integer_apply(net, ranges))(quantized, IMAGE)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found - net(dequantize(quantized), IMAGE)).max() > 1e-2  # what rounding and clipping change
    np.testing.assert_array_equal(fake_quantize_inputs(net, {})(params, IMAGE), net(params, IMAGE))


def test_slopes_are_those_of_the_rounded_inputs_inside_the_range_and_none_outside():
    x = RNG.uniform(-1, 3, size=(5, 6)).astype(np.float32)
    w, y = RNG.normal(size=(6, 2)).astype(np.float32), RNG.normal(size=(5, 2)).astype(np.float32)
    ranges = calibrate(lambda w, x: x @ w, w, np.clip(x, -0.5, 2))
    ((scale, zero),) = ranges.values()
    aware = fake_quantize_inputs(lambda w, x: x @ w, ranges)
    of_w, of_x = jax.grad(lambda w, x: jnp.sum(aware(w, x) * y), argnums=(0, 1))(w, x)
    rounded = scale * (np.clip(np.round(x / scale) + zero, -128, 127) - zero)
    inside = (x > -0.5) & (x < 2)
    assert 5 < inside.sum() < 30
    np.testing.assert_allclose(of_w, rounded.T @ y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, np.where(inside, y @ w.T, 0), rtol=1e-5, atol=1e-5)


def test_what_lies_on_the_ends_of_a_range_keeps_its_slope():
    x = jnp.asarray([[-130.0, -128.0, 5.0, 127.0, 129.0]])
    aware = fake_quantize_inputs(lambda w, x: x @ w, {0: (1.0, 0)})
    slope = jax.grad(lambda x: jnp.sum(aware(jnp.ones((5, 1)), x)))(x)
    assert slope.tolist() == [[0, 1, 1, 1, 0]]


def test_weights_trained_with_clipped_inputs_serve_better_than_weights_that_never_saw_them():
    x = RNG.normal(size=(256, 8)) ** 3  # long tails
    y = x @ RNG.normal(size=(8, 4))
    best = jnp.asarray(np.linalg.lstsq(x, y)[0], jnp.float32)
    x, y = x.astype(np.float32), y.astype(np.float32)
    apply = lambda w, x: x @ w  # noqa: E731
    ranges = calibrate(apply, best, x, percentile=90.0)
    aware = fake_quantize_inputs(apply, ranges)

    def served(w):
        return float(jnp.mean(jnp.square(integer_apply(apply, ranges)(quantize(w), x) - y)))

    gradient = jax.jit(jax.grad(lambda w: jnp.mean(jnp.square(aware(fake_quantize(w), x) - y))))
    w = best
    for _ in range(200):
        w = w - 0.1 * gradient(w)
    assert served(w) < 0.8 * served(best)


def test_ranges_of_another_model_are_named():
    with pytest.raises(ValueError, match=r"^ranges is \[99\]: must be of the 1 layers"):
        fake_quantize_inputs(lambda w, x: x @ w, {99: (1.0, 0)})(jnp.ones((2, 2)), jnp.ones((1, 2)))


def test_bits_that_are_not_known_are_named():
    with pytest.raises(ValueError, match=r"^bits is 2: must be one of 4, 8$"):
        fake_quantize(jnp.ones((2, 2)), bits=2)
