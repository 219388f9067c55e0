import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from fedrobust import trace

IMAGE = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
PARAMS = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)}


def logits(p, x):
    return jax.nn.relu(x.mean((1, 2)) @ p["a"])


def flax_batch_norm(p, x):
    layer = nn.BatchNorm(use_running_average=False)
    variables = {"params": {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}}
    return logits(p, layer.apply(variables, x, mutable=["batch_stats"])[0])


def one_at_a_time(p, x):
    return lax.map(lambda image: logits(p, image[None])[0], x)  # a scan has no rule: two batches decide


@pytest.mark.parametrize(
    ("apply", "ties"),
    [
        (logits, False),
        (flax_batch_norm, True),
        (lambda p, x: jax.nn.softmax(logits(p, x), axis=0), True),
        (lambda p, x: jax.nn.softmax(logits(p, x), axis=1), False),
        (lambda p, x: logits(p, x)[::-1], True),
        (lambda p, x: jnp.roll(logits(p, x), 1, axis=0), True),
        (lambda p, x: jnp.concatenate([logits(p, x[:1])] * len(x)), True),
        (lambda p, x: logits(p, x) @ logits(p, x).T @ logits(p, x), True),
        (lambda p, x: jnp.sort(logits(p, x), axis=1), False),
        (lambda p, x: jnp.sort(logits(p, x), axis=0), True),
        (lambda p, x: lax.cummax(logits(p, x), axis=0), True),
        (lambda p, x: logits(p, x / jnp.linalg.norm(x)), True),
        (lambda p, x: jax.vmap(lambda image: logits(p, image[None])[0])(x), False),
        (lambda p, x: logits(p, x.reshape(-1, 2).reshape(x.shape)), False),
        (one_at_a_time, False),
        (lambda p, x: jnp.broadcast_to(p["a"][0], (len(x), 3)), False),
    ],
)
def test_a_row_that_depends_on_another_image_is_seen_and_no_other(apply, ties):
    assert trace.ties_examples(apply, PARAMS, IMAGE) is ties
