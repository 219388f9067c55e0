"""The curve's table by hand, and a figure with both curves on it."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from fedrobust import reporting
from fedrobust.reporting import POINT_FIELDS, auc_against_epsilon, curve, epsilon_table


def make_point(noise=None, budget=math.inf, auc=0.95, seed=0):
    privacy = {
        "noise": noise,
        "budget": budget,
        "epsilon": budget - 0.01,
        "delta": 1e-4,
        "unit": "record",
        "relation": "add_or_remove_one",
        "sampling": "poisson",
        "noise_multiplier": 4 / budget,
    }
    figures = {"accuracy": 0.86, "balanced_accuracy": 0.84, "auc": auc, "degenerate": False}
    return {
        "experiment": "epsilon_curve",
        "seed": seed,
        "config": {},
        "config_hash": "0",
        "clean": figures,
        "val": figures,
        "privacy": privacy if noise else None,
        "history": {"round": [1], "val_loss": [0.7], "val_accuracy": [0.5]},
        "train_seconds": 1.0,
        "versions": {},
        "device": "cpu",
    }


ROWS = [
    make_point("secure_sum", 1.0, 0.93),
    make_point("silo", 1.0, 0.91),
    make_point("silo", 1.0, 0.93, seed=1),
    make_point(auc=0.94),
    make_point(auc=0.96, seed=1),
    make_point("silo", 8.0, 0.94),
]


def test_the_table_by_hand():
    header, lines, notes, _ = epsilon_table(ROWS)
    assert [name for _, name in header] == ["ε", "noise", "AUC", "bal", "acc", "AUC lost", "σ", "seeds"]
    own, shares = "own noise in each silo", "shares of it, secure sum"
    assert lines == [
        ["∞", "–", "95.0 ± 1.4", "84.0 ± 0.0", "86.0 ± 0.0", "–", "–", "2"],
        ["8", own, "94.0", "84.0", "86.0", "0.0", "0.50", "1"],
        # paired by seed: 0.94 - 0.91 and 0.96 - 0.93
        ["1", own, "92.0 ± 1.4", "84.0 ± 0.0", "86.0 ± 0.0", "3.0 ± 0.0", "4.00", "2"],
        ["1", shares, "93.0", "84.0", "86.0", "1.0", "4.00", "1"],
    ]
    assert any("δ = 0.0001, record level, add_or_remove_one, poisson sampling" in note for note in notes)
    assert any("all other silos" in note for note in notes)
    assert any("no silo colludes or drops out" in note for note in notes)


def test_a_curve_without_a_baseline_or_a_figure_says_nothing_about_it():
    rows = [make_point("silo", 1.0, None), make_point("silo", 1.0, 0.9, seed=1)]
    (line,) = epsilon_table(rows).lines
    assert (line[2], line[5]) == ("90.0", "–")
    assert not any("secure sum" in note for note in epsilon_table(rows).notes)


def test_latex_and_markdown_have_a_line_per_point_and_no_group_names():
    table = epsilon_table(ROWS)
    markdown, latex = reporting.markdown(table), reporting.latex(table)
    assert markdown.splitlines()[1] == "| :-: | :-: |" + " --: |" * 6
    assert markdown.count("\n| ") == 1 + len(table.lines)
    assert r"\begin{tabular}{ccrrrrrr}" in latex
    assert "multicolumn" not in latex
    assert r"$\infty$ & -- & 95.0 $\pm$ 1.4" in latex


@pytest.mark.parametrize("rows", [ROWS, ROWS[:3], ROWS[3:5]])
def test_the_figure_shows_the_curves_there_are(tmp_path, rows):
    image = imread(auc_against_epsilon(rows, tmp_path / "figure.png"))
    assert image.shape[0] > 600 and image.shape[1] > 900
    colors = np.unique((image[..., :3].reshape(-1, 3) * 255).round().astype(int), axis=0)
    kinds = {row["privacy"]["noise"] for row in rows if row["privacy"]}
    for noise, (color, _, _) in curve.LOOKS.items():
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (colors == wanted).all(axis=1).any() == (noise in kinds)


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no row to plot"):
        auc_against_epsilon([], tmp_path / "figure.png")


def test_a_point_is_stored_whole_or_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in ROWS:
        reporting.append(path, row, fields=POINT_FIELDS)
    assert reporting.read(path) == ROWS
    with pytest.raises(ValueError, match=r"^row lacks val$"):
        reporting.append(path, {k: v for k, v in ROWS[0].items() if k != "val"}, fields=POINT_FIELDS)
    assert reporting.read(path) == ROWS
