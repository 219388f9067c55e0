"""The decision threshold of a two-class model."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedrobust import check


def best_shift(margins: Sequence[npt.ArrayLike], label: npt.ArrayLike) -> float:
    """What to add to the logit of class 1 so that balanced accuracy is highest.

    Where classes are unequal, or training weighs them, scores can rank well (AUC) and yet lie on one side of 0. The
    shift is read off held-out examples, never from those that are tested.

    Args:
        margins: one or more [N] arrays, logit of class 1 minus logit of class 0, of the same examples: clean, and under
            attack where robustness counts too.
        label: [N] int, 0 or 1; both must occur.

    Returns:
        The shift: the middle of the longest stretch on which the mean balanced accuracy over `margins` is largest.

    Raises:
        ValueError: no margins, margins of another length, one that is not finite, or labels other than both 0 and 1.

    >>> best_shift([[-3.0, -2.0, -1.0, -0.5]], [0, 0, 1, 1])
    1.5
    """
    label = np.asarray(label)
    check.at_least("the number of margins", len(margins), 1)
    check.require(set(np.unique(label)) == {0, 1}, "label", np.unique(label).tolist(), "both 0 and 1")
    shapes = [np.shape(margin) for margin in margins]
    check.require({*shapes} == {label.shape}, "the shapes of margins", shapes, f"all {label.shape}")
    values = np.asarray(margins, np.float64)
    check.require(bool(np.isfinite(values).all()), "margins", "not finite", "finite")
    edges = np.unique(-values)  # between two of these shifts no prediction changes
    outer = [edges[0] - 1, *edges, edges[-1] + 1]
    middles = (np.array(outer[:-1]) + np.array(outer[1:])) / 2
    positive, negative = values[:, label == 1], values[:, label == 0]
    score = [np.mean(positive + shift > 0) + np.mean(negative + shift < 0) for shift in middles]
    best = np.flatnonzero(np.asarray(score) >= max(score) - 1e-12)
    lengths = np.diff(outer)[best]
    return float(middles[best[np.argmax(lengths)]])
