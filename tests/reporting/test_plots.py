"""Figures are drawn, on no backend but their own, and tell all combinations apart."""

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from fedrobust.reporting import accuracy_against_radius, plots, trade_off, training_curves
from fedrobust.reporting.summary import by_combination


@pytest.mark.parametrize("draw", [accuracy_against_radius, trade_off, training_curves])
@pytest.mark.parametrize("num_seeds", [1, 2])
def test_figures_are_png_files_with_something_on_them(tmp_path, study, draw, num_seeds):
    backend = dict.__getitem__(matplotlib.rcParams, "backend")
    path = draw(study(num_seeds), tmp_path / "figure.png")
    image = imread(path)
    assert image.shape[0] > 600 and image.shape[1] > 900
    colors = np.unique((image[..., :3].reshape(-1, 3) * 255).round().astype(int), axis=0)
    wanted = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in plots.COLORS.values()]
    assert all((colors == color).all(axis=1).any() for color in wanted)
    assert dict.__getitem__(matplotlib.rcParams, "backend") == backend


def test_every_combination_has_its_own_look(study):
    looks = [str(plots._look(combination)) for combination in by_combination(study())]
    assert len(set(looks)) == 8


def test_two_norms_and_radii_that_are_not_levels(tmp_path, study):
    rows = study()
    for row in rows:
        row["robust"]["pgd20_l2_0.5"] = row["robust"]["pgd20_linf_0.031"] | {"norm": "l2", "eps": 0.5}
    one, two = (imread(accuracy_against_radius(r, tmp_path / "x.png")) for r in (study(), rows))
    assert two.shape[1] > 1.5 * one.shape[1]


@pytest.mark.parametrize("draw", [accuracy_against_radius, trade_off])
def test_nothing_to_plot_is_said(tmp_path, study, draw):
    rows = [row | {"robust": {}} for row in study()]
    with pytest.raises(ValueError, match="no row has a robust entry"):
        draw(rows, tmp_path / "x.png")
