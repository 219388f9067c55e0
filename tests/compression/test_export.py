"""Exported models against the model itself, operation by operation, and files that must not be believed."""

import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from flax import linen as nn
from jax import lax

from fedrobust import models, ops
from fedrobust.compression import dequantize, fake_quantize_inputs, quantize
from fedrobust.compression.export import load_onnx, load_stablehlo, save_onnx, save_stablehlo
from fedrobust.compression.export.graph import Graph
from fedrobust.compression.export.rules import RULES

SHAPE = (6, 6, 4)
KERNEL = np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype(np.float32)
DENSE = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
NHWC = ("NHWC", "HWIO", "NHWC")


def images(size):
    return np.random.default_rng(size).uniform(size=(size, *SHAPE)).astype(np.float32)


def conv(x, w, **settings):
    return lax.conv_general_dilated(
        x, w, **{"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC} | settings
    )


def flat(x):
    return x.reshape(x.shape[0], -1)


def attention(p, x):
    tokens = x.reshape(x.shape[0], -1, 2, 2)
    weight = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", tokens, tokens))
    return flat(jnp.einsum("bhqk,bkhd->bqhd", weight, tokens))[:, :7] + p.sum()


# Each is `(params, image) -> logits`; the parameters are the kernel where it says so, else the matrix.
OPERATIONS = {
    "convolution": lambda p, x: flat(conv(x, KERNEL)),
    "strided": lambda p, x: flat(conv(x, KERNEL, window_strides=(2, 2), padding=((1, 0), (0, 2)))),
    "dilated kernel": lambda p, x: flat(conv(x, KERNEL, rhs_dilation=(2, 1))),
    "cropping": lambda p, x: flat(conv(x, KERNEL, padding=((-1, 0), (1, -1)))),
    "grouped": lambda p, x: flat(conv(x, KERNEL[:, :, :2], feature_group_count=2)),
    "depthwise": lambda p, x: flat(conv(x, KERNEL[:, :, :1], feature_group_count=4)),
    "transposed": lambda p, x: flat(lax.conv_transpose(x, KERNEL, (2, 2), "SAME", dimension_numbers=NHWC)),
    "channels first": lambda p, x: flat(
        lax.conv(jnp.transpose(x, (0, 3, 1, 2)), np.transpose(KERNEL, (3, 2, 0, 1)), (1, 1), "VALID")
    ),
    "max pooling": lambda p, x: flat(
        lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), (1, 0), (0, 0), (0, 0)))
    ),
    "mean pooling": lambda p, x: flat(nn.avg_pool(x, (2, 3), (1, 2), ((0, 1), (1, 0)))),
    "a token for each": lambda p, x: flat(
        jnp.concatenate([jnp.tile(p[None, :, 1:], (x.shape[0], 1, 1)), jnp.tile(x[:, 0, :4], (1, 1, 2))[..., :4]], 1)
    ),
    "attention": attention,
    "dense": lambda p, x: x.mean((1, 2)) @ p,
    "dense from the left": lambda p, x: lax.dot_general(x.mean((1, 2)), p.T, (((1,), (1,)), ((), ()))),
    "elementwise": lambda p, x: flat(
        jax.nn.gelu(x, approximate=False) + jax.nn.silu(x) - jnp.tanh(x) * lax.rsqrt(x + 1) / (jnp.exp(x) + x**3 + x**2)
    ),
    "more elementwise": lambda p, x: flat(
        jnp.log1p(x) + jnp.expm1(x) + jnp.exp2(x) + lax.erfc(x) + jnp.clip(x, 0.2, 0.7) + jnp.sign(x - 0.5) * jnp.abs(x)
    ),
    "rounding": lambda p, x: flat(jnp.round(5 * x) + jnp.floor(7 * x) - jnp.ceil(3 * x)),
    "choices": lambda p, x: flat(
        jnp.where((x > 0.5) & ~(x >= 0.9) | (x == 0.2), jax.nn.relu(x - 0.6), jnp.minimum(x, 0.3)) + (x != 0.1) * x
    ),
    "reductions": lambda p, x: jnp.stack(
        [x.sum((1, 2, 3)), x.max((1, 2, 3)), x.min((1, 2, 3)), x.prod((1, 2, 3)), flat(x).argmax(1).astype(float)], 1
    ),
    "a reduction of nothing": lambda p, x: flat(x.sum(()) + lax.reduce_max(x, ())),
    "truths": lambda p, x: jnp.stack([jnp.all(flat(x) > 0.01, 1), jnp.any(flat(x) > 0.99, 1)], 1).astype(float),
    "layout": lambda p, x: flat(
        jnp.concatenate([x[:, ::2], x[:, 1:4, :, ::-1], jnp.pad(x, ((0, 0), (0, 1), (0, 0), (2, 0)))[..., :4]], 1)
    ),
    "interior padding": lambda p, x: flat(lax.pad(x, 0.5, ((0, 0, 0), (1, 0, 2), (0, 1, 1), (0, 0, 0)))),
    "split": lambda p, x: flat(jnp.split(x, [1, 3], axis=3)[1]),
    "running sums": lambda p, x: flat(jnp.cumsum(x, axis=2)),
    "a batch that is folded": lambda p, x: (x.reshape(-1, 4) @ p).reshape(x.shape[0], 36, 5).max(1),
    "a batch that is spread": lambda p, x: jnp.concatenate([flat(x), jnp.ones((x.shape[0], 3)) * p[0, 0]], 1),
    "a constant beside the image": lambda p, x: x.mean((1, 2)) @ (p * jnp.arange(5.0) + jnp.eye(4, 5)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_in_onnxruntime_is_the_models_at_every_batch_size(tmp_path, name):
    apply = OPERATIONS[name]
    save_onnx(tmp_path / "m.onnx", apply, DENSE, image_shape=SHAPE, guarantee={})
    run = load_onnx(tmp_path / "m.onnx")
    for size in (1, 2, 7):
        expected = np.asarray(apply(DENSE, images(size)))
        found = run(images(size))
        assert found.shape == expected.shape and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def small_cnn():
    model = models.build("small_cnn", image_shape=(8, 8, 1), num_classes=3, width=16)
    image = np.random.default_rng(0).uniform(size=(9, 8, 8, 1)).astype(np.float32)
    return model.apply, model.init(jax.random.key(0), image[:1]), image


def test_a_model_with_int8_weights_runs_with_the_values_they_stand_for(tmp_path, small_cnn):
    apply, params, image = small_cnn
    apply = jax.jit(apply)
    settings = {"image_shape": image.shape[1:], "guarantee": {"epsilon": 3.0}}
    whole = save_onnx(tmp_path / "float.onnx", apply, params, **settings)
    few = save_onnx(tmp_path / "int8.onnx", apply, quantize(params), **settings)
    np.testing.assert_allclose(load_onnx(tmp_path / "float.onnx")(image), apply(params, image), atol=1e-5)
    dequantized = apply(dequantize(quantize(params)), image)
    np.testing.assert_allclose(load_onnx(tmp_path / "int8.onnx")(image), dequantized, atol=1e-5)
    assert np.abs(dequantized - apply(params, image)).max() > 1e-4
    assert few < 0.5 * whole and few == (tmp_path / "int8.onnx").stat().st_size
    stored = onnx.load(tmp_path / "int8.onnx")
    weights = [t for t in stored.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert sum(np.prod(t.dims) for t in weights) == sum(x.size for x in jax.tree.leaves(params) if x.ndim >= 2)
    assert json.loads({p.key: p.value for p in stored.metadata_props}["guarantee"]) == {"epsilon": 3.0}


@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (4, True), (4, False)])
def test_every_kind_of_few_bits_runs_with_the_values_it_stands_for(tmp_path, bits, symmetric):
    def apply(p, x):
        return conv(x, p["kernel"]).mean((1, 2)) @ p["dense"] + p["bias"]

    params = {"kernel": KERNEL + 0.5, "dense": np.tile(DENSE, (2, 1)), "bias": DENSE[0]}
    few = quantize(params, bits=bits, symmetric=symmetric)
    save_onnx(tmp_path / "m.onnx", apply, few, image_shape=SHAPE, guarantee={})
    expected = np.asarray(apply(dequantize(few), images(5)))
    np.testing.assert_allclose(load_onnx(tmp_path / "m.onnx")(images(5)), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - apply(params, images(5))).max() > 1e-3


