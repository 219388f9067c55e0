"""What clipping, loops and client maps cost on top of a plain training step.

ResNet-9 at base width 32 (610 k parameters, GroupNorm), 28 x 28 x 1 images, 64 of them in every measurement. Clipped
sums run in microbatches of 4: the same numbers, and 64 per-example gradients at once are 156 MB of fresh memory.

Command: python -m experiments.bench ops
Cost: about 1 minute on 2 CPU cores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.bench.timing import Comparison, compare
from fedrobust import keys, losses, models, ops, privacy, trees
from fedrobust.types import Batch, Key, Params

NUM_EXAMPLES = 64
NUM_PIECES = 4
MICROBATCH_SIZE = 4
REPEATS = 9
LEARNING_RATE = 0.01

Gradient = Callable[[Key, Params, Batch], Params]


def run() -> list[Comparison]:
    """Measures; see the module's first lines."""
    root = keys.root(0)
    model = models.build("resnet9", builder="flax", image_shape=(28, 28, 1), num_classes=2, width=32)
    loss = losses.cross_entropy(model.apply)
    batch = _batch(keys.stream(root, "data"))
    params = model.init(keys.stream(root, "init"), batch.image)
    key = keys.stream(root, "loss")
    clip = privacy.clipped_grad(loss, clip_norm=1.0, microbatch_size=MICROBATCH_SIZE)

    def plain(key: Key, params: Params, batch: Batch) -> Params:
        return jax.grad(lambda p: jnp.mean(loss(key, p, batch.image, batch.label)))(params)

    def clipped(key: Key, params: Params, batch: Batch) -> Params:
        return trees.scale(clip(key, params, batch)[0], 1 / batch.mask.size)

    pieces = jax.tree.map(lambda x: x.reshape(NUM_PIECES, -1, *x.shape[1:]), batch)
    clients = jax.tree.map(lambda x: jnp.stack([x] * NUM_PIECES), params)
    whole = _ready(plain, key, params, batch)
    scanned = _ready(partial(_scanned, plain), key, params, pieces)
    return [
        compare("clip_over_plain", _ready(clipped, key, params, batch), whole, repeats=REPEATS, target=1.25),
        compare(
            "clip_over_plain_in_scan",
            _ready(partial(_scanned, clipped), key, params, pieces),
            scanned,
            repeats=REPEATS,
            target=1.25,
        ),
        compare(
            "scan_over_unrolled",
            scanned,
            _ready(partial(_unrolled, plain), key, params, pieces),
            repeats=REPEATS,
            target=1.3,
        ),
        compare(
            "vmapped_clients_over_batch",
            _ready(jax.vmap(plain, (None, 0, 0)), key, clients, pieces),
            whole,
            repeats=REPEATS,
            target=1.6,
        ),
        compare("plain_lax_in_scan_over_ours", *_gradients_in_scan(keys.stream(root, "one layer"), 28, 32), repeats=3),
        compare("plain_lax_on_2x2_over_ours", *_gradients_in_scan(keys.stream(root, "small"), 2, 64), repeats=3),
    ]


def _batch(key: Key) -> Batch:
    image = jax.random.uniform(key, (NUM_EXAMPLES, 28, 28, 1))
    return Batch(image, jnp.arange(NUM_EXAMPLES) % 2, jnp.ones(NUM_EXAMPLES, bool))


def _ready(function: Callable, *arguments: Any) -> Callable[[], Any]:
    return partial(jax.jit(function), *arguments)


def _step(gradient: Gradient, key: Key, params: Params, batch: Batch) -> Params:
    return trees.subtract(params, trees.scale(gradient(key, params, batch), LEARNING_RATE))


def _scanned(gradient: Gradient, key: Key, params: Params, pieces: Batch) -> Params:
    return lax.scan(lambda params, piece: (_step(gradient, key, params, piece), None), params, pieces)[0]


def _unrolled(gradient: Gradient, key: Key, params: Params, pieces: Batch) -> Params:
    for i in range(NUM_PIECES):
        params = _step(gradient, key, params, jax.tree.map(lambda x, i=i: x[i], pieces))
    return params


def _gradients_in_scan(key: Key, size: int, channels: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Plain `lax` and ours: both gradients of one layer, size x size, channels -> 64, in a scan of 4 x 16."""
    image = jax.random.normal(key, (NUM_PIECES, NUM_EXAMPLES // NUM_PIECES, size, size, channels))
    kernel = jax.random.normal(key, (3, 3, channels, 64))

    def by_lax(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradients(convolution: Callable, image: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient = jax.grad(lambda image, kernel: jnp.sum(jnp.square(convolution(image, kernel))), (0, 1))
        return lax.map(lambda piece: gradient(piece, kernel), image)

    by_lax_in_scan, ours = (_ready(partial(gradients, f), image, kernel) for f in (by_lax, ops.conv))
    return by_lax_in_scan, ours
