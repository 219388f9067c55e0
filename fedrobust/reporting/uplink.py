"""What small updates cost: one table and one figure of accuracy against bytes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedrobust import intervals
from fedrobust.reporting import summary
from fedrobust.reporting.plots import new_figure, save_figure
from fedrobust.reporting.tables import NOTHING, Table, percent

UPLINK_FIELDS: Mapping[str, tuple[str, ...]] = {
    "experiment": (),
    "way": ("name", "codec", "private"),
    "seed": (),
    "config": (),
    "config_hash": (),
    "clean": ("accuracy", "balanced_accuracy", "auc", "degenerate"),
    "val": ("accuracy", "balanced_accuracy", "auc", "degenerate"),
    "bytes": ("dense", "uplink", "downlink"),
    "privacy": ("epsilon", "delta", "unit", "relation", "sampling"),
    "history": ("round", "val_loss", "val_accuracy"),
    "train_seconds": (),
    "versions": (),
    "device": (),
}
"""A row of the study of codecs: `clean` on test; `way`, how updates were said; `bytes` per client and round, `dense`
those of float32 parameters. The rest as in `Row`."""

Sent = dict[str, Any]
"""A row with `UPLINK_FIELDS`."""

AIM, ALLOWED = 100, 0.01
"""The study's question: so many times fewer bytes for so much accuracy at most."""

_LOOKS = {False: ("#0072B2", "o"), True: ("#D55E00", "s")}  # by whether private: Okabe and Ito's palette as in `plots`


def uplink_table(rows: Sequence[Sent]) -> Table:
    """A line for every way to say updates, in the order they were first trained.

    Args:
        rows: `Sent`s, any number of seeds.

    Returns:
        `Table`. Figures on test in percent, mean ± sample standard deviation over seeds; "acc lost" is the accuracy of
        the way that says float32 minus this one's, paired by seed and within privacy or without; "reaches" says
        whether its mean is within the study's aim.
    """
    figures = [*(summary.clean_figure(name) for name in ("accuracy", "balanced_accuracy", "auc")), lost_of(rows)]
    lines = []
    for name, group in _groups(rows).items():
        lines.append(
            [
                name,
                *(percent(summary.spread(group, figure)) for figure in figures),
                *_bytes(group, "uplink"),
                *_bytes(group, "downlink"),
                _reaches(rows, group),
                str(len(group)),
            ]
        )
    names = ("acc", "bal", "AUC", "acc lost", "up, bytes", "fewer", "down, bytes", "fewer", "reaches", "seeds")
    return Table([("", "way"), *(("", name) for name in names)], lines, _notes(rows), num_labels=1)


def lost_of(rows: Sequence[Sent]) -> Callable[[Sent], float | None]:
    """`row -> accuracy lost` to float32 of the same seed and privacy; None where that was not trained."""
    plain = {(row["seed"], row["way"]["private"]): row["clean"]["accuracy"] for row in rows if _is_plain(row)}

    def lost(row: Sent) -> float | None:
        before = plain.get((row["seed"], row["way"]["private"]))
        return None if before is None or _is_plain(row) else before - row["clean"]["accuracy"]

    return lost


def accuracy_against_uplink(rows: Sequence[Sent], path: Path | str) -> Path:
    """Test accuracy against how many times fewer bytes a client sends; a dot per way, a small one for each seed.

    Args:
        rows: `Sent`s, at least one.
        path: where the PNG goes; its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("no row to plot")
    figure, (panel,) = new_figure(1, width=7.2, margin=0.2)
    panel.set_xscale("log")
    panel.set_xlim(0.7, 4 * max(AIM, *(_ratio(row, "uplink") for row in rows)))  # names stand right of their dots
    for name, group in _groups(rows).items():
        private = group[0]["way"]["private"]
        color, marker = _LOOKS[private]
        ratio = _mean(group, lambda row: _ratio(row, "uplink"))
        accuracy = [100 * row["clean"]["accuracy"] for row in group]
        panel.plot([ratio] * len(group), accuracy, ".", color=color, alpha=0.45, zorder=3)
        panel.plot(ratio, np.mean(accuracy), marker, color=color, zorder=4)
        panel.annotate(name, (ratio, np.mean(accuracy)), (5, 3), textcoords="offset points", fontsize=7, color=color)
    panel.axvline(AIM, color="#444444", linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    for private, (color, _) in _LOOKS.items():
        plain = [
            r["clean"]["accuracy"] for r in rows if (r["way"]["codec"], r["way"]["private"]) == ("identity", private)
        ]
        if plain:
            panel.axhline(100 * (np.mean(plain) - ALLOWED), color=color, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    panel.set_xlabel("times fewer bytes from a client than float32 (log)")
    panel.set_ylabel("test accuracy (%)")
    return save_figure(figure, path)


def _groups(rows: Sequence[Sent]) -> dict[str, list[Sent]]:
    groups: dict[str, list[Sent]] = {}
    for row in rows:
        groups.setdefault(row["way"]["name"], []).append(row)
    return groups


def _is_plain(row: Sent) -> bool:
    return row["way"]["codec"] == "identity"


def _mean(group: Sequence[Sent], figure: Callable[[Sent], float]) -> float:
    return float(np.mean([figure(row) for row in group]))


def _ratio(row: Sent, way: str) -> float:
    return row["bytes"]["dense"] / row["bytes"][way]


def _bytes(group: Sequence[Sent], way: str) -> list[str]:
    """Bytes, and how many times fewer than float32."""
    num_bytes, ratio = _mean(group, lambda row: row["bytes"][way]), _mean(group, lambda row: _ratio(row, way))
    return [f"{num_bytes:,.0f}", _times(ratio)]


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def _reaches(rows: Sequence[Sent], group: Sequence[Sent]) -> str:
    lost = summary.spread(group, lost_of(rows))
    if lost is None:
        return NOTHING
    small, near = _mean(group, lambda row: _ratio(row, "uplink")) >= AIM, lost.mean <= ALLOWED + 1e-9
    return "yes" if small and near else "no: " + " and ".join(["bytes"] * (not small) + ["accuracy"] * (not near))


def _notes(rows: Sequence[Sent]) -> list[str]:
    notes = [
        "acc, bal, AUC: on test in %, bal the mean of the classes' accuracies; mean over seeds ± standard deviation."
        " acc lost: points below float32 of the same seed. bytes: as serialised, of one client in one round, mean over"
        f" clients, rounds and seeds; fewer: than float32. reaches: at least {AIM}x fewer bytes up for at most"
        f" {100 * ALLOWED:g} point of mean accuracy."
    ]
    guarantees = dict.fromkeys(
        f"ε = {intervals.upper_text(row['privacy']['epsilon'], 3)}, δ = {row['privacy']['delta']:.2g},"
        f" {row['privacy']['unit']} level, {row['privacy']['relation']}, {row['privacy']['sampling']} sampling"
        for row in rows
        if row["privacy"]
    )
    return notes + [f"DP: each silo at {text}; the codec stands behind the noise." for text in guarantees]
