import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fedrobust import models, trees
from fedrobust.compression import (
    Quantized,
    artifact,
    calibrate,
    dequantize,
    find_channels,
    guarantee,
    integer_apply,
    load,
    masks,
    quantize,
    save,
    shrink,
    stored,
)

IMAGE = jax.random.uniform(jax.random.key(7), (3, 8, 8, 1))
PROMISE = {"epsilon": 8.0, "delta": 1e-4, "unit": "record"}


class Case:
    def __init__(self, name="small_cnn", sparsity=0.5, **options):
        model = models.build(name, image_shape=(8, 8, 1), num_classes=2, **options)
        self.apply = model.apply
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32), shapes)
        self.channels = find_channels(self.apply, self.params, IMAGE[:1])
        self.masks = masks(self.channels, self.params, sparsity=sparsity)
        self.small, self.small_apply = shrink(self.apply, self.channels, self.params, self.masks)
        self.quantized = quantize(self.small)

    def save(self, path):
        return save(path, self.quantized, channels=self.channels, masks=self.masks, guarantee=PROMISE)


@pytest.fixture(scope="module")
def case():
    return Case(width=8)


def test_the_model_from_the_file_is_bit_equal_to_the_quantized_one(case, tmp_path):
    path = tmp_path / "model.safetensors"
    size = case.save(path)
    assert size == path.stat().st_size
    shapes = jax.eval_shape(lambda p: p, case.params)
    params, apply = load(path, case.apply, shapes, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, params, dequantize(case.quantized))
    np.testing.assert_array_equal(apply(params, IMAGE), case.small_apply(dequantize(case.quantized), IMAGE))
    assert guarantee(path) == PROMISE


def test_the_dense_model_comes_back_bit_equal(case, tmp_path):
    path = tmp_path / "dense.safetensors"
    size = save(path, case.params, guarantee={})
    params, apply = load(path, case.apply, case.params, IMAGE[:1])
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    assert apply is case.apply
    assert 4 * trees.size(case.params) < size < 4 * trees.size(case.params) + 2000
    assert guarantee(path) == {}


def test_a_pruned_float_model_and_a_quantized_full_model_come_back(case, tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, case.small, channels=case.channels, masks=case.masks, guarantee={})
    params, apply = load(path, case.apply, case.params, IMAGE[:1])
    np.testing.assert_array_equal(apply(params, IMAGE), case.small_apply(case.small, IMAGE))
    save(path, quantize(case.params), guarantee={})
    params, _ = load(path, case.apply, case.params, IMAGE[:1])
    jax.tree.map(np.testing.assert_array_equal, params, dequantize(quantize(case.params)))


@pytest.mark.parametrize(
    ("name", "options"), [("small_cnn", {"width": 24}), ("resnet9", {"width": 8, "scale_norm": True})]
)
def test_half_the_channels_in_eight_bits_take_a_twelfth_of_the_bytes(name, options, tmp_path):
    case = Case(name, **options)
    assert 30_000 < trees.size(case.params) < 45_000
    dense = save(tmp_path / "dense", case.params, guarantee={})
    assert dense / case.save(tmp_path / "small") >= 12


def test_four_bits_with_zero_points_come_back_from_their_file(case, tmp_path):
    path = tmp_path / "model"
    quantized = quantize(case.small, bits=4, symmetric=False)
    size = save(path, quantized, channels=case.channels, masks=case.masks, guarantee={})
    params, _ = load(path, case.apply, case.params, IMAGE[:1])
    jax.tree.map(np.testing.assert_array_equal, params, dequantize(quantized))
    assert size == path.stat().st_size


