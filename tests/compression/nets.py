"""Small networks to prune, one for each way in which layers share their units."""

from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from fedrobust import models, ops

IMAGE = jax.random.uniform(jax.random.key(7), (3, 8, 8, 2))
ONE = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)


class Net(NamedTuple):
    apply: object
    params: object


def draw(shapes):
    """Parameters none of which is zero or one, as fresh biases and scales are: no error hides behind them."""
    rng = np.random.default_rng(1)

    def leaf(x):
        z = rng.normal(size=x.shape)
        return jnp.asarray(0.5 + 0.2 * z if len(x.shape) < 2 else z / np.sqrt(np.prod(x.shape[:-1])), jnp.float32)

    return jax.tree.map(leaf, shapes)


def plain(shapes, apply):
    return Net(apply, draw({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}))


def from_flax(function):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    module = Wrapped()
    return Net(module.apply, draw(jax.eval_shape(module.init, jax.random.key(0), IMAGE)))


def from_haiku(function):
    pair = hk.without_apply_rng(hk.transform(function))
    return Net(pair.apply, draw(jax.eval_shape(pair.init, jax.random.key(0), IMAGE)))


def from_room(name, builder, **options):
    model = models.build(name, builder=builder, image_shape=(8, 8, 2), num_classes=3, **options)
    return Net(model.apply, draw(jax.eval_shape(model.init, jax.random.key(0), IMAGE)))


def same(x, kernel, **settings):
    return ops.conv(x, kernel, padding="SAME", **settings)


def plain_cnn():
    def apply(p, x):
        x = ops.max_pool(jax.nn.relu(same(x, p["a"]) + p["b"]), (2, 2))
        return x.reshape(x.shape[0], -1) @ p["c"] + p["d"]

    return plain({"a": (3, 3, 2, 6), "b": (6,), "c": (96, 3), "d": (3,)}, apply)


def flax_cnn():
    def function(x):
        for width in (8, 12):
            x = nn.max_pool(nn.gelu(nn.GroupNorm(4)(nn.Conv(width, (3, 3))(x))), (2, 2), (2, 2))
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x.reshape(x.shape[0], -1))))

    return from_flax(function)


def haiku_cnn():
    def function(x):
        for width in (8, 12):
            x = hk.GroupNorm(4)(hk.Conv2D(width, 3, stride=2)(x))
            x = hk.avg_pool(jax.nn.silu(x), (2, 2, 1), (1, 1, 1), "SAME")
        return hk.Linear(3)(jax.nn.leaky_relu(hk.Linear(6)(hk.Flatten()(x))))

    return from_haiku(function)


def concatenated():
    def apply(p, x):
        left, right = jax.nn.elu(same(x, p["a"])), jnp.tanh(same(x, p["b"], strides=1))
        both = jnp.concatenate([left, x, right], -1)
        return jax.nn.relu(same(both, p["c"])).max((1, 2)) @ p["d"]

    return plain({"a": (3, 3, 2, 4), "b": (1, 1, 2, 6), "c": (3, 3, 12, 5), "d": (5, 3)}, apply)


def depthwise():
    def apply(p, x):
        x = jax.nn.relu6(same(x, p["a"]))
        x = jax.nn.relu(same(x, p["deep"], groups=4) + p["b"])  # two outputs for every channel
        return same(x, p["point"], strides=2).mean((1, 2)) @ p["d"]

    return plain({"a": (3, 3, 2, 4), "deep": (3, 3, 1, 8), "b": (8,), "point": (1, 1, 8, 6), "d": (6, 3)}, apply)


def grouped():
    def apply(p, x):
        x = jax.nn.relu(same(x, p["a"]))
        return jax.nn.relu(same(x, p["b"], groups=3)).mean((1, 2)) @ p["d"]

    return plain({"a": (3, 3, 2, 6), "b": (3, 3, 2, 9), "d": (9, 3)}, apply)


def residual():
    def apply(p, x):
        x = jax.nn.relu(same(x, p["a"]))
        for name in ("b", "c"):
            x = x + jax.nn.softplus(same(x, p[name]))
        return x.max((1, 2)) @ p["d"]

    return plain({"a": (3, 3, 2, 6), "b": (3, 3, 6, 6), "c": (3, 3, 6, 6), "d": (6, 3)}, apply)


def squeeze_excite():
    def apply(p, x):
        x = same(x, p["a"])
        gate = jax.nn.sigmoid(jax.nn.relu(x.mean((1, 2)) @ p["b"]) @ p["c"])
        return (x * gate[:, None, None]).mean((1, 2)) @ p["d"]

    return plain({"a": (3, 3, 2, 6), "b": (6, 4), "c": (4, 6), "d": (6, 3)}, apply)


def padded_shortcut():
    def apply(p, x):
        x = jax.nn.relu(same(x, p["a"]))
        short = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (1, 3)))
        return (short + same(x, p["b"], strides=2)).mean((1, 2)) @ p["d"]

    return plain({"a": (3, 3, 2, 4), "b": (3, 3, 4, 8), "d": (8, 3)}, apply)


def gated_halves():
    def apply(p, x):
        value, gate = jnp.split(same(x, p["a"]), 2, -1)
        return (value * jax.nn.sigmoid(gate) + np.arange(4, dtype=np.float32)).mean((1, 2)) @ p["d"]

    return plain({"a": (3, 3, 2, 8), "d": (4, 3)}, apply)


def layer_norm():
    def function(x):
        x = nn.LayerNorm()(nn.Conv(6, (3, 3))(x))
        return nn.Dense(3)(jnp.mean(x, (1, 2)))

    return from_flax(function)


def attention():
    def function(x):
        tokens = nn.Dense(6)(x[:, ::4, ::4].reshape(x.shape[0], 4, 2))
        tokens = tokens + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=6)(tokens)
        return nn.Dense(3)(tokens.mean(1))

    return from_flax(function)


def channels_first():
    def apply(p, x):
        x = jnp.transpose(x, (0, 3, 1, 2))
        x = jax.nn.relu(lax.conv(x, p["a"], (1, 1), "SAME") + p["b"][:, None, None])
        return lax.conv(x, p["c"], (2, 2), "VALID").sum((2, 3)) @ p["d"]

    return plain({"a": (6, 2, 3, 3), "b": (6,), "c": (4, 6, 2, 2), "d": (4, 3)}, apply)


NETS = {
    f.__name__: f
    for f in (
        *(plain_cnn, flax_cnn, haiku_cnn, concatenated, depthwise, grouped, residual, squeeze_excite),
        *(padded_shortcut, gated_halves, layer_norm, attention, channels_first),
    )
} | {
    "resnet9_scale_norm": lambda: from_room("resnet9", "flax", width=4, scale_norm=True),
}
