"""Every architecture of `experiments.zoo` at width 32 on 32 x 32 x 3, ten classes, pruned by half.

Three rows each, none of which compares with somebody else:

- NAME_parameters: parameters once 50 % of the units of every layer are gone (uniform, L2), over the dense model's;
- NAME_analysis: seconds of the first `find_channels`, over the 5 s it may take;
- NAME_difference: max |masked - shrunk| of the logits of four random images, over 1e-5 max(1, max |logit|), in
  millionths. Parameters are drawn so that no bias is zero and no scale one.

Command: python -m experiments.bench coupling.
Cost: about two minutes on 2 CPU cores.
"""

import sys
import time

import jax
import numpy as np

from experiments.bench.timing import Comparison
from experiments.zoo import ARCHITECTURES, away_from_zero_and_one
from fedrobust import compression, trees

WIDTH, NUM_CLASSES = 32, 10
SHAPE = (32, 32, 3)
MAX_SECONDS = 5.0
TOLERANCE = 10.0  # millionths


def run() -> list[Comparison]:
    """Measures; see the module's first lines."""
    return [row for name in ARCHITECTURES for row in _rows(name)]


def _rows(name: str) -> list[Comparison]:
    model = ARCHITECTURES[name](WIDTH, NUM_CLASSES)
    one = jax.ShapeDtypeStruct((1, *SHAPE), np.float32)
    params = away_from_zero_and_one(model, one)
    start = time.perf_counter()
    channels = compression.find_channels(model.apply, params, one)
    seconds = time.perf_counter() - start
    masks = compression.masks(channels, params, sparsity=0.5)
    small = compression.slice_tree(channels, masks, params)
    image = jax.random.uniform(jax.random.key(0), (4, *SHAPE))
    difference = compression.max_difference(model.apply, channels, params, masks, image)
    largest = float(np.abs(jax.jit(model.apply)(trees.multiply(params, masks), image)).max())
    print(f"{name}: {seconds:.2f} s, {difference:.1e}", file=sys.stderr, flush=True)
    return [
        Comparison(f"{name}_parameters", trees.size(small), trees.size(params), "parameters", None, 1),
        Comparison(f"{name}_analysis", seconds, MAX_SECONDS, "s", 1.0, 1),
        Comparison(f"{name}_difference", 1e6 * difference, TOLERANCE * max(1.0, largest), "1e-6", 1.0, 1),
    ]
