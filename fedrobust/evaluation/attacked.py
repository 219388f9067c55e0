"""One attack on one data set: what was found, and what the model as it is served says of it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedrobust import check, threads
from fedrobust.evaluation.accuracy import predict, predicted_class
from fedrobust.types import Dataset, Key, Params, Run

Apply = Callable[[Params, jax.Array], jax.Array]
Attack = Callable[[jax.Array], Run]
"""From a radius, which is traced (one program serves all radii), to an attack on many images.

Keep the function, not a copy of it, from one model to the next: it is what a compiled program is remembered by.
"""


_LENGTHS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "linf": lambda delta: delta.max(axis=1),
    "l2": lambda delta: np.sqrt((delta**2).sum(axis=1)),
    "l1": lambda delta: delta.sum(axis=1),
}
NORMS = tuple(_LENGTHS)


class Outcome(NamedTuple):
    """What an attack did to N examples.

    Attributes:
        image: [N,H,W,C] float32; the clean image where nothing was attacked.
        prediction: [N] int, what the served model says of it.
        found: [N] bool, where the attack reports a success.
        distance: [N] float64, from the clean image, in the norm of the attack.
        outside: how far the worst image lies outside the ball or the box; 0 for none.
        num_queries: [N] int.
    """

    image: np.ndarray
    prediction: np.ndarray
    found: np.ndarray
    distance: np.ndarray
    outside: float
    num_queries: np.ndarray


def attack_all(
    apply: Apply,
    params: Params,
    dataset: Dataset,
    attack: Attack,
    *,
    norm: str,
    eps: float,
    todo: np.ndarray,
    key: Key,
    batch_size: int,
) -> Outcome:
    """Attacks the examples that are to be attacked.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`, the model as it is served.
        params: its parameters.
        dataset: N examples.
        attack: see `Attack`; compiled once for an `apply`, its shapes and N.
        norm: of the ball.
        eps: its radius >= 0.
        todo: [N] bool; nothing is computed for the others.
        key: shape (). Example i draws from `fold_in(key, i)`.
        batch_size: of the prediction on what was found.

    Returns:
        An `Outcome`.
    """
    with threads.COMPILING:
        found = jax.device_get(_run(apply, attack, params, np.float32(eps), key, dataset.image, dataset.label, todo))
    delta = np.abs(found.image.astype(np.float64) - dataset.image).reshape(len(todo), -1)
    distance = _LENGTHS[norm](delta)
    low, high = float(found.image.min()), float(found.image.max())
    beyond = float(np.max([0.0, (distance - eps).max(), -low, high - 1]))  # NaN where the image holds one
    logits = predict(apply, params, found.image, batch_size)
    return Outcome(found.image, predicted_class(logits), found.wrong, distance, beyond, found.num_queries)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    apply: Apply,
    attack: Attack,
    params: Params,
    eps: jax.Array,
    key: Key,
    image: jax.Array,
    label: jax.Array,
    todo: jax.Array,
) -> Any:
    return attack(eps)(key, lambda x: apply(params, x), image, label, todo)


def require_attackable(dataset: Dataset, logits: np.ndarray) -> None:
    """Refuses data and models that robustness has no meaning for.

    Args:
        dataset: what would be attacked.
        logits: [N,L], what the model says of it.

    Raises:
        ValueError: images outside [0, 1] or NaN, labels out of range, no logits for each class, NaN logits,
            probabilities instead of logits; one line each.
    """
    require_in_range(dataset, logits.shape[1])
    num_bad = int((~np.isfinite(logits)).any(axis=1).sum())
    check.require(num_bad == 0, "the number of images whose logits are NaN or inf", num_bad, "0")
    share = probability_share(logits)
    check.require(share < 0.99, "the share of outputs that are probabilities", share, "below 0.99: give logits")


def require_in_range(dataset: Dataset, num_classes: int) -> None:
    """Refuses examples that no model of `num_classes` logits was made for.

    Args:
        dataset: N >= 1 examples.
        num_classes: L of the model.

    Raises:
        ValueError: images outside [0, 1] or NaN, labels out of range; one line each.
    """
    require_images(np.asarray(dataset.image))
    label = np.asarray(dataset.label)
    classes = (int(label.min()), int(label.max()))
    check.require(0 <= classes[0] <= classes[1] < num_classes, "label", classes, f"in [0, {num_classes})")


def require_images(image: np.ndarray) -> None:
    """Refuses images [N,H,W,C], N >= 1, with a pixel outside [0, 1] or NaN, by a `ValueError` of one line."""
    low, high = float(image.min()), float(image.max())
    check.require(0 <= low <= high <= 1, "the range of images", (low, high), "within [0, 1], without NaN")


def probability_share(logits: np.ndarray) -> float:
    """The share of rows in [0, 1] that sum to 1: a softmax before the loss flattens its gradients."""
    inside = np.all((logits >= 0) & (logits <= 1), axis=1, keepdims=True)
    total = np.where(inside, logits, 0).sum(axis=1)
    return float(np.mean(inside[:, 0] & (np.abs(total - 1) < 1e-3)))
