"""Haiku transforms."""

from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from fedrobust import models, ops
from fedrobust.models.spec import num_groups
from fedrobust.types import Model


def _norm(x: jax.Array) -> jax.Array:
    return hk.GroupNorm(num_groups(x.shape[-1], 8))(x)


def _conv_block(x: jax.Array, features: int, window: int = 3, stride: int = 1) -> jax.Array:
    return jax.nn.relu(_norm(hk.Conv2D(features, window, stride=stride, with_bias=False)(x)))


def _pool(x: jax.Array) -> jax.Array:
    return ops.max_pool(x, (min(2, x.shape[1]), min(2, x.shape[2])))


def _resnet50(x: jax.Array, width: int, num_classes: int) -> jax.Array:
    """He et al., arXiv 1512.03385 (2015): bottlenecks 3, 4, 6, 3, behind a stem for small images."""
    x = _conv_block(x, width)
    for stage, depth in enumerate((3, 4, 6, 3)):
        features = width * 2**stage
        for block in range(depth):
            stride = 2 if stage and not block else 1
            y = _conv_block(_conv_block(x, features, 1), features, 3, stride)
            y = _norm(hk.Conv2D(4 * features, 1, with_bias=False)(y))
            x = x if block else _norm(hk.Conv2D(4 * features, 1, stride=stride, with_bias=False)(x))
            x = jax.nn.relu(x + y)
    return hk.Linear(num_classes)(x.mean((1, 2)))


def _vgg16(x: jax.Array, width: int, num_classes: int) -> jax.Array:
    """Simonyan, Zisserman, arXiv 1409.1556 (2014), configuration D."""
    for factor, depth in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(depth):
            x = jax.nn.relu(hk.Conv2D(factor * width, 3)(x))
        x = _pool(x)
    x = hk.Flatten()(x)
    for _ in range(2):
        x = jax.nn.relu(hk.Linear(8 * width)(x))
    return hk.Linear(num_classes)(x)


def _squeeze_excite(x: jax.Array, width: int, num_classes: int) -> jax.Array:
    """Hu et al., arXiv 1709.01507 (2017): residual blocks whose channels are gated by their own means."""
    x = _conv_block(x, 2 * width)
    for i in range(3):
        y = _norm(hk.Conv2D(2 * width, 3)(_conv_block(x, 2 * width)))
        gate = hk.Linear(2 * width)(jax.nn.silu(hk.Linear(width)(y.mean((1, 2)))))
        x = jax.nn.relu(x + y * jax.nn.sigmoid(gate)[:, None, None, :])
        x = hk.avg_pool(x, (2, 2, 1), (2, 2, 1), "SAME") if i < 2 else x
    return hk.Linear(num_classes)(x.mean((1, 2)))


def _unet(x: jax.Array, width: int, num_classes: int) -> jax.Array:
    """Ronneberger et al., arXiv 1505.04597 (2015), three levels, with transposed convolutions; its map is averaged."""
    skips = []
    for level in range(2):
        x = _conv_block(_conv_block(x, width * 2**level), width * 2**level)
        skips.append(x)
        x = _pool(x)
    x = _conv_block(x, 4 * width)
    for level in (1, 0):
        x = hk.Conv2DTranspose(width * 2**level, 2, stride=2)(x)
        x = jnp.concatenate([skips[level], x], axis=-1)
        x = _conv_block(_conv_block(x, width * 2**level), width * 2**level)
    return hk.Conv2D(num_classes, 1)(x).mean((1, 2))


def _vit_token(x: jax.Array, width: int, num_classes: int) -> jax.Array:
    """Dosovitskiy et al., arXiv 2010.11929 (2020), with its class token, for one image at a time."""
    num_heads, size = 4, 2 * width
    x = hk.Conv2D(size, 4, stride=4)(x)
    x = x.reshape(x.shape[0], -1, size)
    token = hk.get_parameter("token", (1, 1, size), init=jnp.zeros)
    x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
    x = x + hk.get_parameter("position", (1, *x.shape[1:]), init=hk.initializers.RandomNormal(0.02))
    start = hk.initializers.VarianceScaling(1.0)
    for _ in range(2):
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + hk.MultiHeadAttention(num_heads, size // num_heads, w_init=start)(y, y, y)
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + hk.Linear(size)(jax.nn.gelu(hk.Linear(2 * size)(y)))
    return hk.Linear(num_classes)(hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)[:, 0])


def _named(forward: Callable[[jax.Array, int, int], jax.Array]) -> Callable[[int, int], Model]:
    return lambda width, num_classes: models.from_haiku(hk.transform(lambda image: forward(image, width, num_classes)))


ARCHITECTURES: dict[str, Callable[[int, int], Model]] = {
    "small_cnn": lambda width, num_classes: models.build_haiku(models.small_cnn(width=width, num_classes=num_classes)),
    "resnet18": lambda width, num_classes: models.build_haiku(models.resnet18(width=width, num_classes=num_classes)),
    "resnet50": _named(_resnet50),
    "vgg16": _named(_vgg16),
    "squeeze_excite": _named(_squeeze_excite),
    "unet": _named(_unet),
    "vit_token": _named(_vit_token),
}
"""Name -> `(width, num_classes) -> Model`."""
