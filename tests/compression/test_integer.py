"""The sums of a layer are those of NumPy's int64; a model of such layers says what its float twin says, almost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedrobust import ops, trace
from fedrobust.compression import calibrate, dequantize, integer_apply, quantize
from fedrobust.compression.integer import Layer, accumulate
from fedrobust.compression.ranges import integer_layers
from fedrobust.evaluation import gate
from fedrobust.ops import _cpu
from fedrobust.types import Dataset

RNG = np.random.default_rng(0)


def convolution(strides=(1, 1), padding=((0, 0), (0, 0)), holes=(1, 1), dilation=(1, 1), groups=1):
    def apply(w, x):
        return lax.conv_general_dilated(
            x, w, strides, padding, holes, dilation, ("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    return apply


def layer_of(apply, w, x, scale, zero):
    program = trace.read(apply, w, x)
    ((equation, leaf),) = integer_layers(program, 1)
    assert leaf == 0
    return Layer(equation, scale, zero)


def integers(x, scale, zero):
    return np.clip(np.round(x.astype(np.float32) * np.float32(1 / np.float32(scale))) + zero, -128, 127).astype(
        np.int64
    )


def loops(q, w, zero, strides=(1, 1), padding=((0, 0), (0, 0)), holes=(1, 1), dilation=(1, 1), groups=1):
    """Sums of q [B,H,W,C] and w [a,b,C/groups,O] whose zero is gone, int64; padding and holes are the zero point."""
    batch, *sizes, channels = q.shape
    spread = np.full((batch, *[(n - 1) * h + 1 for n, h in zip(sizes, holes, strict=True)], channels), zero, np.int64)
    spread[:, :: holes[0], :: holes[1]] = q
    padded = np.pad(spread, ((0, 0), *padding, (0, 0)), constant_values=zero) - zero
    windows = [(n - 1) * d + 1 for n, d in zip(w.shape[:2], dilation, strict=True)]
    steps = [(n - k) // s + 1 for n, k, s in zip(padded.shape[1:3], windows, strides, strict=True)]
    out = np.zeros((batch, *steps, w.shape[-1]), np.int64)
    for i, j in np.ndindex(*steps):
        rows, columns = (
            slice(p * s, p * s + k, d) for p, s, k, d in zip((i, j), strides, windows, dilation, strict=True)
        )
        patch = padded[:, rows, columns]
        for o in range(w.shape[-1]):
            group = o // (w.shape[-1] // groups) * w.shape[2]
            out[:, i, j, o] = (patch[..., group : group + w.shape[2]] * w[..., o]).sum((1, 2, 3))
    return out


GEOMETRIES = {
    "valid": {},
    "strided, padded": {"strides": (2, 1), "padding": ((1, 2), (0, 1))},
    "dilated": {"dilation": (2, 2), "padding": ((2, 2), (1, 0))},
    "transposed": {"holes": (2, 3), "padding": ((2, 1), (2, 2))},
    "grouped": {"groups": 2, "padding": ((1, 1), (1, 1))},
}


CASES = [*((name, 8, False) for name in GEOMETRIES), ("strided, padded", 4, True)]


@pytest.mark.parametrize("arithmetic", ["float32", "int8"])
@pytest.mark.parametrize(("geometry", "bits", "symmetric"), CASES)
def test_the_sums_of_a_convolution_are_those_of_int64(geometry, bits, symmetric, arithmetic):
    settings = GEOMETRIES[geometry]
    x, w = 3 * RNG.normal(size=(2, 5, 6, 4)), RNG.normal(size=(3, 2, 4 // settings.get("groups", 1), 6)) + 0.5
    quantized = quantize(jnp.asarray(w, jnp.float32), bits=bits, symmetric=symmetric)
    layer = layer_of(convolution(**settings), jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32), 0.015, -37)
    found = accumulate(layer, jnp.asarray(x, jnp.float32), quantized.value, quantized.zero, arithmetic=arithmetic)
    weight = np.asarray(quantized.value.astype(jnp.int8), np.int64) - (0 if symmetric else np.int64(quantized.zero))
    q = integers(x, 0.015, -37)
    assert q.min() == -128 and q.max() == 127  # both ends clip
    np.testing.assert_array_equal(np.int64(found), loops(q, weight, -37, **settings))


@pytest.mark.parametrize("arithmetic", ["float32", "int8"])
@pytest.mark.parametrize("equation", ["bi,io->bo", "bti,iho->btho", "abi,aio->bo"])
def test_the_sums_of_a_matrix_product_are_those_of_int64(equation, arithmetic):
    shapes = {"a": 2, "b": 3, "t": 2, "i": 5, "o": 4, "h": 3}
    left, right = ([shapes[c] for c in part] for part in equation.partition("->")[0].split(","))
    x, w = RNG.normal(size=left), jnp.asarray(RNG.normal(size=right), jnp.float32)
    quantized = quantize(w, symmetric=False)
    layer = layer_of(lambda w, x: jnp.einsum(equation, x, w), w, jnp.asarray(x, jnp.float32), 0.02, 5)
    found = accumulate(layer, jnp.asarray(x, jnp.float32), quantized.value, quantized.zero, arithmetic=arithmetic)
    weight = np.int64(quantized.value) - np.int64(quantized.zero)
    np.testing.assert_array_equal(np.int64(found), np.einsum(equation, integers(x, 0.02, 5) - 5, weight))


def test_sums_beyond_24_bits_are_exact_too():
    """Float32 alone loses the last bit there; the bound is met by the largest values that there are."""
    x = np.where(np.arange(700) % 3 == 0, 126.0, 127.0)[None]
    w = jnp.asarray(np.where(np.arange(700)[:, None] % 2 == 0, [[127.0, 127.0]], [[126.0, -127.0]]), jnp.float32)
    layer = layer_of(lambda w, x: x @ w, w, jnp.asarray(x, jnp.float32), 1.0, -128)
    q = integers(x, 1.0, -128) + 128
    expected = q @ np.int64(w)
    value = w.astype(jnp.int8)
    exact = accumulate(layer, jnp.asarray(x, jnp.float32), value, None, arithmetic="int8")
    np.testing.assert_array_equal(exact, expected)
    wide = quantize(jnp.asarray(RNG.normal(size=(9, 9, 8, 2)), jnp.float32), symmetric=False)
    big = np.asarray(RNG.uniform(size=(1, 9, 9, 8)), np.float32)
    layer = layer_of(convolution(), jnp.zeros((9, 9, 8, 2)), jnp.asarray(big), 1 / 255, -128)
    exact = loops(integers(big, 1 / 255, -128), np.int64(wide.value) - np.int64(wide.zero), -128)
    for straight in (False, True):
        found = accumulate(layer, jnp.asarray(big), wide.value, wide.zero, straight_through=straight)
        np.testing.assert_array_equal(found, exact.astype(np.float32))
    assert 9 * 9 * 8 * 255 * 255 > 2**24


@pytest.mark.parametrize("zero", [-128, 127])
def test_sums_of_the_largest_differences_from_both_zero_points_are_exact(zero):
    """Up to 255 * 255 a product, four times as much as of values alone: 258 of them fit in float32."""
    q, value = RNG.integers(50, 128, size=(2, 700)), RNG.integers(50, 128, size=(700, 16))
    q = q if zero < 0 else -q
    low = jnp.full(16, -128, jnp.int8)
    layer = layer_of(lambda w, x: x @ w, jnp.zeros((700, 16)), jnp.zeros((2, 700)), 1.0, zero)
    found = accumulate(layer, jnp.asarray(q - zero, jnp.float32), jnp.asarray(value, jnp.int8), low)
    expected = (q - zero) @ (value + 128)
    assert np.abs(expected).max() > 2**24
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_the_straight_through_slope_of_a_sum_in_parts_is_that_of_all_parts():
    value = jnp.asarray(RNG.integers(-127, 128, size=(700, 2)), jnp.int8)
    layer = layer_of(lambda w, x: x @ w, jnp.zeros((700, 2)), jnp.zeros((1, 700)), 0.5, -128)
    total = lambda x: accumulate(layer, x, value, None, straight_through=True)[0, 0]  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.full((1, 700), 9.0))[0], 2.0 * np.int64(value[:, 0]))


def test_a_grouped_convolution_that_float32_cannot_hold_is_refused_and_int8_does_it():
    quantized = quantize(jnp.asarray(RNG.normal(size=(9, 9, 8, 2)), jnp.float32))
    x = jnp.asarray(RNG.uniform(size=(1, 9, 9, 16)), jnp.float32)
    layer = layer_of(convolution(groups=2), jnp.zeros((9, 9, 8, 2)), x, 1 / 255, -128)
    with pytest.raises(ValueError, match=r"^a sum in float32 is \d+: must be at most 16777216, or a sum over groups"):
        accumulate(layer, x, quantized.value, None)
    exact = loops(integers(np.asarray(x), 1 / 255, -128), np.int64(quantized.value), -128, groups=2)
    np.testing.assert_array_equal(accumulate(layer, x, quantized.value, None, arithmetic="int8"), exact)


def test_a_percentile_cuts_both_ends():
    x = RNG.normal(size=(50, 1, 1, 20)).astype(np.float32)
    flat = lambda w, x: x.reshape(len(x), -1) @ w  # noqa: E731
    ((scale, zero),) = calibrate(flat, jnp.ones((20, 1)), x, percentile=90.0).values()
    low, high = np.percentile(x, [10, 90])
    np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-5)
    assert zero == round(-128 - low / scale)


def test_what_is_no_layer_of_an_image_and_a_kernel_stays_float32():
    """A product of two parameters, kernels of their own for parts of the image, groups of examples."""
    params = {
        "a": jnp.ones((4, 3)),
        "b": jnp.ones((3, 2)),
        "own": jnp.ones((2, 2, 3)),
        "groups": jnp.ones((2, 2, 1, 2)),
    }
    image = IMAGE[:, :2, :2]

    def apply(p, x):
        both = x.reshape(len(x), -1) @ (p["a"] @ p["b"])
        rows = jnp.einsum("hbw,hwo->hbo", jnp.swapaxes(x[..., 0], 0, 1), p["own"])
        halves = lax.conv_general_dilated(
            x, p["groups"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), batch_group_count=2
        )
        return both + jnp.sum(rows) + jnp.sum(halves)

    assert calibrate(apply, params, image) == {}


def test_more_products_than_32_bits_hold_are_refused():
    w = jnp.zeros((33026, 1))
    layer = layer_of(lambda w, x: x @ w, w, jnp.zeros((1, 33026)), 1.0, 0)
    with pytest.raises(ValueError, match="the number of products in a sum is 33026: must be at most 33025"):
        accumulate(layer, jnp.zeros((1, 33026)), w.astype(jnp.int8), None)


PARAMS = {
    "conv": jnp.asarray(RNG.normal(size=(3, 3, 1, 8)) / 3, jnp.float32),
    "gain": jnp.asarray(1 + RNG.normal(size=8) / 9, jnp.float32),
    "dense": jnp.asarray(RNG.normal(size=(128, 3)) / 9, jnp.float32),
    "odd": jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32),
}
IMAGE = jnp.asarray(RNG.uniform(size=(40, 8, 8, 1)), jnp.float32)


def net(params, image):
    x = jax.nn.relu(ops.group_norm(ops.conv(image, params["conv"]), 2) * params["gain"])
    x = jnp.mean(x.reshape(len(x), 4, 2, 4, 2, 8), (2, 4)).reshape(len(x), -1) @ params["dense"]
    return x + 0.1 * x @ params["odd"].T  # its last axis is summed over: this one stays float32


def test_ranges_are_those_of_the_inputs_of_each_layer_and_hold_zero():
    ranges = calibrate(net, PARAMS, IMAGE + 0.25)
    layers = integer_layers(trace.read(net, PARAMS, IMAGE), len(PARAMS))
    assert [equation.name for equation, _ in layers] == ["conv_general_dilated", "dot_general"]
    assert list(ranges) == [0, 1]
    (scale, zero), (_, inner_zero) = ranges.values()
    np.testing.assert_allclose(scale, float((IMAGE + 0.25).max()) / 255, rtol=1e-6)
    assert (zero, inner_zero) == (-128, -128)  # nothing is negative
    narrow = calibrate(net, PARAMS, IMAGE + 0.25, percentile=99.0)
    assert all(narrow[i][0] < ranges[i][0] for i in ranges)
    assert list(calibrate(net, PARAMS, IMAGE[:2]).keys()) == list(ranges)  # of any batch
    ((scale, zero),) = calibrate(
        lambda w, x: x.reshape(len(x), -1) @ w, jnp.ones((4, 1)), IMAGE[:, :2, :2] - 2
    ).values()
    assert zero == 127 and scale > 1 / 255  # [-2, -1] widened to 0
    assert list(calibrate(lambda w, x: x[:, 0, 0] @ w, jnp.ones((1, 1)), 0 * IMAGE).values()) == [(1.0, 0)]


@pytest.mark.optimized
def test_the_integer_model_says_what_the_float_one_says():
    quantized = quantize(PARAMS)
    ranges = calibrate(net, dequantize(quantized), IMAGE)
    expected = jax.jit(net)(dequantize(quantized), IMAGE)
    found = jax.jit(integer_apply(net, ranges))(quantized, IMAGE)
    assert 0 < np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    for other in (integer_apply(net, ranges, straight_through=True), integer_apply(net, ranges, arithmetic="int8")):
        np.testing.assert_array_equal(jax.jit(other)(quantized, IMAGE), found)
    (first, *_) = ranges
    partly = jax.jit(integer_apply(net, {first: ranges[first]}))(quantized, IMAGE)
    assert 0 < np.abs(partly - expected).max() < np.abs(found - expected).max()


@pytest.mark.optimized
@pytest.mark.parametrize("straight_through", [False, True])
def test_sums_over_many_channels_stay_exact_where_fewer_products_would_do(monkeypatch, straight_through):
    monkeypatch.setattr(_cpu, "_is_one_of_several", lambda: True)
    apply = convolution(padding=((1, 1), (1, 1)))
    quantized = quantize(jnp.asarray(RNG.uniform(0.7, 1, (3, 3, 64, 64)), jnp.float32))
    image = jnp.asarray(RNG.uniform(0.7, 1, (4, 6, 5, 64)), jnp.float32).at[0, 0, 0, 0].set(-1)  # 64 channels at once
    ranges = calibrate(apply, dequantize(quantized), image)
    exact = jax.jit(integer_apply(apply, ranges, arithmetic="int8"))(quantized, image)
    model = integer_apply(apply, ranges, straight_through=straight_through)
    found = jax.jit(lambda x: trace.fast_inference(lambda x: model(quantized, x))(x))(image)
    np.testing.assert_array_equal(found, exact)


def with_token(params, image):
    """A token of its own before the patches, as in a ViT; its broadcast over one image is none."""
    patches = image.reshape(len(image), 8, 8)
    tokens = jnp.concatenate([jnp.broadcast_to(params["token"], (len(image), 1, 8)), patches], 1)
    return jax.nn.relu(tokens @ params["mix"])[:, 0] @ params["head"] + patches.mean(1) @ params["mix"][:, :3]


def test_one_image_is_computed_as_it_is_among_others():
    params = {
        name: jnp.asarray(RNG.normal(size=size), jnp.float32)
        for name, size in {"token": (1, 1, 8), "mix": (8, 16), "head": (16, 3)}.items()
    }
    many, one = (trace.read(with_token, params, IMAGE[:num]) for num in (40, 1))
    assert len(one.equations) < len(many.equations)
    quantized = quantize(params)
    model = jax.jit(integer_apply(with_token, calibrate(with_token, dequantize(quantized), IMAGE)))
    found = np.concatenate([model(quantized, IMAGE[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(found, model(quantized, IMAGE)[:8], rtol=1e-5, atol=1e-5)


def flat(params, image):
    return jax.nn.relu((image - 0.5).reshape(len(image), -1) @ params[0]) @ params[1]


def test_the_gate_sees_the_rounding_and_the_straight_through_slope_is_a_way_around_it():
    params = [jnp.asarray(RNG.normal(size=shape) / 8, jnp.float32) for shape in ((64, 32), (32, 3))]
    quantized = quantize(params)
    rounded = dequantize(quantized)
    ranges = calibrate(flat, rounded, IMAGE)
    data = Dataset(IMAGE, np.asarray(flat(params, IMAGE)).argmax(1), 3)
    expected = jax.grad(lambda x: jnp.sum(flat(rounded, x)[:, 0]))(IMAGE)
    verdicts = {}
    for straight in (False, True):
        model = integer_apply(flat, ranges, straight_through=straight)
        checks = gate(model, quantized, data, None, jax.random.key(0), 40, norm="linf", eps=0.1)
        verdicts[straight] = {check["check"]: check for check in checks}
        slope = jax.jit(jax.grad(lambda x, m=model: jnp.sum(m(quantized, x)[:, 0])))(IMAGE)
        if straight:
            assert np.sum((slope - expected) ** 2) < 0.02 * np.sum(expected**2)
        else:
            assert not slope.any()
    for name in ("no_gradient_is_zero", "gradient_path_is_whole", "gradient_predicts_differences"):
        assert (verdicts[False][name]["outcome"], verdicts[True][name]["outcome"]) == ("failed", "passed"), name
    assert "round" in verdicts[False]["gradient_path_is_whole"]["detail"]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"^arithmetic is 'int4'"):
        integer_apply(net, {}, arithmetic="int4")
    with pytest.raises(ValueError, match=r"^arithmetic is 'int8': must be float32, for derivatives$"):
        integer_apply(net, {}, arithmetic="int8", straight_through=True)
    with pytest.raises(ValueError, match=r"^ranges is \[999\]: must be of the 2 layers$"):
        integer_apply(net, {999: (1.0, 0)})(quantize(PARAMS), IMAGE)
    with pytest.raises(ValueError, match=r"^percentile is 50: must be in \(50, 100\]$"):
        calibrate(net, PARAMS, IMAGE, percentile=50)
    with pytest.raises(ValueError, match="a layer's input"):
        calibrate(net, PARAMS, IMAGE * np.nan)
    with pytest.raises(ValueError, match="the number of images is 0"):
        calibrate(net, PARAMS, IMAGE[:0])
