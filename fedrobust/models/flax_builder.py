"""Flax linen modules as models."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fedrobust import check
from fedrobust.models.spec import Initializer, Spec, Wanted, initialize, interpret
from fedrobust.types import Key, Model, Params


def from_flax(module: nn.Module, **call: Any) -> Model:
    """A linen module as a `Model`.

    Args:
        module: takes image [B,H,W,C], returns logits [B,L].
        **call: further arguments of every call, such as `train=False`.

    Returns:
        The model; its parameters are the module's `params` collection itself.

    Raises:
        ValueError: from `init`, if the module keeps anything but parameters: batch statistics tie the examples
        together.
    """

    def init(key: Key, image: jax.Array) -> Params:
        variables = module.init(key, image, **call)
        others = sorted(set(variables) - {"params"})
        check.require(not others, "collections", others, "none beside params, as each example must stand alone")
        return variables["params"]

    def apply(params: Params, image: jax.Array) -> jax.Array:
        logits: Any = module.apply({"params": params}, image, **call)
        return logits

    return Model(init, apply)


def build_flax(spec: Spec) -> Model:
    """A specification as a linen module, as a `Model`."""
    return from_flax(_Network(spec))


class _Weights(nn.Module):
    """The parameters of one layer."""

    wanted: tuple[tuple[str, Initializer, tuple[int, ...]], ...]

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {name: self.param(name, init, shape, jnp.float32) for name, init, shape in self.wanted}


class _Network(nn.Module):
    """A specification, run."""

    spec: Spec

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        def weights(layer: str, wanted: Wanted) -> dict[str, jax.Array]:
            return _Weights(tuple((name, *how) for name, how in wanted.items()), name=layer)()

        if self.is_initializing():
            return initialize(self.spec, image, weights)
        return interpret(self.spec, image, weights)