def test_a_model_with_rounded_activations_comes_back_as_the_integer_model(case, tmp_path):
    path = tmp_path / "model.safetensors"
    shrunk = {"channels": case.channels, "masks": case.masks, "guarantee": {}}
    ranges = calibrate(case.small_apply, dequantize(case.quantized), IMAGE)
    bare = save(path, case.quantized, **shrunk)
    assert save(path, case.quantized, ranges=ranges, **shrunk) <= bare + 90 + 12 * len(ranges)
    found = stored(path, case.apply, case.params, IMAGE[:1])
    assert found.ranges == ranges
    jax.tree.map(np.testing.assert_array_equal, found.params, case.quantized)
    params, apply = load(path, case.apply, case.params, IMAGE[:1])
    assert isinstance(params, Quantized)
    expected = jax.jit(integer_apply(case.small_apply, ranges))(case.quantized, IMAGE)
    np.testing.assert_array_equal(jax.jit(apply)(params, IMAGE), expected)
    assert not np.array_equal(expected, jax.jit(case.small_apply)(dequantize(case.quantized), IMAGE))
    save(path, case.quantized, ranges={**ranges, 999: (1.0, 0)}, **shrunk)
    with pytest.raises(ValueError, match=r"model\.safetensors: holds a model with other layers$"):
        load(path, case.apply, case.params, IMAGE[:1])
    with pytest.raises(ValueError, match="params is 'float': must be quantized where there are ranges"):
        save(path, case.small, ranges=ranges, **shrunk)


def test_a_quarter_of_the_channels_takes_a_45th_of_the_bytes_in_8_bits_and_a_90th_in_4(tmp_path):
    """ResNet-9 of the study, as it is served, with ranges of its nine layers."""
    case = Case("resnet9", width=16, groups=8, sparsity=0.75)
    dense = save(tmp_path / "dense", case.params, guarantee={"privacy": None})
    shrunk = {"channels": case.channels, "masks": case.masks, "guarantee": {"privacy": None}}
    for bits, ratio in ((8, 45), (4, 90)):
        for symmetric in (True, False):
            shapes = jax.eval_shape(functools.partial(quantize, bits=bits, symmetric=symmetric), case.small)
            quantized = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
            ranges = {i: (0.01, 3) for i in range(9)}
            assert dense / save(tmp_path / "small", quantized, ranges=ranges, **shrunk) >= ratio


@pytest.mark.parametrize("stored", [lambda p: p, quantize, functools.partial(quantize, bits=4)])
def test_another_model_of_the_same_size_is_refused(tmp_path, stored):
    path, params = tmp_path / "model", {"w": np.ones((4, 6), np.float32), "b": np.ones(3), "c": np.ones(5)}
    save(path, stored(params), guarantee={})
    load(path, lambda p, x: x, params, IMAGE[:1])
    for other in ({"w": np.ones((6, 4))}, {"b": np.ones(5), "c": np.ones(3)}, {"b": np.ones(8), "c": np.ones(0)}):
        with pytest.raises(ValueError, match=r"model: holds a model with other parameters$"):
            load(path, lambda p, x: x, {**params, **other}, IMAGE[:1])
    for old, new in (("w", "v"), ("b", "a")):
        other = {new if name == old else name: x for name, x in params.items()}
        with pytest.raises(ValueError, match=r"model: holds a model with other parameters$"):
            load(path, lambda p, x: x, other, IMAGE[:1])


def product(params, x):
    return jnp.maximum(x.reshape(len(x), 4) @ params["a"], 0) @ params["b"]


def test_a_shrunk_model_of_equal_shapes_but_other_units_is_refused(tmp_path):
    """The other model reads the same matrices the other way round."""
    params = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32), "b": jnp.eye(4) + 0.5}
    swapped = lambda p, x: product({"a": p["b"], "b": p["a"]}, x)  # noqa: E731
    image = jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32)
    channels = find_channels(product, params, image)
    chosen = masks(channels, params, sparsity=0.5)
    small, _ = shrink(product, channels, params, chosen)
    save(tmp_path / "model", small, channels=channels, masks=chosen, guarantee={})
    assert load(tmp_path / "model", product, params, image)[0]["a"].shape == (4, 2)
    with pytest.raises(ValueError, match=r"model: holds a model with other parameters$"):
        load(tmp_path / "model", swapped, params, image)


