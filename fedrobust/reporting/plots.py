"""Figures of a study as PNG files. Colour says which of DP and AT took part, dashes and squares say compressed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedrobust.reporting import summary
from fedrobust.reporting.rows import Combination, Row
from fedrobust.reporting.summary import by_combination, spread

# Okabe and Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
COLORS = {(False, False): "#000000", (True, False): "#0072B2", (False, True): "#D55E00", (True, True): "#009E73"}


def accuracy_against_radius(rows: Sequence[Row], path: Path | str) -> Path:
    """Accuracy against attack radius, a line per combination, a panel per norm; radius 0 is the clean accuracy.

    Args:
        rows: `Row`s with at least one robust entry. Several seeds: the mean, with a band of one standard deviation.
        path: where the PNG goes; its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: no row has a robust entry.
    """
    cases = summary.radii(rows)
    if not cases:
        raise ValueError("no row has a robust entry to plot")
    norms = list(dict.fromkeys(norm for norm, _ in cases))
    figure, panels = new_figure(len(norms), width=4.6)
    for norm, panel in zip(norms, panels, strict=True):
        radii = [eps for name, eps in cases if name == norm]
        in_levels = all("/255" in summary.radius_text(norm, eps) for eps in radii)
        unit = 255 if in_levels else 1
        for combination, group in by_combination(rows).items():
            _radius_line(panel, combination, group, norm, radii, unit)
        panel.set_xticks([0, *(unit * eps for eps in radii)])
        panel.set_xlabel(f"attack radius, {summary.norm_text(norm)}" + (" (× 1/255)" if in_levels else ""))
        panel.set_ylabel(f"{summary.split_name(rows)} accuracy, worst attack (%)")
        panel.set_ylim(-2, 102)
        panel.set_xlim(left=0)
    return save_figure(figure, path, _line_handles(rows))


def _radius_line(
    panel: Axes, combination: Combination, group: Sequence[Row], norm: str, radii: Sequence[float], unit: int
) -> None:
    points = [(0.0, spread(group, summary.clean_figure("accuracy")))]
    points += [(eps, spread(group, summary.robust_figure(norm, eps, "accuracy"))) for eps in radii]
    found = [(unit * eps, 100 * value.mean, 100 * (value.std or 0.0)) for eps, value in points if value is not None]
    x, mean, std = np.asarray(found).T
    panel.plot(x, mean, clip_on=False, zorder=3, **_look(combination))
    if std.any():
        panel.fill_between(x, mean - std, mean + std, color=COLORS[combination[:2]], alpha=0.15, linewidth=0)


def trade_off(rows: Sequence[Row], path: Path | str) -> Path:
    """Clean accuracy against robust accuracy at the largest radius; the area of a dot is the model's size in bytes.

    Args:
        rows: `Row`s with at least one robust entry; means over seeds are drawn.
        path: where the PNG goes; its folder must exist.

    Returns:
        The path.

    Raises:
        ValueError: no row has a robust entry.
    """
    cases = summary.radii(rows)
    if not cases:
        raise ValueError("no row has a robust entry to plot")
    norm = cases[0][0]
    eps = max(eps for name, eps in cases if name == norm)
    figure, (panel,) = new_figure(1, width=4.8)
    largest = max(row["size"]["bytes"] for row in rows)
    for combination, group in by_combination(rows).items():
        clean = spread(group, summary.clean_figure("accuracy"))
        robust = spread(group, summary.robust_figure(norm, eps, "accuracy"))
        size = spread(group, lambda row: row["size"]["bytes"])
        if clean and robust and size:
            area = max(500 * size.mean / largest, 12)  # in square points; smaller could not be seen
            _dot(panel, combination, 100 * clean.mean, 100 * robust.mean, area)
    panel.set_xlabel("clean accuracy (%)")
    panel.set_ylabel(f"accuracy under attack, {summary.norm_text(norm)} {summary.radius_text(norm, eps)} (%)")
    panel.margins(0.15)
    panel.set_title(f"area: bytes of the model file (largest {_bytes_text(largest)})", fontsize=8, color="#444444")
    return save_figure(figure, path, _dot_handles(rows))


def _dot(panel: Axes, combination: Combination, x: float, y: float, area: float) -> None:
    color = COLORS[combination[:2]]
    marker = "s" if combination.mc else "o"
    face = "white" if combination.mc else (*_rgb(color), 0.45)
    panel.scatter(
        x, y, s=area, marker=marker, facecolor=face, edgecolor=color, linewidth=1.2, zorder=4 + combination.mc
    )


def training_curves(rows: Sequence[Row], path: Path | str) -> Path:
    """Validation loss and accuracy against rounds, one line per trained model.

    Args:
        rows: `Row`s.
        path: where the PNG goes; its folder must exist.

    Returns:
        The path.
    """
    figure, (of_loss, of_accuracy) = new_figure(2, width=4.0)
    for combination, group in by_combination(rows).items():
        look = {**_look(combination), "marker": None}
        for row in group:
            history = row["history"]
            # None marks a round without a figure: a gap in the line
            of_loss.plot(history["round"], np.asarray(history["val_loss"], float), **look)
            of_accuracy.plot(history["round"], 100 * np.asarray(history["val_accuracy"], float), **look)
    of_loss.set_ylabel("validation loss (nats)")
    of_accuracy.set_ylabel("validation accuracy (%)")
    for panel in (of_loss, of_accuracy):
        panel.set_xlabel("round")
        panel.set_xlim(left=0)
    return save_figure(figure, path, _line_handles(rows, marker=False))


def new_figure(num_panels: int, *, width: float, margin: float = 1.4) -> tuple[Figure, list[Axes]]:
    """Empty panels side by side, `width` inches each, with a margin on the right for a legend."""
    figure = Figure(figsize=(width * num_panels + margin, 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # this figure alone draws through Agg; no global backend is touched
    panels = list(figure.subplots(1, num_panels, squeeze=False)[0])
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, panels


def save_figure(figure: Figure, path: Path | str, handles: Sequence[Line2D] = ()) -> Path:
    """Writes a PNG; `handles` go into a legend on the right."""
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False, handlelength=2.8, labelspacing=0.8)
    figure.savefig(path, dpi=200, format="png")
    return Path(path)


def _look(combination: Combination) -> dict[str, Any]:
    return {
        "color": COLORS[combination[:2]],
        "linestyle": (0, (4, 1.6)) if combination.mc else "-",
        "marker": "s" if combination.mc else "o",
        "markersize": 3.8 if combination.mc else 6.2,
        "markerfacecolor": "white" if combination.mc else COLORS[combination[:2]],
        "linewidth": 1.6,
    }


def _line_handles(rows: Sequence[Row], *, marker: bool = True) -> list[Line2D]:
    off = {} if marker else {"marker": None}
    return [Line2D([], [], label=c.label, **{**_look(c), **off}) for c in by_combination(rows)]


def _dot_handles(rows: Sequence[Row]) -> list[Line2D]:
    return [
        Line2D([], [], label=c.label, **{**_look(c), "linestyle": "none", "markersize": 6})
        for c in by_combination(rows)
    ]


def _rgb(color: str) -> tuple[float, float, float]:
    return int(color[1:3], 16) / 255, int(color[3:5], 16) / 255, int(color[5:7], 16) / 255


def _bytes_text(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.2g} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.3g} kB"
