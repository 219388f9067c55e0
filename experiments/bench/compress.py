"""What removing half and three quarters of the channels leaves of ResNet-9 and ResNet-18.

The library's models as they come, 8 norm groups per layer, 28 x 28 x 1 images, two classes, fresh weights: ResNet-9 has
610 k parameters, ResNet-18 11.2 M. The units with the smallest L2 norm go, the same share of every group. Each model
and its two small ones are timed in turns, batch 64, as plain `jax.jit` of the function; medians; compilation is not
timed.

Both ratios say how many times better the small model is than the dense one, so rows are measured in what it has more
of: images per second, and copies of its float32 parameters in a gigabyte. `sides` holds milliseconds per batch, and
parameters:

- resnet9_half_latency_over_dense, resnet9_half_parameters_over_dense: half the channels; _quarter_: a quarter is left;
- the same for resnet18.

Command: python -m experiments.bench compress
Cost: about 2 minutes on 2 CPU cores.
"""

import jax.numpy as jnp

from experiments.bench.timing import Comparison
from fedrobust import compression, evaluation, keys, models, trees

IMAGE_SHAPE = (28, 28, 1)
BATCH_SIZE = 64
REPEATS = 15
MODELS = ("resnet9", "resnet18")

REMOVED = {"half": (0.5, 1.8, 3.5), "quarter": (0.75, 3.0, 12.0)}
"""What is left -> the share of the units that goes, the smallest accepted ratio of speed and of parameters."""


def run(*, width: int | None = None, batch_size: int = BATCH_SIZE, repeats: int = REPEATS) -> list[Comparison]:
    """Measures; see the module's first lines.

    Args:
        width: base width of the models; None for each one's own.
        batch_size: images per timed call.
        repeats: timed calls of each model.
    """
    return [row for name in MODELS for row in _of_model(name, width, batch_size, repeats)]


def _of_model(name: str, width: int | None, batch_size: int, repeats: int) -> list[Comparison]:
    model = models.build(name, image_shape=IMAGE_SHAPE, num_classes=2, width=width)
    image = jnp.zeros((1, *IMAGE_SHAPE))
    params = model.init(keys.root(0), image)
    channels = compression.find_channels(model.apply, params, image)
    small = {
        left: compression.shrink(model.apply, channels, params, compression.masks(channels, params, sparsity=sparsity))
        for left, (sparsity, _, _) in REMOVED.items()
    }
    pairs = [(model.apply, params), *((apply, smaller) for smaller, apply in small.values())]
    times = evaluation.latencies(*pairs, image_shape=IMAGE_SHAPE, batch_size=batch_size, num_repeats=repeats)
    dense, *others = (
        {"ms": latency.median_ms, "parameters": trees.size(tree)}
        for latency, (_, tree) in zip(times, pairs, strict=True)
    )
    rows = []
    for (left, (_, speed, size)), found in zip(REMOVED.items(), others, strict=True):
        for measure, unit, key, total, target in (
            ("latency", "images/s", "ms", 1e3 * batch_size, speed),
            ("parameters", "copies/GB", "parameters", 1e9 / 4, size),
        ):
            sides = {left: found[key], "dense": dense[key]}
            ours, against = (total / value for value in sides.values())
            row = f"{name}_{left}_{measure}_over_dense"
            rows.append(Comparison(row, ours, against, unit, target, repeats, sides, more_is_better=True))
    return rows
