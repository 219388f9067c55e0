"""Group normalization."""
import jax
import jax.numpy as jnp
from jax import lax


def group_norm(image, num_groups, scale=None, bias=None, *, eps=1e-6):
    """Group."""
    b, *spatial, c = image.shape
    x = image.reshape(b, -1, num_groups, c // num_groups)
    n = x.shape[1] * x.shape[3]
    ref = lax.stop_gradient(x[:, :1].mean(3, keepdims=True))
    x = x - ref
    mean = x.sum(1, keepdims=True).sum(3, keepdims=True) / n
    sq = (x * x).sum(1, keepdims=True).sum(3, keepdims=True) / n
    inv = lax.rsqrt(jnp.maximum(sq - mean * mean, 0) + eps)
    a = inv * (1 if scale is None else scale.reshape(num_groups, -1))
    sh = (0 if bias is None else bias.reshape(num_groups, -1)) - mean * a
    return (x * a + sh).reshape(image.shape)
