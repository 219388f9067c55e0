"""Training that knows of the rounding to come."""

import jax

from fedrobust.compression.quantization import dequantize, quantize
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
        3. Deviation: norms are not folded into convolutions, and activations are left alone.

    >>> import jax.numpy as jnp
    >>> fake_quantize(jnp.array([[3.4], [-7.0]]), bits=4).ravel().tolist()
    [3.0, -7.0]
    """
    fixed = jax.lax.stop_gradient(params)
    rounded = dequantize(quantize(fixed, bits=bits, symmetric=symmetric))
    return jax.tree.map(lambda w, f, r: r + (w - f), params, fixed, rounded)
