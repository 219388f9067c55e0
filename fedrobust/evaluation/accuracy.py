"""Predictions of a model and what they are worth: accuracy per example, per class, and ranking."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from fedrobust import check, threads
from fedrobust.types import Params


class Metrics(NamedTuple):
    """How good a set of predictions is. Accuracy alone rewards a model that always predicts the larger class.

    Attributes:
        accuracy: share of examples predicted right, in [0, 1].
        balanced_accuracy: mean over the classes that occur of the share of that class predicted right, in [0, 1].
        auc: area under the ROC curve in [0, 1]: of the margin for two classes, one against the rest and averaged over
            classes for more. None when a class does not occur or a logit is not finite.
        degenerate: whether a single class is predicted for every example.
    """

    accuracy: float
    balanced_accuracy: float
    auc: float | None
    degenerate: bool


def predict(
    apply: Callable[[Params, jax.Array], jax.Array], params: Params, image: npt.ArrayLike, batch_size: int
) -> np.ndarray:
    """Logits of many images, in batches of one size.

    Args:
        apply: `(params, image[B,H,W,C]) -> logits[B,L]`; compiled once, for `batch_size` images.
        params: its parameters.
        image: [N,H,W,C] float32 in [0, 1], N >= 1.
        batch_size: images per call >= 1; the last batch is filled up with zeros that are cut off again.

    Returns:
        [N,L] float32, on the host.

    Raises:
        ValueError: no image; batch_size not a whole number >= 1.
    """
    image = np.asarray(image)
    check.at_least("the number of images", len(image), 1)
    check.at_least("batch_size", batch_size, 1)
    compiled = jax.jit(apply)
    batches = [pad(image[i : i + batch_size], batch_size) for i in range(0, len(image), batch_size)]
    with threads.COMPILING:
        first = compiled(params, batches[0])
    logits = [first, *(compiled(params, batch) for batch in batches[1:])]
    return np.concatenate([np.asarray(x) for x in logits])[: len(image)]


def pad(rows: np.ndarray, size: int) -> np.ndarray:
    """Zeros appended to `rows` [n,...], n <= size, up to [size,...]."""
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])


def predicted_class(logits: npt.ArrayLike) -> np.ndarray:
    """The class with the largest logit, [N] int; -1, which is never right, for a row that holds a NaN."""
    logits = np.asarray(logits, np.float64)
    return np.where(np.isnan(logits).any(axis=1), -1, np.argmax(logits, axis=1))


def metrics(logits: npt.ArrayLike, label: npt.ArrayLike) -> Metrics:
    """All of `Metrics`, in float64.

    Args:
        logits: [N,L], N >= 1, L >= 2. A row with a NaN counts as wrong.
        label: [N] int in [0, L).

    Returns:
        `Metrics`.

    Raises:
        ValueError: N is 0, or the lengths differ, or a label is out of range.

    >>> metrics([[0.0, 1.0], [0.0, 2.0]], [1, 0])
    Metrics(accuracy=0.5, balanced_accuracy=0.5, auc=0.0, degenerate=True)
    """
    logits, label = np.asarray(logits, np.float64), np.asarray(label)
    check.require(logits.ndim == 2 and logits.shape[1] >= 2, "the shape of logits", logits.shape, "[N, L >= 2]")
    check.require(
        label.size == 0 or 0 <= label.min() <= label.max() < logits.shape[1],
        "label",
        (label.min(initial=0), label.max(initial=0)),
        f"in [0, {logits.shape[1]})",
    )
    prediction = predicted_class(logits)
    accuracy, balanced = accuracies(prediction, label)
    return Metrics(accuracy, balanced, _auc(logits, label), is_degenerate(prediction))


def accuracies(prediction: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """Accuracy and balanced accuracy of [N] predicted classes.

    Raises:
        ValueError: no example, or the lengths differ.
    """
    check.at_least("the number of examples", len(label), 1)
    check.require(prediction.shape == label.shape, "the shape of predictions", prediction.shape, f"{label.shape}")
    right = prediction == label
    return float(np.mean(right)), float(np.mean([np.mean(right[label == c]) for c in np.unique(label)]))


def is_degenerate(prediction: np.ndarray) -> bool:
    """Whether all examples got one class."""
    return len(np.unique(prediction)) == 1


def _auc(logits: np.ndarray, label: np.ndarray) -> float | None:
    num_classes = logits.shape[1]
    if len(np.unique(label)) < num_classes or not np.isfinite(logits).all():
        return None
    if num_classes == 2:
        return float(roc_auc_score(label, logits[:, 1] - logits[:, 0]))
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    share: Any = weight / weight.sum(axis=1, keepdims=True)
    return float(np.mean([roc_auc_score(label == c, share[:, c]) for c in range(num_classes)]))