def test_a_model_without_units_comes_back(tmp_path):
    """Nothing of a matrix of pixels and logits can go."""
    linear = lambda p, x: x.reshape(len(x), 4) @ p["w"]  # noqa: E731
    params, image = {"w": jnp.arange(12.0).reshape(4, 3)}, jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32)
    channels = find_channels(linear, params, image)
    save(tmp_path / "model", params, channels=channels, masks=masks(channels, params, sparsity=0.5), guarantee={})
    np.testing.assert_array_equal(load(tmp_path / "model", linear, params, image)[0]["w"], params["w"])


def test_a_file_of_another_format_is_named(case, tmp_path, monkeypatch):
    path = tmp_path / "model"
    with monkeypatch.context() as past:
        past.setattr(artifact, "VERSION", "1")
        save(path, case.params, guarantee={})
    for read in (guarantee, lambda path: load(path, case.apply, case.params, IMAGE[:1])):
        with pytest.raises(ValueError, match=r"model: has format '1', this library reads '2'$"):
            read(path)


def test_any_safetensors_tool_can_open_the_file(case, tmp_path):
    path = tmp_path / "model.safetensors"
    case.save(path)
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["guarantee"]) == PROMISE
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it cannot be iterated)
    weights = [x for x in jax.tree.leaves(case.quantized.value) if x.ndim >= 2]
    assert sorted(x.shape for x in tensors.values() if x.dtype == np.int8) == sorted(x.shape for x in weights)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(case, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    case.save(path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, case.params, guarantee={})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bits", [8, 4])
def test_every_flipped_byte_and_every_cut_is_refused_in_one_line(case, bits, tmp_path):
    path = tmp_path / "model.safetensors"
    quantized = quantize(case.small, bits=bits)
    save(path, quantized, channels=case.channels, masks=case.masks, guarantee=PROMISE)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    places = {0, 5, 8, 20, header - 1, header, len(whole) - 1, *rng.integers(0, len(whole), 60).tolist()}
    damaged = [whole[:i] + bytes([whole[i] ^ 0x15]) + whole[i + 1 :] for i in sorted(places)]
    damaged += [whole[:n] for n in (0, 7, 100, header, len(whole) // 2, len(whole) - 1)] + [whole + b"x"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^[^\n]*model\.safetensors: [^\n]*$"):
            load(path, case.apply, case.params, IMAGE[:1])


def test_foreign_files_and_other_models_are_refused_in_one_line(case, tmp_path):
    path = tmp_path / "foreign"
    for content in (b"hello", b"\x02\0\0\0\0\0\0\0{}", json.dumps({"a": 1}).encode()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^.*foreign: damaged, or not a model file of this library$"):
            guarantee(path)
    with path.open("wb") as file:
        np.savez(file, **{":vectors": np.zeros(3)})
    with pytest.raises(ValueError, match=r"^.*foreign: damaged, or not a model file of this library$"):
        load(path, case.apply, case.params, IMAGE[:1])
    save_file({"w": np.ones(3)}, path)
    with pytest.raises(ValueError, match="not a model file"):
        load(path, case.apply, case.params, IMAGE[:1])
    other = Case(width=16)
    for write in (case.save, lambda p: save(p, case.params, guarantee={})):
        write(path)
        with pytest.raises(ValueError, match=r"foreign: holds a model with other parameters$"):
            load(path, other.apply, other.params, IMAGE[:1])
    with pytest.raises(OSError):
        guarantee(tmp_path / "absent")


def test_what_cannot_be_run_is_not_saved(case, tmp_path):
    path = tmp_path / "model"
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), case.params)
    for params in (broken, quantize(broken)):
        with pytest.raises(ValueError, match="must be finite"):
            save(path, params, guarantee={})
    with pytest.raises(ValueError, match="given together"):
        save(path, case.small, channels=case.channels, guarantee={})
    with pytest.raises(ValueError, match="params shapes"):
        save(path, case.params, channels=case.channels, masks=case.masks, guarantee={})
    for promise in (float("inf"), np.float32(3)):
        with pytest.raises(ValueError, match=r"^guarantee is .*: must be of JSON types, numbers finite$"):
            save(path, case.params, guarantee={"epsilon": promise})
    assert not path.exists()
