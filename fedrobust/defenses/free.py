"""Free adversarial training: a batch is replayed, and every gradient serves the parameters and the samples at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from fedrobust import check, trees
from fedrobust.types import Batch, ClientUpdate, GradFn, Key, Loss, Params

Radius = float | jax.Array
"""A Python number, checked when it is built with, or a JAX scalar (a warm-up inside `jit`), which is not."""


class Ascent(NamedTuple):
    """How samples move from replay to replay; every row from its own image alone.

    Attributes:
        start: `(key, image[B,H,W,C]) -> point[B,H,W,C]`, row i from `fold_in(key, i)`.
        step: `(image, point, gradient) -> point`, all [B,H,W,C]; the gradient of a row's loss, up to a factor > 0.
    """

    start: Callable[[Key, jax.Array], jax.Array]
    step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class ReplayInfo(NamedTuple):
    """Diagnostics of one replay. Attributes: loss: [] mean loss of the real examples at their points, 0 for none."""

    loss: jax.Array


def linf_ascent(*, eps: Radius, step_size: Radius, random_start: bool) -> Ascent:
    """Sign steps inside the linf ball and the box.

    Args:
        eps: radius >= 0 in units of the image range [0, 1].
        step_size: length of a step >= 0, in the same units; eps in the paper.
        random_start: start uniformly inside the ball, not at the clean image, on which the first replay then trains.

    Returns:
        An `Ascent`. A zero or NaN gradient leaves the pixel where it is.

    Raises:
        ValueError: a number that is negative or not finite.
    """
    for name, radius in (("eps", eps), ("step_size", step_size)):
        if not isinstance(radius, jax.Array):
            check.non_negative(name, radius)

    def cut(image: jax.Array, point: jax.Array) -> jax.Array:
        return jnp.clip(point, jnp.maximum(image - eps, 0), jnp.minimum(image + eps, 1))

    def start(key: Key, image: jax.Array) -> jax.Array:
        if not random_start:
            return image
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(image.shape[0]))
        draw = jax.vmap(lambda k: jax.random.uniform(k, image.shape[1:], image.dtype, -1, 1))(keys)
        return cut(image, image + eps * draw)

    def step(image: jax.Array, point: jax.Array, gradient: jax.Array) -> jax.Array:
        return cut(image, point + step_size * jnp.sign(jnp.nan_to_num(gradient)))

    return Ascent(start, step)


def free_update(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ascent: Ascent,
    *,
    num_replays: int,
    skip_empty: bool,
    private: Callable[[int], GradFn] | None = None,
) -> ClientUpdate:
    """Local training in which each of S batches is taken m times in a row, while its samples are moved.

        for every batch:  x' = start(x);  m times:  g, h = gradients of the loss at (params, x') in params and in x'
                          params = optimizer(params, g);  x' = step(x, x', h)

    Under privacy every replay is noised. What a record adds to a replay is a function of that record, its own point and
    the parameters: and the point, in turn, of that record and the noised parameters of the replays before, from which
    anyone could compute it, were the record known. So given what was released, one record moves each sum by its clip
    norm and no more, and the m sums of a batch are m Gaussian mechanisms chosen one after the other, on one sample.
    `privacy.private_grad(num_replays=m)` noises them so that together they cost the one step that the plan accounts.
    Points are never released, and forgotten with their batch: carried over, as in the paper, a record would start where
    another one ended.

    Args:
        loss: of the samples, such as a cross-entropy.
        optimizer: any optax optimizer; its state starts afresh in every round, and takes S * m steps.
        ascent: how samples move, such as `linf_ascent`.
        num_replays: m >= 1; 4 to 10 in the paper.
        skip_empty: as for `federated.local_update`; False under privacy.
        private: `num_replays -> GradFn`: `lambda m: private_grad(..., num_replays=m)`, of a clipped gradient of this
            loss. Samples are then no longer free: a clipped sum hides the gradients of the images, so that they take
            one more forward and backward pass. None for the mean gradient.

    Returns:
        A `ClientUpdate` `(key, params, batch[S,B]) -> (update, info[S,m])`; replay r of batch s draws from
        `fold_in(fold_in(key, s), r)`, and its start from `fold_in(fold_in(key, s), m)`.

    Raises:
        ValueError: num_replays < 1; skip_empty under privacy.

    Guarantees:
        Padding contributes exactly nothing, whatever it holds.

    Source: Shafahi et al. 2019 (arXiv 1904.12843), Algorithm 1. Deviation: perturbations start anew with each batch.
    """
    check.at_least("num_replays", num_replays, 1)
    allowed = "False under privacy, where an empty batch gets its noise like any other"
    check.require(private is None or not skip_empty, "skip_empty", skip_empty, allowed)
    gradients = _at_once(loss) if private is None else _apart(loss, private(num_replays), num_replays - 1)

    def update(key: Key, params: Params, batch: Batch) -> tuple[Params, Any]:
        chex.assert_rank([batch.image, batch.label, batch.mask], [5, 2, 2])

        def take(carry: tuple[Params, Any], xs: tuple[jax.Array, Batch]) -> tuple[tuple[Params, Any], Any]:
            of_batch = jax.random.fold_in(key, xs[0])
            one = _blank(xs[1])

            def replay(state: tuple[Params, Any, jax.Array], index: jax.Array) -> tuple[Any, Any]:
                local, memory, point = state
                at_point = one._replace(image=point)
                g, h, info = gradients(jax.random.fold_in(of_batch, index), index, local, at_point)
                change, memory = optimizer.update(g, memory, local)
                return (optax.apply_updates(local, change), memory, ascent.step(one.image, point, h)), info

            start = ascent.start(jax.random.fold_in(of_batch, num_replays), one.image)
            (local, memory, _), info = jax.lax.scan(replay, (*carry, start), jnp.arange(num_replays))
            new = (local, memory)
            return (trees.where(jnp.any(one.mask), new, carry) if skip_empty else new), info

        steps = jnp.arange(batch.mask.shape[0])
        (local, _), info = jax.lax.scan(take, (params, optimizer.init(params)), (steps, batch))
        return trees.subtract(local, params), info

    return update


_Gradients = Callable[[Key, jax.Array, Params, Batch], tuple[Params, jax.Array, Any]]
"""`(key, replay[] int32, params, batch) -> (gradient, gradient of the images[B,H,W,C], info)`."""


def _at_once(loss: Loss) -> _Gradients:
    """Both gradients of the mean loss over the real examples from one backward pass."""

    def gradients(key: Key, index: jax.Array, params: Params, batch: Batch) -> tuple[Params, jax.Array, ReplayInfo]:
        del index

        def mean_loss(params: Params, image: jax.Array) -> jax.Array:
            value = jnp.where(batch.mask, loss(key, params, image, batch.label), 0)
            return jnp.sum(value) / jnp.maximum(jnp.sum(batch.mask), 1)

        value, (g, h) = jax.value_and_grad(mean_loss, argnums=(0, 1))(params, batch.image)
        return g, h, ReplayInfo(value)

    return gradients


def _apart(loss: Loss, grad_fn: GradFn, num_ascents: int) -> _Gradients:
    """A private gradient, and that of the images by itself, which the last replay does not need."""

    def gradients(key: Key, index: jax.Array, params: Params, batch: Batch) -> tuple[Params, jax.Array, Any]:
        of_private, of_loss = jax.random.split(key)

        def of_images() -> jax.Array:
            return jax.grad(lambda x: jnp.sum(loss(of_loss, params, x, batch.label)))(batch.image)

        h = jax.lax.cond(index < num_ascents, of_images, lambda: jnp.zeros_like(batch.image))
        g, info = grad_fn(of_private, params, batch)
        return g, h, info

    return gradients


def _blank(batch: Batch) -> Batch:
    """Zeros in the place of padding, so that no NaN of it can travel."""
    image = jnp.where(batch.mask[:, None, None, None], batch.image, 0)
    return Batch(image, jnp.where(batch.mask, batch.label, 0), batch.mask)
