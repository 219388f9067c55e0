"""What a method changes: by hand, and only where seeds are shared."""

import numpy as np
import pytest

from fedrobust.reporting import effects_table, markdown


def with_accuracy(row, accuracy):
    return {**row, "clean": {**row["clean"], "accuracy": accuracy}}


def cells(rows):
    header, lines, _, _ = effects_table(rows)
    names = [f"{group} {name}".strip() for group, name in header]
    return {tuple(line[:2]): dict(zip(names[2:], line[2:], strict=True)) for line in lines}


def test_a_paired_difference_by_hand(row_of):
    """Differences of 1 and 3 points: mean 2, standard error 1, t of one degree of freedom tan(0.475 pi) = 12.7."""
    rows = [
        with_accuracy(row_of(seed=0), 0.80),
        with_accuracy(row_of(seed=1), 0.90),
        with_accuracy(row_of(mc=True, seed=1), 0.93),
        with_accuracy(row_of(mc=True, seed=0), 0.81),
        with_accuracy(row_of(mc=True, seed=2), 0.10),  # of no pair
    ]
    found = cells(rows)
    assert list(found) == [("MC", "plain")]
    half = np.tan(0.475 * np.pi)
    assert found["MC", "plain"]["clean acc"] == f"+2.0 [{2 - half:+.1f}, {2 + half:+.1f}]"
    assert found["MC", "plain"]["clean AUC"] == "-1.0 [-1.0, -1.0]"  # the same in both seeds
    assert found["MC", "plain"]["L∞ 8/255 acc"] == "-1.0 [-1.0, -1.0]"
    assert found["MC", "plain"]["seeds"] == "2"


def test_every_edge_of_the_cube_has_a_line(study):
    found = cells(study(3))
    assert len(found) == 12
    assert [pair for pair in found if pair[0] == "DP"] == [("DP", x) for x in ("plain", "MC", "AT", "AT + MC")]
    assert found["AT", "DP"]["L∞ 8/255 bal"].startswith("+40.0 ")  # -5 points clean, 60 - 15 under attack


@pytest.mark.parametrize("num_seeds", [0, 1])
def test_without_shared_seeds_there_is_no_line(study, num_seeds):
    assert effects_table(study(num_seeds)).lines == []


def test_a_radius_only_some_rows_have_is_left_out(row_of):
    rows = [row_of(seed=s, mc=mc) for s in (0, 1) for mc in (False, True)]
    rows[3] = {**rows[3], "robust": {}}
    assert cells(rows)["MC", "plain"]["L∞ 8/255 acc"] == "–"


def test_it_prints(study):
    text = markdown(effects_table(study(2)))
    assert text.count("\n| ") == 13 and "- Change by the method" in text
