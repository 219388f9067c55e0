"""Whether a model computes every row of its logits from that row's image alone."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fedrobust.trace.axes import FROZEN, Graph, fixed
from fedrobust.trace.coupling import lay_out
from fedrobust.trace.program import read
from fedrobust.types import Params

_ROUNDING = 1e-6  # one program of one shape: rows that do not meet keep their bits


def ties_examples(apply: Callable[[Params, jax.Array], jax.Array], params: Params, image: Any) -> bool:
    """Whether an image changes the logits of another image in its batch, as under BatchNorm.

    Read from the axes: an example is a slice of the batch, and where nothing looks across the batch it could be removed
    like a channel. Where an operation without a rule stands in the way, two batches decide: of random images, under
    random parameters, one image replaced.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, any pure function that takes batches of two.
        params: a pytree of arrays or `jax.ShapeDtypeStruct`; values do not matter.
        image: [B,H,W,C], an array or a `jax.ShapeDtypeStruct`; only H, W, C and the dtype matter.

    Returns:
        False is a proof where it was read from the axes. A place in the batch that takes part (a position encoding of
        examples) is not looked for.
    """
    pair = jax.ShapeDtypeStruct((2, *image.shape[1:]), image.dtype)
    return not _stands_alone(apply, params, pair) and _moves(apply, params, pair)


def _stands_alone(apply: Callable[[Params, jax.Array], jax.Array], params: Params, image: Any) -> bool:
    program, graph = read(apply, params, image), Graph()
    inputs = [tuple(fixed(n) for n in program.values[i].shape) for i in program.inputs]
    batch = graph.fresh(len(inputs[-1][0].id))
    inputs[-1] = (batch, *inputs[-1][1:])
    layout = lay_out(graph, program, inputs)
    component = graph.components()
    rows = component[batch.id]
    return (
        FROZEN not in rows
        and len(set(rows)) == len(rows)
        and all(np.array_equal(component[layout.axes[output][0].id], rows) for output in program.outputs)
    )


def _moves(apply: Callable[[Params, jax.Array], jax.Array], params: Params, image: Any) -> bool:
    rng = np.random.default_rng(0)

    def draw(x: Any) -> np.ndarray:
        scale = np.sqrt(np.prod(x.shape[:-1])) if len(x.shape) > 1 else 1
        return np.asarray(rng.normal(size=x.shape) / scale, x.dtype)

    drawn, run = jax.tree.map(draw, params), jax.jit(apply)
    first, second, other = (np.asarray(rng.uniform(size=image.shape[1:]), image.dtype) for _ in range(3))
    pairs = (first, second), (first, other), (other, second)
    before, last_replaced, first_replaced = (np.asarray(run(drawn, np.stack(pair))) for pair in pairs)

    def same(a: np.ndarray, b: np.ndarray) -> bool:
        return np.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True)

    return not (same(before[0], last_replaced[0]) and same(before[1], first_replaced[1]))
