"""One side of a comparison in a process of its own: `python -m experiments.bench.sides NAME`.

It prints "ready" after two calls that are not counted, then answers each line it reads with the measure of one call:
milliseconds, or megabytes for the sides named *_memory, which make no call before.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.bench import torch_sides
from fedrobust import attacks, defenses, keys, losses, models, ops, privacy, trees
from fedrobust.types import Batch, Key, Loss, Params

NUM_EXAMPLES = 64
NUM_EXAMPLES_IN_MEMORY = 512
NUM_PIECES = 4
MICROBATCH_SIZE = 16
CLIP_NORM = 1.0

Step = Callable[[], Any]


def side(name: str) -> Step:
    """The function without arguments that is measured under this name; it returns when its result is there."""
    if name.startswith(("torch", "opacus")):
        return torch_sides.side(name, NUM_EXAMPLES, CLIP_NORM)
    if name.startswith("jax_privacy"):
        # The network as its users write it; this process runs nothing else.
        ops.conv = _lax_conv  # type: ignore[assignment]
    size = NUM_EXAMPLES_IN_MEMORY if name.endswith("_memory") else NUM_EXAMPLES
    root = keys.root(0)
    model = models.build("resnet9", builder="flax", image_shape=(28, 28, 1), num_classes=2, width=32)
    loss = losses.cross_entropy(model.apply)
    image = jax.random.uniform(keys.stream(root, "data"), (size, 28, 28, 1))
    batch = Batch(image, jnp.arange(size) % 2, jnp.ones(size, bool))
    params = model.init(keys.stream(root, "init"), image)
    pieces = jax.tree.map(lambda x: x.reshape(NUM_PIECES, -1, *x.shape[1:]), batch)
    if name.endswith("_clients"):
        params, batch = jax.tree.map(lambda x: jnp.stack([x] * NUM_PIECES), params), pieces
    if name == "plain_microbatched":
        batch = pieces
    function = _function(name, loss, model.apply)
    arguments = (keys.stream(root, "loss"), params, batch)
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def _function(name: str, loss: Loss, apply: Callable[[Params, jax.Array], jax.Array]) -> Callable[..., Any]:
    clipped = partial(_clipped, loss)
    match name:
        case "plain" | "plain_memory":
            return partial(_plain, loss)
        case "plain_microbatched":
            return partial(_accumulated, loss)
        case "plain_clients":
            return jax.vmap(partial(_plain, loss), (None, 0, 0))
        case "clipped":
            return clipped()
        case "clipped_microbatched":
            return clipped(microbatch_size=MICROBATCH_SIZE)
        case "clipped_clients":
            return jax.vmap(clipped(), (None, 0, 0))
        case "lean_memory":
            return clipped(method="norms_first", microbatch_size=MICROBATCH_SIZE)
        case "microbatched_memory":
            return clipped(microbatch_size=MICROBATCH_SIZE)
        case "pgd1" | "pgd7":
            return partial(_clipped, _robust(loss, apply, int(name[3:])))(microbatch_size=MICROBATCH_SIZE)
        case "jax_privacy" | "jax_privacy_microbatched":
            return _by_jax_privacy(loss, MICROBATCH_SIZE if name.endswith("_microbatched") else None)
    raise ValueError(f"side {name!r} is none of those that dp_step names")


def _plain(loss: Loss, key: Key, params: Params, batch: Batch) -> Params:
    return jax.grad(lambda p: jnp.mean(loss(key, p, batch.image, batch.label)))(params)


def _accumulated(loss: Loss, key: Key, params: Params, pieces: Batch) -> Params:
    """The sum of the gradients of all pieces, one after the other."""
    return lax.scan(
        lambda total, piece: (trees.add(total, _plain(loss, key, params, piece)), None),
        trees.zeros_like(params),
        pieces,
    )[0]


def _clipped(loss: Loss, **settings: Any) -> Callable[[Key, Params, Batch], Params]:
    gradient = privacy.clipped_grad(loss, clip_norm=CLIP_NORM, **settings)
    return lambda key, params, batch: gradient(key, params, batch)[0]


def _robust(loss: Loss, apply: Callable[[Params, jax.Array], jax.Array], num_steps: int) -> Loss:
    eps = 8 / 255
    attack = attacks.pgd(
        norm="linf", eps=eps, step_size=eps / 4, num_steps=num_steps, random_start=True, keep_best=False
    )
    return defenses.adversarial_loss(loss, apply, attack, clean_share=0.0)


def _by_jax_privacy(loss: Loss, microbatch_size: int | None) -> Callable[[Key, Params, Batch], Params]:
    import jax_privacy

    def mean_loss(params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
        return jnp.mean(loss(keys.root(0), params, image, label))

    gradient = jax_privacy.clipped_grad(
        mean_loss, l2_clip_norm=CLIP_NORM, batch_argnums=(1, 2), microbatch_size=microbatch_size
    )
    return lambda key, params, batch: gradient(params, batch.image, batch.label)


def _lax_conv(image: jax.Array, kernel: jax.Array, *, strides: int) -> jax.Array:
    order = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, (strides, strides), "SAME", dimension_numbers=order)


def _milliseconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _megabytes(step: Step) -> float:
    """What the call adds to the resident set at its peak; Linux keeps the high-water mark and resets it on request."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    step()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith(field)]
    return int(line.split()[1])


def main(name: str) -> None:
    """Answers until its input ends."""
    step = side(name)
    measure = _megabytes if name.endswith("_memory") else _milliseconds
    if measure is _milliseconds:
        step(), step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(measure(step), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
