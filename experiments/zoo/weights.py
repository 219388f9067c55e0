"""Parameters for the zoo: drawn so that no error hides, or declared where they are used."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust.types import Key, Model, Params

Weight = Callable[..., jax.Array]
"""`(name, *sizes) -> array`."""


def away_from_zero_and_one(model: Model, image: Any, seed: int = 0) -> Params:
    """Parameters of which no vector is zero or one, as fresh biases and scales are, and whose kernels keep the scale.

    Args:
        model: whose parameters are drawn, all anew.
        image: [B,H,W,C] or its shape.
        seed: of the draw.

    Returns:
        The parameters, float32: vectors around 0.4, everything else around 0 with variance 2 / fan-in.
    """
    rng = np.random.default_rng(seed)

    def leaf(x: jax.ShapeDtypeStruct) -> jax.Array:
        z = rng.normal(size=x.shape)
        return jnp.asarray(0.4 + 0.2 * z if len(x.shape) < 2 else z * np.sqrt(2 / np.prod(x.shape[:-1])), jnp.float32)

    return jax.tree.map(leaf, jax.eval_shape(model.init, jax.random.key(0), image))


def plain(forward: Callable[[Weight, jax.Array], jax.Array]) -> Model:
    """A model from one function that asks for its arrays by name where it needs them.

    Args:
        forward: `(weight, image) -> logits`; `weight(name, *sizes)` is the array of that name.

    Returns:
        The model, its parameters a dict.
    """

    def init(key: Key, image: jax.Array) -> Params:
        found: dict[str, jax.Array] = {}

        def weight(name: str, *sizes: int) -> jax.Array:
            scale = np.sqrt(np.prod(sizes[:-1])) if len(sizes) > 1 else np.inf
            draw = jax.random.normal(jax.random.fold_in(key, len(found)), sizes) / scale
            return found.setdefault(name, draw)

        forward(weight, image)
        return found

    def apply(params: Params, image: jax.Array) -> jax.Array:
        return forward(lambda name, *_: params[name], image)

    return Model(init, apply)
