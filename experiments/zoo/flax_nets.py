"""Flax linen modules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedrobust import models
from fedrobust.models.spec import num_groups
from fedrobust.types import Model


class _Norm(nn.Module):
    """GroupNorm with as many groups as the library's own models take."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.GroupNorm(num_groups(x.shape[-1], 8))(x)


def _pairs() -> nn.Module:
    """GroupNorm of two channels each: however layers are concatenated, a norm group lies within one of them."""
    return nn.GroupNorm(None, group_size=2)


class _DenseNet(nn.Module):
    """Huang et al., arXiv 1608.06993 (2016): two blocks of three layers, with a halving transition."""

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(2 * self.width, (3, 3))(x)
        for block in range(2):
            if block:
                x = nn.Conv(x.shape[-1] // 2, (1, 1))(nn.relu(_pairs()(x)))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(3):
                y = nn.Conv(4 * self.width, (1, 1))(nn.relu(_pairs()(x)))
                x = jnp.concatenate([x, nn.Conv(self.width, (3, 3))(nn.relu(_pairs()(y)))], axis=-1)
        return nn.Dense(self.num_classes)(jnp.mean(nn.relu(_pairs()(x)), axis=(1, 2)))


class _MobileNetV2(nn.Module):
    """Sandler et al., arXiv 1801.04381 (2018): inverted residuals around depthwise convolutions, five of them."""

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu6(_Norm()(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        for features, stride in ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1)):
            wide = 4 * x.shape[-1]
            y = nn.relu6(_Norm()(nn.Conv(wide, (1, 1), use_bias=False)(x)))
            y = nn.Conv(wide, (3, 3), strides=stride, feature_group_count=wide, use_bias=False)(y)
            y = _Norm()(nn.Conv(features * self.width, (1, 1), use_bias=False)(nn.relu6(_Norm()(y))))
            x = x + y if x.shape == y.shape else y
        return nn.Dense(self.num_classes)(jnp.mean(x, axis=(1, 2)))


class _ConvNeXt(nn.Module):
    """Liu et al., arXiv 2201.03545 (2022): depthwise 7x7, LayerNorm, an inverted bottleneck, a scale per channel."""

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for stage in range(3):
            features = self.width * 2**stage
            if stage:
                x = nn.LayerNorm()(x)
            x = nn.Conv(features, (2, 2), strides=2)(x)
            if not stage:
                x = nn.LayerNorm()(x)
            for block in range(2):
                y = nn.LayerNorm()(nn.Conv(features, (7, 7), feature_group_count=features)(x))
                y = nn.Dense(features)(nn.gelu(nn.Dense(4 * features)(y)))
                x = x + y * self.param(f"scale_{stage}_{block}", nn.initializers.constant(1e-6), (features,))
        return nn.Dense(self.num_classes)(nn.LayerNorm()(jnp.mean(x, axis=(1, 2))))


class _ViT(nn.Module):
    """Dosovitskiy et al., arXiv 2010.11929 (2020), with the mean of the patches instead of a class token."""

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(2 * self.width, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(axis=1))


class _Mixer(nn.Module):
    """Tolstikhin et al., arXiv 2105.01601 (2021): dense layers across patches, then across channels."""

    width: int
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(2 * self.width, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(2):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            x = x + nn.Dense(x.shape[1])(nn.gelu(nn.Dense(self.width)(y))).swapaxes(1, 2)
            x = x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(axis=1))


def _module(kind: Callable[..., nn.Module]) -> Callable[[int, int], Model]:
    return lambda width, num_classes: models.from_flax(kind(width, num_classes))


ARCHITECTURES: dict[str, Callable[[int, int], Model]] = {
    "resnet9": lambda width, num_classes: models.build_flax(models.resnet9(width=width, num_classes=num_classes)),
    "densenet": _module(_DenseNet),
    "mobilenet_v2": _module(_MobileNetV2),
    "convnext": _module(_ConvNeXt),
    "vit": _module(_ViT),
    "mixer": _module(_Mixer),
}
"""Name -> `(width, num_classes) -> Model`."""