def test_the_other_operand_of_a_wide_product_is_not_rounded(tmp_path):
    """onnxruntime would, with a weight of 8 bits that is dequantized right before it."""
    wide = quantize(np.random.default_rng(2).normal(size=(144, 64)).astype(np.float32))
    apply = lambda p, x: flat(x) @ p  # noqa: E731
    save_onnx(tmp_path / "m.onnx", apply, wide, image_shape=SHAPE, guarantee={})
    np.testing.assert_allclose(load_onnx(tmp_path / "m.onnx")(images(5)), apply(dequantize(wide), images(5)), atol=1e-4)


def test_a_rounded_input_is_what_quantize_linear_says(tmp_path):
    scale, zero_point = 0.01, -100  # [-0.28, 2.27] in steps of 0.01
    ranges = {0: (scale, zero_point)}
    apply = lambda p, x: x.mean((1, 2)) @ p  # noqa: E731
    save_onnx(tmp_path / "m.onnx", apply, DENSE, image_shape=SHAPE, guarantee={}, ranges=ranges)
    mean = images(4).mean((1, 2))
    steps = np.clip(np.round(mean / scale) + zero_point, -128, 127)
    np.testing.assert_allclose(
        load_onnx(tmp_path / "m.onnx")(images(4)), (steps - zero_point) * scale @ DENSE, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("apply", "kernel"),
    [
        (lambda p, x: flat(conv(x, p)), KERNEL),
        (lambda p, x: flat(jnp.einsum("bhwi,iog->bhwog", x, p)), KERNEL[0, :2].transpose(1, 0, 2)),
    ],
)
def test_the_input_of_every_kind_of_layer_is_rounded(tmp_path, apply, kernel):
    ranges = {0: (0.05, -100)}  # 20 steps from 0 to 1
    save_onnx(tmp_path / "m.onnx", apply, kernel, image_shape=SHAPE, guarantee={}, ranges=ranges)
    expected = fake_quantize_inputs(apply, ranges)(kernel, images(3))
    np.testing.assert_allclose(load_onnx(tmp_path / "m.onnx")(images(3)), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - apply(kernel, images(3))).max() > 0.01


