"""Masked equals shrunk, on every architecture of the zoo."""

import jax
import numpy as np
import pytest

from experiments.zoo import ARCHITECTURES, away_from_zero_and_one
from fedrobust import attacks, losses, privacy, trees
from fedrobust.compression import find_channels, kept_units, masks, quantize, shrink, slice_tree
from fedrobust.compression.export import load_onnx, save_onnx
from fedrobust.types import Batch

IMAGE = jax.random.uniform(jax.random.key(7), (2, 16, 16, 3)) * np.float32([1, 0.2]).reshape(2, 1, 1, 1)
ONE = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
# What 50 % of the units leave of the parameters, at most. A quarter, where every convolution loses half of both sides.
LEFT = {
    "concatenated": 0.35,
    "convnext": 0.35,
    "densenet": 0.3,
    "flatten_cnn": 0.3,
    "mixer": 0.75,  # what is mixed across patches gets a bias of its own: the channels of the stream stay
    "mobilenet_v2": 0.36,
    "resnet18": 0.26,
    "resnet50": 0.27,
    "resnet9": 0.27,
    "shuffle_net": 0.45,
    "small_cnn": 0.3,
    "squeeze_excite": 0.3,
    "unet": 0.27,
    "vgg11": 0.26,
    "vgg16": 0.26,
    "vit": 0.35,
    "vit_fused": 0.4,
    "vit_token": 0.4,
    "wide_and_deep": 0.7,  # the wide part reads pixels and writes logits
}


SLOW = ("densenet", "mixer", "mobilenet_v2", "resnet18", "resnet50", "vgg16", "vit")
"""Those that take longest, of kinds that the others cover."""


def halved(name):
    """The model, its parameters, its channels and masks for half of the units."""
    model = ARCHITECTURES[name](4, 3)
    params = away_from_zero_and_one(model, ONE)
    channels = find_channels(model.apply, params, ONE)
    return model, params, channels, masks(channels, params, sparsity=0.5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ARCHITECTURES])
def test_masked_equals_shrunk_and_half_of_the_units_go(name):
    model, params, channels, half = halved(name)
    assert channels.unknown == ()
    small, small_apply = shrink(model.apply, channels, params, half)
    assert trees.size(small) < LEFT[name] * trees.size(params)
    masked = jax.jit(model.apply)(jax.tree.map(np.multiply, params, half), IMAGE)
    assert np.ptp(masked, axis=0).max() > 3e-4  # the logits do depend on the image
    np.testing.assert_allclose(jax.jit(small_apply)(small, IMAGE), masked, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_exported_and_checked_in_onnxruntime(tmp_path, name):
    """`save_onnx` compares the logits itself; in float32 and with int8 weights."""
    model = ARCHITECTURES[name](4, 3)
    params = away_from_zero_and_one(model, ONE)
    for values in (params, quantize(params)):
        save_onnx(tmp_path / "m.onnx", model.apply, values, image_shape=ONE.shape[1:], guarantee={})
        assert load_onnx(tmp_path / "m.onnx")(IMAGE).shape == (2, 3)


def test_a_model_with_two_pass_layer_norms_is_shrunk_twice():
    model, params, channels, half = halved("vit_fused")
    small, small_apply = shrink(model.apply, channels, params, half, verify=False)
    again = find_channels(small_apply, small, ONE)
    assert len(again.group) == kept_units(channels, half).sum()
    smaller, _ = shrink(small_apply, again, small, masks(again, small, sparsity=0.5))
    assert trees.size(smaller) < 0.5 * trees.size(small)


def both(name):
    """The masked model with its parameters, the small one with its own, and the way from the former to the latter."""
    model, params, channels, half = halved(name)
    small, small_apply = shrink(model.apply, channels, params, half, verify=False)

    def masked_apply(p, image):
        return model.apply(trees.multiply(p, half), image)

    return (masked_apply, params), (small_apply, small), lambda tree: slice_tree(channels, half, tree)


KEY, LABEL = jax.random.key(3), np.array([0, 2])


def test_per_example_gradients_of_the_shrunk_model_are_the_kept_part_of_those_of_the_masked_one():
    def gradients(apply, params):
        loss = losses.cross_entropy(apply)
        one = jax.grad(lambda p, x, y: loss(KEY, p, x[None], y[None])[0])
        return jax.jit(jax.vmap(one, (None, 0, 0)))(params, IMAGE, LABEL)

    masked, small, cut = both("flatten_cnn")
    expected, found = gradients(*masked), gradients(*small)
    for i in range(2):
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), cut(jax.tree.map(lambda x, i=i: x[i], expected)))


@pytest.mark.parametrize("name", ["small_cnn", "flatten_cnn"])
def test_a_clipped_step_of_the_shrunk_model_is_the_kept_part_of_that_of_the_masked_one(name):
    batch = Batch(IMAGE, LABEL, np.array([True, True]))

    def step(apply, params):
        clipped = privacy.clipped_grad(losses.cross_entropy(apply), clip_norm=0.5)
        return jax.jit(clipped)(KEY, params, batch)

    *models, cut = both(name)
    (expected, masked_info), (found, small_info) = (step(*model) for model in models)
    assert (small_info.norm > 0.5).any()  # the clip does something
    np.testing.assert_allclose(small_info.norm, masked_info.norm, rtol=1e-4)  # what is gone adds nothing to the norm
    assert_close(found, cut(expected))


def test_pgd_finds_the_same_images_on_the_shrunk_model():
    attack = attacks.pgd(norm="l2", eps=1.0, step_size=0.5, num_steps=3, random_start=True, keep_best=False)

    def found(apply, params):
        return jax.jit(lambda p: attack(KEY, lambda x: apply(p, x), IMAGE, LABEL))(params)

    masked, small, _ = both("small_cnn")
    moved = found(*small)
    assert np.abs(moved - IMAGE).max() > 0.01
    np.testing.assert_allclose(moved, found(*masked), atol=1e-4)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)
