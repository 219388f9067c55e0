"""Whether a model has learned to fool one step of an attack: catastrophic overfitting, seen from outside."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedrobust import check, threads
from fedrobust.evaluation.accuracy import pad, predicted_class
from fedrobust.types import Attack, Dataset, Key, Params

Apply = Callable[[Params, jax.Array], jax.Array]


class OneStepGap(NamedTuple):
    """Accuracies under attack with one step and with many.

    Attributes:
        one_step: share of examples right on the clean image and under the one step, in [0, 1].
        many_steps: likewise under many steps.
        gap: share that is right under the one step and wrong under many, in [0, 1].
        overfitted: whether the gap exceeds what was allowed: one step says nothing about many.
    """

    one_step: float
    many_steps: float
    gap: float
    overfitted: bool


def one_step_gap(
    apply: Apply,
    params: Params,
    dataset: Dataset,
    key: Key,
    *,
    one_step: Attack,
    many_steps: Attack,
    max_gap: float,
    batch_size: int,
) -> OneStepGap:
    """Compares an attack of one step with one of many, at the same radius, on images that were held out.

    Training with single steps can end, within a few updates, in a model whose loss is so bent around each image that
    one step finds nothing and many steps find everything. Accuracy under the attack it trains with keeps rising
    meanwhile, so that only a look with another attack shows it. To be called between rounds; what it reports about
    private images has to be paid for, like any other look at them.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`; compiled once per pair of attacks: keep the attacks.
        params: its parameters.
        dataset: held out, N >= 1.
        key: shape (). Example i draws from `fold_in(key, i)`, whatever the batch size.
        one_step: such as FGSM at the radius of training.
        many_steps: such as PGD with 10 steps or more, at the same radius.
        max_gap: in [0, 1), such as 0.2. On digits at 0.13 (small CNN, 300 steps, one seed, 2026-11) training with
            PGD-3, one step, TRADES or replays left 0.09 to 0.16. Without adversarial training it was 0.31: a model that
            nobody trained for one step fools it all the same; the flag says only that one step is not to be believed.
        batch_size: images per call >= 1.

    Returns:
        `OneStepGap`.

    Raises:
        ValueError: no example, or a setting out of range.

    Source: Wong, Rice, Kolter 2020 (arXiv 2001.03994), who stop training by its accuracy under PGD.
    """
    image, label = np.asarray(dataset.image), np.asarray(dataset.label)
    check.at_least("the number of examples", len(label), 1)
    check.at_least("batch_size", batch_size, 1)
    check.fraction("max_gap", max_gap, one=False)
    parts = []
    for start in range(0, len(label), batch_size):
        rows = slice(start, start + batch_size)
        index = np.arange(start, start + batch_size, dtype=np.int32)
        batch = pad(image[rows], batch_size), pad(label[rows], batch_size)
        with threads.COMPILING:
            parts.append(np.asarray(_logits(apply, (one_step, many_steps), params, key, index, *batch)))
    logits = np.concatenate(parts, axis=1)[:, : len(label)]
    clean, one, many = (predicted_class(x) == label for x in logits)
    one, many = one & clean, many & clean
    gap = float(np.mean(one & ~many))
    return OneStepGap(float(np.mean(one)), float(np.mean(many)), gap, gap > max_gap)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    apply: Apply,
    attacks: tuple[Attack, ...],
    params: Params,
    key: Key,
    index: jax.Array,
    image: jax.Array,
    label: jax.Array,
) -> jax.Array:
    """[1 + attacks,B,L]: of the clean images and under each attack, every example a batch of its own."""

    def logits_fn(x: jax.Array) -> jax.Array:
        return apply(params, x)

    def one(index: jax.Array, image: jax.Array, label: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, index)
        found = [attack(own, logits_fn, image[None], label[None]) for attack in attacks]
        return jnp.concatenate([logits_fn(x) for x in (image[None], *found)])

    return jax.vmap(one, out_axes=1)(index, image, label)
