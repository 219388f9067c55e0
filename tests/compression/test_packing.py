import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.compression import Quantized, packing, quantize

RNG = np.random.default_rng(0)
PARAMS = {
    "a": RNG.normal(size=(3, 5)).astype(np.float32),
    "b": RNG.normal(size=4).astype(np.float32),
    "c": {"gain": np.float32(0.5), "kernel": RNG.normal(size=(2, 2, 1, 3)).astype(np.float32)},
}
SHAPES = [x.shape for x in jax.tree.leaves(PARAMS)]


def test_two_values_share_a_byte_the_first_in_its_lower_half():
    value = {"w": jnp.array([[-8, 7, 0], [1, -1, 5]], jnp.int4)[:, :3], "x": jnp.array([[3]], jnp.int4)}
    quantized = Quantized(value, {"w": np.ones(3, np.float16), "x": np.ones(1, np.float16)})
    packed = packing.pack(quantized)
    np.testing.assert_array_equal(packed[":nibbles"], [0x78, 0x10, 0x5F, 0x03])
    assert packed[":scales"].shape == (4,)
    assert sorted(packed) == [":nibbles", ":scales", ":vectors"]


@pytest.mark.parametrize("kind", [None, (8, True), (8, False), (4, True), (4, False)])
def test_every_kind_of_parameters_comes_back_bit_equal(kind):
    params = PARAMS if kind is None else quantize(PARAMS, bits=kind[0], symmetric=kind[1])
    found = packing.unpack(packing.pack(params), PARAMS, SHAPES)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [(8, True), (8, False), (4, False)])
def test_what_does_not_belong_to_the_parameters_is_told(kind):
    tensors = packing.pack(quantize(PARAMS, bits=kind[0], symmetric=kind[1]))
    for name in tensors:
        assert packing.unpack({**tensors, name: tensors[name][:-1]}, PARAMS, SHAPES) is None
    assert packing.unpack({**tensors, "more": np.zeros((1, 1))}, PARAMS, SHAPES) is None
    assert packing.unpack({k: v for k, v in tensors.items() if k != ":vectors"}, PARAMS, SHAPES) is None


def test_names_that_the_file_uses_itself_are_refused():
    for name in (":vectors", ":nibbles"):
        with pytest.raises(ValueError, match="params names"):
            packing.pack(quantize({name: np.ones((2, 2))}, bits=4))
