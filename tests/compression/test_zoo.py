"""Masked equals shrunk, on every architecture of the zoo."""

import jax
import numpy as np
import pytest

from experiments.zoo import ARCHITECTURES, away_from_zero_and_one
from fedrobust import trees
from fedrobust.compression import find_channels, masks, shrink

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
    "vit_fused": 0.7,
    "vit_token": 0.7,
    "wide_and_deep": 0.7,  # the wide part reads pixels and writes logits
}


@pytest.mark.parametrize("name", LEFT)
def test_masked_equals_shrunk_and_half_of_the_units_go(name):
    model = ARCHITECTURES[name](4, 3)
    params = away_from_zero_and_one(model, ONE)
    channels = find_channels(model.apply, params, ONE)
    assert channels.unknown == ()
    half = masks(channels, params, sparsity=0.5)
    small, small_apply = shrink(model.apply, channels, params, half, verify=False)
    assert trees.size(small) < LEFT[name] * trees.size(params)
    masked = jax.jit(model.apply)(trees.multiply(params, half), IMAGE)
    assert np.ptp(masked, axis=0).max() > 3e-4  # the logits do depend on the image
    np.testing.assert_allclose(jax.jit(small_apply)(small, IMAGE), masked, rtol=0, atol=1e-5)
