"""Small batches of records, two losses, and the ways to clip their gradients, compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import losses
from fedrobust.attacks import pgd
from fedrobust.defenses import adversarial_loss
from fedrobust.privacy import clipped_grad
from fedrobust.types import Batch

KEY = jax.random.key(0)
CLIP_NORM = 0.8
SIZE = 7
MASK = np.array([True, True, False, True, True, True, False])
WEIGHT = np.array([1.0, 0.3, 1.0, 0.0, 0.7, 1.0, 0.5], np.float32)


def linear(params, image):
    return image.reshape(image.shape[0], -1) @ params["w"] + params["b"]


def two_layers(params, image):
    return jnp.tanh(linear(params, image)) @ params["v"]


LINEAR = losses.cross_entropy(linear)
ATTACK = pgd(norm="linf", eps=0.2, step_size=0.1, num_steps=2, random_start=True)
ADVERSARIAL = adversarial_loss(losses.cross_entropy(two_layers), two_layers, ATTACK, clean_share=0.3)


def make_params(rng):
    shapes = {"w": (4, 3), "b": (3,), "v": (3, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_batch(seed=0, size=SIZE, mask=MASK):
    rng = np.random.default_rng(seed)
    image = rng.uniform(size=(size, 2, 2, 1)).astype(np.float32)
    return Batch(image, rng.integers(0, 3, size).astype(np.int32), mask[:size])


PARAMS = make_params(np.random.default_rng(9))
SAME = {
    "whole": {},
    "microbatches": {"microbatch_size": 3},
    "norms first": {"method": "norms_first", "microbatch_size": 3},
}
WAYS = {**SAME, "groups": {"groups": lambda path: path}, "groups, microbatches": {"groups": str, "microbatch_size": 3}}
every_way = pytest.mark.parametrize("way", WAYS)


PIECES = {"one by one": {"microbatch_size": 1}, "one piece too large": {"microbatch_size": 100}}


@functools.cache
def compiled_for_any_norm(loss, way):
    settings = {**WAYS, **PIECES}[way]
    return jax.jit(lambda clip_norm, *args: clipped_grad(loss, clip_norm=clip_norm, **settings).apply(*args))


def compiled(loss=LINEAR, way="whole", clip_norm=CLIP_NORM):
    return functools.partial(compiled_for_any_norm(loss, way), clip_norm)


def vector(tree):
    return np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])


def bits(tree):
    return [np.asarray(x).view(np.int32).tolist() for x in jax.tree.leaves(tree)]
