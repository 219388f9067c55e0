"""Drop-in primitives for images, fast alone, inside loops, under `vmap`, and under all of them together."""

from fedrobust.ops.convolution import conv
from fedrobust.ops.kernel_gradients import KernelGradients
from fedrobust.ops.normalization import group_norm
from fedrobust.ops.pooling import avg_pool, max_pool

__all__ = ["KernelGradients", "avg_pool", "conv", "group_norm", "max_pool"]
