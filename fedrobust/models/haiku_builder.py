"""Haiku transforms as models."""

import haiku as hk
import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.models.spec import Initializer, Spec, Wanted, initialize, interpret
from fedrobust.types import Model, Params


def from_haiku(transformed: hk.Transformed) -> Model:
    """What `hk.transform` returns as a `Model`.

    Args:
        transformed: of a function from image [B,H,W,C] to logits [B,L] that draws no randomness when applied.

    Returns:
        The model.

    Raises:
        ValueError: the transform carries a state: batch statistics tie the examples together.
    """
    kind = type(transformed)
    check.require(
        kind is hk.Transformed, "transformed", kind.__name__, "the Transformed of hk.transform, without state"
    )

    def apply(params: Params, image: jax.Array) -> jax.Array:
        return transformed.apply(params, None, image)

    return Model(transformed.init, apply)


def build_haiku(spec: Spec) -> Model:
    """A specification as a Haiku transform, as a `Model`."""

    def weights(layer: str, wanted: Wanted) -> dict[str, jax.Array]:
        return _Weights(wanted, name=layer)()

    def network(image: jax.Array) -> jax.Array:
        if hk.running_init():
            return initialize(spec, image, weights)
        return interpret(spec, image, weights)

    return from_haiku(hk.transform(network))


class _Weights(hk.Module):
    """The parameters of one layer."""

    def __init__(self, wanted: Wanted, name: str):
        super().__init__(name=name)
        self.wanted = wanted

    def __call__(self) -> dict[str, jax.Array]:
        def draw(init: Initializer) -> hk.initializers.Initializer:
            return lambda shape, dtype: init(hk.next_rng_key(), shape, dtype)

        return {
            name: hk.get_parameter(name, shape, jnp.float32, draw(init)) for name, (init, shape) in self.wanted.items()
        }
