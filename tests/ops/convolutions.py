"""What the tests of convolutions share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def lax_conv(image, kernel, *, strides=1, padding="SAME", kernel_dilation=1, groups=1):
    axes = image.ndim - 2
    spatial = "DHW"[-axes:]
    each = lambda value: (value,) * axes if isinstance(value, int) else value  # noqa: E731
    return lax.conv_general_dilated(
        image,
        kernel,
        each(strides),
        padding,
        rhs_dilation=each(kernel_dilation),
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
    )


def normal(stream, shape, dtype=jnp.float32):
    # NumPy draws: jax.random would compile once per shape.
    return jnp.asarray(np.random.default_rng(stream).standard_normal(shape), dtype)


def assert_close(got, wanted, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.max(np.abs(b), initial=0))))


def primitives(function, *arguments):
    """Every equation of a jaxpr, calls opened, as (primitive name, parameters)."""
    found = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            found.append((equation.primitive.name, equation.params))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found
