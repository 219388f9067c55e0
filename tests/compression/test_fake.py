import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.compression import dequantize, fake_quantize, quantize

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


def test_bits_that_are_not_known_are_named():
    with pytest.raises(ValueError, match=r"^bits is 2: must be one of 4, 8$"):
        fake_quantize(jnp.ones((2, 2)), bits=2)
