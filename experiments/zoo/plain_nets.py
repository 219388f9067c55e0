"""Functions of a dict of arrays."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from experiments.zoo.weights import Weight, plain
from fedrobust import ops
from fedrobust.types import Model


def _conv(
    weight: Weight, name: str, x: jax.Array, features: int, window: int = 3, strides: int = 1, groups: int = 1
) -> jax.Array:
    kernel = weight(f"{name}_kernel", window, window, x.shape[-1] // groups, features)
    return ops.conv(x, kernel, strides=strides, groups=groups) + weight(f"{name}_bias", features)


def _dense(weight: Weight, name: str, x: jax.Array, features: int) -> jax.Array:
    return x @ weight(f"{name}_kernel", x.shape[-1], features) + weight(f"{name}_bias", features)


def _layer_norm(weight: Weight, name: str, x: jax.Array) -> jax.Array:
    """In two passes, as in most textbooks."""
    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred * scale * weight(f"{name}_scale", x.shape[-1]) + weight(f"{name}_bias", x.shape[-1])


def _group_norm(weight: Weight, name: str, x: jax.Array, num_groups: int) -> jax.Array:
    scale, bias = (weight(f"{name}_{what}", x.shape[-1]) for what in ("scale", "bias"))
    return ops.group_norm(x, num_groups, scale, bias)


def _flatten_cnn(width: int, num_classes: int, weight: Weight, x: jax.Array) -> jax.Array:
    """Two convolutions and a dense head over every pixel (LeCun et al. 1998)."""
    for i in range(2):
        x = ops.max_pool(jax.nn.relu(_conv(weight, f"conv{i}", x, width * (i + 1))), (2, 2))
    x = jnp.tanh(_dense(weight, "hidden", x.reshape(x.shape[0], -1), 2 * width))
    return _dense(weight, "head", x, num_classes)


def _vgg11(width: int, num_classes: int, weight: Weight, x: jax.Array) -> jax.Array:
    """Simonyan, Zisserman, arXiv 1409.1556 (2014), configuration A."""
    for stage, (factor, depth) in enumerate(((1, 1), (2, 1), (4, 2), (8, 2), (8, 2))):
        for i in range(depth):
            x = jax.nn.relu(_conv(weight, f"conv{stage}_{i}", x, factor * width))
        x = ops.max_pool(x, (min(2, x.shape[1]), min(2, x.shape[2])))
    x = x.reshape(x.shape[0], -1)
    for i in range(2):
        x = jax.nn.relu(_dense(weight, f"hidden{i}", x, 8 * width))
    return _dense(weight, "head", x, num_classes)


def _concatenated(width: int, num_classes: int, weight: Weight, x: jax.Array) -> jax.Array:
    """A tensor beside itself, and its own input beside that."""
    y = jax.nn.elu(_conv(weight, "first", x, width))
    y = jnp.concatenate([y, x, y, -y], axis=-1)
    y = jax.nn.relu(_conv(weight, "second", y, width))
    y = jnp.concatenate([y.mean((1, 2)), y.max((1, 2))], axis=-1)
    return _dense(weight, "head", y, num_classes)


def _wide_and_deep(width: int, num_classes: int, weight: Weight, x: jax.Array) -> jax.Array:
    """A linear model of the pixels beside a deep one (Cheng et al., arXiv 1606.07792, 2016), with gated units."""
    flat = x.reshape(x.shape[0], -1)
    deep = flat
    for i in range(3):
        value, gate = jnp.split(_dense(weight, f"deep{i}", deep, 2 * width), 2, axis=-1)
        deep = value * jax.nn.sigmoid(gate)
    return _dense(weight, "wide", flat, num_classes) + _dense(weight, "head", deep, num_classes)


def _shuffle_net(width: int, num_classes: int, weight: Weight, x: jax.Array) -> jax.Array:
    """Zhang et al., arXiv 1707.01083 (2017): grouped 1x1 convolutions, a shuffle, a depthwise one; two groups."""
    x = jax.nn.relu(_conv(weight, "stem", x, 4 * width))
    for i in range(2):
        y = _group_norm(weight, f"norm{i}", x, 2 * width)
        y = jax.nn.relu(_conv(weight, f"in{i}", y, 2 * width, 1, groups=2))
        shape = y.shape
        y = y.reshape(*shape[:-1], 2, shape[-1] // 2).swapaxes(-1, -2).reshape(shape)
        y = _conv(weight, f"depth{i}", y, 2 * width, groups=2 * width)
        x = jax.nn.relu(x + _conv(weight, f"out{i}", y, 4 * width, 1, groups=2))
    return _dense(weight, "head", x.mean((1, 2)), num_classes)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """[B,T,heads,depth] each."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _vit_fused(width: int, num_classes: int, weight: Weight, x: jax.Array) -> jax.Array:
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929, 2020) that makes q, k and v by one product."""
    x = _conv(weight, "patches", x, 2 * width, 4, 4)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    first = jnp.broadcast_to(weight("token", 1, 2 * width), (x.shape[0], 1, 2 * width))
    x = jnp.concatenate([first, x], axis=1)
    x = x + weight("position", *x.shape[1:])
    num_heads = 4
    for i in range(2):
        y = _dense(weight, f"qkv{i}", _layer_norm(weight, f"norm{i}_0", x), 6 * width)
        q, k, v = jnp.moveaxis(y.reshape(*y.shape[:-1], 3, num_heads, -1), -3, 0)
        y = _attend(q, k, v)
        x = x + _dense(weight, f"out{i}", y.reshape(*y.shape[:-2], -1), x.shape[-1])
        y = jax.nn.gelu(_dense(weight, f"up{i}", _layer_norm(weight, f"norm{i}_1", x), 4 * width))
        x = x + _dense(weight, f"down{i}", y, x.shape[-1])
    return _dense(weight, "head", _layer_norm(weight, "norm", x)[:, 0], num_classes)


def _named(forward: Callable[..., jax.Array]) -> Callable[[int, int], Model]:
    return lambda width, num_classes: plain(partial(forward, width, num_classes))


ARCHITECTURES: dict[str, Callable[[int, int], Model]] = {
    "flatten_cnn": _named(_flatten_cnn),
    "vgg11": _named(_vgg11),
    "concatenated": _named(_concatenated),
    "wide_and_deep": _named(_wide_and_deep),
    "shuffle_net": _named(_shuffle_net),
    "vit_fused": _named(_vit_fused),
}
"""Name -> `(width, num_classes) -> Model`."""
