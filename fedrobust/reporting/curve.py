"""What privacy costs: one table and one figure of AUC against epsilon."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fedrobust.reporting import summary
from fedrobust.reporting.plots import new_figure, save_figure
from fedrobust.reporting.tables import NOTHING, Table, percent

POINT_FIELDS: Mapping[str, tuple[str, ...]] = {
    "experiment": (),
    "seed": (),
    "config": (),
    "config_hash": (),
    "clean": ("accuracy", "balanced_accuracy", "auc", "degenerate"),
    "val": ("accuracy", "balanced_accuracy", "auc", "degenerate"),
    "privacy": ("noise", "budget", "epsilon", "delta", "unit", "relation", "sampling", "noise_multiplier"),
    "history": ("round", "val_loss", "val_accuracy"),
    "train_seconds": (),
    "versions": (),
    "device": (),
}
"""A row of the curve: `clean` on test, `val` on val, `privacy` None without it, its `budget` the epsilon asked for, its
`noise` "silo" or "secure_sum". The rest as in `Row`."""

Point = dict[str, Any]
"""A row with `POINT_FIELDS`."""

LOOKS = {"silo": ("#0072B2", "o", "own noise in each silo"), "secure_sum": ("#D55E00", "s", "shares of it, secure sum")}
"""Colour, marker and name of each curve; Okabe and Ito's palette as in `plots`."""

_BASELINE = "#000000"


def epsilon_table(rows: Sequence[Point]) -> Table:
    """A line for every epsilon and noise, no privacy first, then by falling epsilon.

    Args:
        rows: `Point`s, any number of seeds.

    Returns:
        `Table`. Figures on test in percent, mean ± sample standard deviation over seeds; "lost" is AUC without privacy
        minus AUC with it, paired by seed, in points.
    """
    groups = _groups(rows)
    plain = {row["seed"]: row["clean"]["auc"] for row in groups.get((math.inf, ""), ())}

    def lost(row: Point) -> float | None:
        before, after = plain.get(row["seed"]), row["clean"]["auc"]
        return None if before is None or after is None or not row["privacy"] else before - after

    figures = (*(summary.clean_figure(name) for name in ("auc", "balanced_accuracy", "accuracy")), lost)
    lines = []
    for (epsilon, noise), group in groups.items():
        multiplier = summary.spread(group, lambda row: (row["privacy"] or {}).get("noise_multiplier"))
        lines.append(
            [
                "∞" if epsilon == math.inf else f"{epsilon:g}",
                LOOKS[noise][2] if noise else NOTHING,
                *(percent(summary.spread(group, figure)) for figure in figures),
                f"{multiplier.mean:.2f}" if multiplier else NOTHING,
                str(len(group)),
            ]
        )
    names = ("ε", "noise", "AUC", "bal", "acc", "AUC lost", "σ", "seeds")
    return Table([("", name) for name in names], lines, _notes(rows), num_labels=2)


def auc_against_epsilon(rows: Sequence[Point], path: Path | str) -> Path:
    """AUC against epsilon, a line per noise: means over seeds, a dot for each seed; no privacy is the dashed line.

    Args:
        rows: `Point`s, at least one.
        path: where the PNG goes; its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("no row to plot")
    groups = _groups(rows)
    budgets = sorted({epsilon for epsilon, _ in groups if epsilon < math.inf})
    end = (budgets[-1] if budgets else 1.0) * 2.5  # where infinity is drawn
    figure, (panel,) = new_figure(1, width=5.2, margin=0.2)
    for noise, (color, marker, name) in LOOKS.items():
        points = [(epsilon, groups[epsilon, noise]) for epsilon in budgets if (epsilon, noise) in groups]
        if points:
            _line(panel, points, color, marker, name)
    plain = groups.get((math.inf, ""))
    if plain:
        mean = np.mean(_auc(plain))
        panel.axhline(mean, color=_BASELINE, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        panel.plot(end, mean, "D", color=_BASELINE, markersize=6, zorder=4)
        panel.plot([end] * len(plain), _auc(plain), ".", color=_BASELINE, alpha=0.45, zorder=3)
        panel.annotate("no privacy", (end, mean), (-10, 4), textcoords="offset points", ha="right", va="bottom")
    panel.set_xscale("log")
    ticks = [*budgets, *([end] if plain else [])]
    panel.set_xticks(ticks, ["∞" if tick == end else f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("ε of one record (more private to the left)")
    panel.set_ylabel("test AUC (%)")
    if budgets:
        panel.legend(loc="lower right", frameon=False)
    return save_figure(figure, path)


def _line(panel: Axes, points: Sequence[tuple[float, Sequence[Point]]], color: str, marker: str, name: str) -> None:
    x = [epsilon for epsilon, _ in points]
    panel.plot(x, [np.mean(_auc(group)) for _, group in points], color=color, marker=marker, label=name, zorder=4)
    for epsilon, group in points:
        panel.plot([epsilon] * len(group), _auc(group), ".", color=color, alpha=0.45, zorder=3)


def _auc(group: Sequence[Point]) -> np.ndarray:
    """AUC of each row in percent, NaN where it has none."""
    return 100 * np.asarray([row["clean"]["auc"] for row in group], float)


def _groups(rows: Sequence[Point]) -> dict[tuple[float, str], list[Point]]:
    """Rows by (epsilon, noise): no privacy, (inf, ""), first, then by falling epsilon, noises in the order of LOOKS."""
    groups: dict[tuple[float, str], list[Point]] = {}
    for row in rows:
        privacy = row["privacy"]
        groups.setdefault((privacy["budget"], privacy["noise"]) if privacy else (math.inf, ""), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (-item[0][0], ["", *LOOKS].index(item[0][1]))))


def _notes(rows: Sequence[Point]) -> list[str]:
    notes = [
        "AUC, bal, acc: on test in %, bal the mean of the classes' accuracies; mean over seeds ± standard deviation."
        " AUC lost: points below the federation without privacy, paired by seed. σ: noise multiplier of the plan."
    ]
    guarantees = dict.fromkeys(
        f"δ = {row['privacy']['delta']:.2g}, {row['privacy']['unit']} level, {row['privacy']['relation']},"
        f" {row['privacy']['sampling']} sampling"
        for row in rows
        if row["privacy"]
    )
    notes += [f"ε: of each silo, at {text}." for text in guarantees]
    kinds = {row["privacy"]["noise"] for row in rows if row["privacy"]}
    if "silo" in kinds:
        notes.append(f"{LOOKS['silo'][2]}: the guarantee holds against the server and all other silos together.")
    if "secure_sum" in kinds:
        notes.append(
            f"{LOOKS['secure_sum'][2]}: it holds for the sum over all silos alone, against an honest but curious server"
            " that sees nothing else, while no silo colludes or drops out."
        )
    return notes