def test_weights_that_look_like_a_digest_are_left_alone(tmp_path):
    """The bytes of zeros, written as text, which stand in the digest's place while it is taken."""
    odd = np.frombuffer(b"0" * 80, np.float32).reshape(4, 5)
    save_onnx(tmp_path / "m.onnx", lambda p, x: x.mean((1, 2)) @ p, odd, image_shape=SHAPE, guarantee={})
    np.testing.assert_allclose(load_onnx(tmp_path / "m.onnx")(images(2)), images(2).mean((1, 2)) @ odd, rtol=1e-4)


def test_equal_bytes_of_two_dtypes_are_two_tensors():
    graph = Graph(RULES, "image")
    names = [graph.store(np.zeros(2, dtype)) for dtype in (np.int32, np.float32, np.int32)]
    assert names[0] == names[2] != names[1]


def test_stablehlo_runs_without_the_model_at_every_batch_size(tmp_path):
    apply = lambda p, x: flat(ops.max_pool(ops.conv(x, p), (2, 2)))  # noqa: E731
    size = save_stablehlo(tmp_path / "m", apply, KERNEL, image_shape=SHAPE, guarantee={"epsilon": 3.0})
    assert size == (tmp_path / "m").stat().st_size
    exported = jax.export.deserialize(bytearray((tmp_path / "m").read_bytes().split(b"\n", 2)[2]))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    run = load_stablehlo(tmp_path / "m")
    for num in (1, 9):
        np.testing.assert_allclose(run(images(num)), apply(KERNEL, images(num)), atol=1e-5)


@pytest.mark.parametrize(("save", "load"), [(save_onnx, load_onnx), (save_stablehlo, load_stablehlo)])
def test_a_file_that_is_not_whole_or_not_ours_is_refused(tmp_path, save, load):
    path = tmp_path / "m"
    save(path, lambda p, x: x.mean((1, 2)) @ p, DENSE, image_shape=SHAPE, guarantee={"epsilon": 3.0})
    data = path.read_bytes()
    place = data.index(DENSE.tobytes()[:8])
    np.savez(tmp_path / "other.npz", DENSE)
    damaged = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "foreign": (tmp_path / "other.npz").read_bytes(),
        "one bit": data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
        "another guarantee": data.replace(b'"epsilon":3.0', b'"epsilon":1.0'),
    }
    load(path)
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^{tmp_path / name}: damaged, or not an? \w+ file"):
            load(tmp_path / name)


def test_an_operation_that_onnx_does_not_have_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^apply has the operation 'sort': "):
        save_onnx(tmp_path / "m", lambda p, x: jnp.sort(flat(x), 1) + p[0, 0], DENSE, image_shape=SHAPE, guarantee={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("apply", [lambda p, x: x.mean((1, 2, 3)), lambda p, x: x.mean((0, 1, 2))[None] @ p])
def test_logits_of_another_shape_are_refused(tmp_path, apply):
    with pytest.raises(
        ValueError, match=r"^apply has logits of \d axes that are not \[B,L\]: cannot be written as ONNX$"
    ):
        save_onnx(tmp_path / "m", apply, DENSE, image_shape=SHAPE, guarantee={})
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_differs_in_onnxruntime_is_not_written(tmp_path):
    """One over the batch size is a constant at each size at which the model is read."""
    with pytest.raises(RuntimeError, match=r"onnxruntime's logits differ by"):
        save_onnx(tmp_path / "m", lambda p, x: x.mean((1, 2)) @ p / x.shape[0], DENSE, image_shape=SHAPE, guarantee={})
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_no_numbers_is_not_written(tmp_path):
    with pytest.raises(RuntimeError, match=r"onnxruntime's logits differ by nan"):
        save_onnx(tmp_path / "m", lambda p, x: jnp.log(x.mean((1, 2)) - 2) @ p, DENSE, image_shape=SHAPE, guarantee={})
    assert list(tmp_path.iterdir()) == []


def test_ranges_of_another_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^ranges is \[99\]"):
        save_onnx(
            tmp_path / "m",
            lambda p, x: x.mean((1, 2)) @ p,
            DENSE,
            image_shape=SHAPE,
            guarantee={},
            ranges={99: (1.0, 0)},
        )
