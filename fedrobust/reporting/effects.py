"""What each method changes where it is added: paired differences over seeds, with intervals."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fedrobust import intervals
from fedrobust.reporting import summary
from fedrobust.reporting.rows import Combination, Row
from fedrobust.reporting.tables import NOTHING, Table

CONFIDENCE = 0.95

Figure = Callable[[Row], float | None]


class _Pair(NamedTuple):
    """Two combinations that differ in one method. Attributes: added, the method; to, without it; rows, by seed."""

    added: str
    to: str
    rows: list[tuple[Row, Row]]


def effects_table(rows: Sequence[Row]) -> Table:
    """A line for every two combinations that differ in one method and share at least two seeds.

    Args:
        rows: `Row`s of one study.

    Returns:
        `Table`, empty where no two seeds are shared. In points of percent: the figure with the method minus the figure
        without it, mean over seeds, and the interval in which the mean over all seeds lies with confidence 0.95 if
        differences are normal (Student's t).
    """
    columns = [
        (("clean", "acc"), summary.clean_figure("accuracy")),
        (("clean", "bal"), summary.clean_figure("balanced_accuracy")),
        (("clean", "AUC"), summary.clean_figure("auc")),
        *_robust_columns(rows),
    ]
    lines = [
        [pair.added, pair.to, *(_cell(pair.rows, figure) for _, figure in columns), str(len(pair.rows))]
        for pair in _pairs(rows)
    ]
    header = [("", "adding"), ("", "to"), *(name for name, _ in columns), ("", "seeds")]
    return Table(header, lines, [_NOTE], num_labels=2)


_NOTE = (
    "Change by the method, in points of %: mean over paired seeds [95 % interval by Student's t]; an interval without 0"
    " says more than chance, of one line: of twenty lines without any effect one says so too."
)


def _pairs(rows: Sequence[Row]) -> list[_Pair]:
    groups = summary.by_combination(rows)
    pairs = []
    for method in Combination._fields:
        for without, group in groups.items():
            having = without._replace(**{method: True})
            if getattr(without, method) or having not in groups:
                continue
            partner = {row["seed"]: row for row in groups[having]}
            shared = [(row, partner[row["seed"]]) for row in group if row["seed"] in partner]
            if len(shared) > 1:
                pairs.append(_Pair(method.upper(), without.label, shared))
    return pairs


def _robust_columns(rows: Sequence[Row]) -> list[tuple[tuple[str, str], Figure]]:
    """Accuracy, plain and balanced, at the largest radius of each norm."""
    largest = dict(summary.radii(rows))  # of one norm the last entry, its largest radius, stays
    return [
        ((f"{summary.norm_text(norm)} {summary.radius_text(norm, eps)}", name), summary.robust_figure(norm, eps, field))
        for norm, eps in largest.items()
        for name, field in (("acc", "accuracy"), ("bal", "balanced_accuracy"))
    ]


def _cell(pairs: Sequence[tuple[Row, Row]], figure: Figure) -> str:
    values = [(figure(without), figure(having)) for without, having in pairs]
    change = [100 * (y - x) for x, y in values if x is not None and y is not None]
    if len(change) < 2:
        return NOTHING
    low, high = intervals.of_mean(change, CONFIDENCE)
    return f"{np.mean(change):+.1f} [{low:+.1f}, {high:+.1f}]"
