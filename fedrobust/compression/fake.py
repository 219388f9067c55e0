"""Training that knows of the rounding to come."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedrobust import trace
from fedrobust.compression.integer import layers_of, round_input, straight_through_round
from fedrobust.compression.quantization import dequantize, quantize
from fedrobust.compression.ranges import Ranges
from fedrobust.trace.program import apply_equation
from fedrobust.types import Params


def fake_quantize(params: Params, *, bits: int = 8, symmetric: bool = True) -> Params:
    """The parameters as they will be served, with the gradient of those that are trained.

    A loss of `apply(fake_quantize(params), image)` trains float parameters whose rounded values do well. Rounding looks
    at weights only, so per-example gradients stay per-example, and private training stays as private as it was.

    Args:
        params: a pytree of finite float32 arrays.
        bits: as of `quantize`.
        symmetric: as of `quantize`.

    Returns:
        A pytree of float32 arrays: exactly `dequantize(quantize(params))`. Its derivative is the identity, also for
        weights that are clipped: they would never come back otherwise.

    Raises:
        ValueError: bits that are neither 8 nor 4.

    Source: Bengio, Leonard, Courville 2013 (arXiv 1308.3432), section 4; Jacob et al. 2018 (arXiv 1712.05877), section
        3. Deviation: norms are not folded into convolutions. Activations: `fake_quantize_inputs`.

    >>> import jax.numpy as jnp
    >>> fake_quantize(jnp.array([[3.4], [-7.0]]), bits=4).ravel().tolist()
    [3.0, -7.0]
    """
    fixed = jax.lax.stop_gradient(params)
    rounded = dequantize(quantize(fixed, bits=bits, symmetric=symmetric))
    return jax.tree.map(lambda w, f, r: r + (w - f), params, fixed, rounded)


def fake_quantize_inputs(
    apply: Callable[[Params, jax.Array], jax.Array], ranges: Ranges
) -> Callable[[Params, jax.Array], jax.Array]:
    """The model with the inputs of its layers rounded as they will be served.

    Together with `fake_quantize` it computes what `integer_apply` does, on float parameters that can be trained:
    `fake_quantize_inputs(apply, ranges)(fake_quantize(params), image)`. Ranges are fixed, so that an example's gradient
    depends on no other example; measure them anew for the model that is served.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, the model in float32.
        ranges: what `calibrate` returned for it, or a part; the input of layers left out is not rounded.

    Returns:
        A function as `apply`, with slope 1 at each rounding inside the range, 0 outside it. Its logits are those of
        `integer_apply` up to the rounding of float32 sums.

    Raises:
        ValueError: when called: ranges of another model.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3. Deviation: ranges do not move in training.
    """

    def on_rounded_inputs(params: Params, image: jax.Array) -> jax.Array:
        program = trace.read(apply, params, image)
        layers = layers_of(program, ranges)

        def emit(equation: trace.Equation, *arrays: Any) -> list[Any]:
            if equation.outputs[0] not in layers:
                return apply_equation(equation, *arrays)
            layer, _ = layers[equation.outputs[0]]
            x = round_input(layer, arrays[0], straight_through_round) * np.float32(layer.scale)
            return apply_equation(equation, x, *arrays[1:])

        (logits,) = trace.evaluate(program, jax.tree.leaves((params, image)), emit)
        return logits

    return on_rounded_inputs
