"""What tables and figures both need: rows by combination, names of combinations, radii, spread over seeds."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fedrobust.reporting.rows import Combination, Row

NOT_RULES = ("attack", "malicious_share", "rounds_share", "mean")
"""What a row's `poisoned` holds beside the one robust rule."""


class Spread(NamedTuple):
    """A figure over seeds: mean, sample standard deviation (None for one seed)."""

    mean: float
    std: float | None


def by_combination(rows: Iterable[Row]) -> dict[Combination, list[Row]]:
    """Rows grouped by combination, in the order plain, MC, AT, AT + MC, DP, ..."""
    groups: dict[Combination, list[Row]] = {}
    for row in rows:
        groups.setdefault(Combination(**row["combination"]), []).append(row)
    return dict(sorted(groups.items()))


def spread(rows: Sequence[Row], figure: Callable[[Row], float | None]) -> Spread | None:
    """A figure's mean and spread over the rows that have it; None where none has."""
    values = [value for value in map(figure, rows) if value is not None]
    if not values:
        return None
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


def radii(rows: Iterable[Row]) -> list[tuple[str, float]]:
    """Every (norm, eps) attacked in any row, by norm ("linf" first), then radius."""
    found = {(entry["norm"], entry["eps"]) for row in rows for entry in row["robust"].values()}
    return sorted(found, key=lambda case: (case[0] != "linf", case))


def robust_figure(norm: str, eps: float, field: str) -> Callable[[Row], float | None]:
    """`row -> figure` under the attack of one norm and radius with the lowest accuracy: the worst case where taken."""

    def figure(row: Row) -> float | None:
        entries = [entry for entry in row["robust"].values() if (entry["norm"], entry["eps"]) == (norm, eps)]
        return min(entries, key=lambda entry: entry["accuracy"])[field] if entries else None

    return figure


def clean_figure(field: str) -> Callable[[Row], float | None]:
    """`row -> figure` on clean images."""
    return lambda row: row["clean"][field]


def radius_text(norm: str, eps: float) -> str:
    """A radius as the field writes it: "8/255" where it is one (Linf), else two significant digits."""
    levels = eps * 255
    if norm == "linf" and levels >= 1 and abs(levels - round(levels)) < 1e-4:
        return f"{round(levels)}/255"
    return f"{eps:.2g}"


def norm_text(norm: str) -> str:
    """A norm as the field writes it."""
    return {"linf": "L∞", "l2": "L2"}.get(norm, norm)


def robust_rule(row: Row) -> str | None:
    """The name of the robust rule a row was poisoned under."""
    names = [name for name in row["poisoned"] or {} if name not in NOT_RULES]
    return names[0] if names else None


def split_name(rows: Iterable[Row]) -> str:
    """Of the split that the rows' accuracies are of: "test", or "validation" where any is of that."""
    return "validation" if any(row["config"].get("split") == "val" for row in rows) else "test"


def ratio_text(ratio: float) -> str:
    """A size over the dense one, as in "1/8.3"; 1 for no change.

    >>> ratio_text(0.12)
    '1/8.3'
    """
    if ratio >= 0.995:
        return f"{ratio:.3g}"
    smaller = 1 / ratio
    return f"1/{smaller:.0f}" if smaller >= 10 else f"1/{smaller:.1f}"


def is_degenerate(row: Row) -> bool:
    """Whether the model predicts one class for every clean image."""
    return bool(row["clean"]["degenerate"])


def failed_checks(row: Row) -> list[str]:
    """The checks of a row's robust accuracies that failed, each once: one is enough to call them overestimated."""
    return list(dict.fromkeys(check["check"] for check in row["checks"] if check["outcome"] == "failed"))


def is_whole_gate(row: Row) -> bool:
    """Whether its checks hold those that other attacks ask, see `evaluation.gate`, and not those of the model alone."""
    return any(check["check"] == "auto_pgd_finds_no_more" for check in row["checks"])
