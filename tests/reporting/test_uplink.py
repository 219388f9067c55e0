"""The table of codecs by hand, and a figure with all ways on it."""

import numpy as np
import pytest
from matplotlib.image import imread

from fedrobust import reporting
from fedrobust.reporting import UPLINK_FIELDS, accuracy_against_uplink, uplink_table


def make_sent(name, codec, accuracy, uplink, *, downlink=600_000, seed=0, private=False):
    figures = {"accuracy": accuracy, "balanced_accuracy": 0.84, "auc": 0.95, "degenerate": False}
    plan = {"epsilon": 7.99, "delta": 1e-4, "unit": "record", "relation": "add_or_remove_one", "sampling": "poisson"}
    return {
        "experiment": "codecs",
        "way": {"name": name, "codec": codec, "private": private},
        "seed": seed,
        "config": {},
        "config_hash": "0",
        "clean": figures,
        "val": figures,
        "bytes": {"dense": 600_000, "uplink": uplink, "downlink": downlink},
        "privacy": plan if private else None,
        "history": {"round": [1], "val_loss": [0.7], "val_accuracy": [0.5]},
        "train_seconds": 1.0,
        "versions": {},
        "device": "cpu",
    }


ROWS = [
    make_sent("float32", "identity", 0.86, 600_000),
    make_sent("float32", "identity", 0.88, 600_000, seed=1),
    make_sent("few", "top_k", 0.86, 6_000),
    make_sent("few", "top_k", 0.86, 4_000, seed=1, downlink=60_000),
    make_sent("fewer", "qsgd", 0.84, 600),
    make_sent("many", "sign", 0.86, 20_000),
    make_sent("DP", "identity", 0.83, 600_000, private=True),
    make_sent("DP, few", "top_k", 0.83, 3_000, private=True),
]


def test_the_table_by_hand():
    header, lines, notes, _ = uplink_table(ROWS)
    assert [name for _, name in header][:5] == ["way", "acc", "bal", "AUC", "acc lost"]
    cells = {line[0]: line[1:] for line in lines}
    assert list(cells) == ["float32", "few", "fewer", "many", "DP", "DP, few"]
    same = ["600,000", "1.0x"]
    assert cells["float32"] == ["87.0 ± 1.4", "84.0 ± 0.0", "95.0 ± 0.0", "–", *same, *same, "–", "2"]
    # paired by seed: 0 and 2 points; 100x and 150x
    assert cells["few"][3:] == ["1.0 ± 1.4", "5,000", "125x", "330,000", "5.5x", "yes", "2"]
    assert cells["fewer"][3:] == ["2.0", "600", "1000x", *same, "no: accuracy", "1"]
    assert cells["many"][3:6] == ["0.0", "20,000", "30x"]
    assert cells["many"][8] == "no: bytes"
    assert (cells["DP, few"][3], cells["DP, few"][8]) == ("0.0", "yes")  # against private float32
    assert any("ε = 7.99, δ = 0.0001, record level" in note for note in notes)


def test_without_float32_nothing_is_lost_to_it():
    (line,) = uplink_table(ROWS[2:3]).lines
    assert (line[4], line[9]) == ("–", "–")
    assert len(uplink_table(ROWS[2:3]).notes) == 1


@pytest.mark.parametrize("rows", [ROWS, ROWS[2:3]])
def test_the_figure_shows_private_and_other_ways(tmp_path, rows):
    image = imread(accuracy_against_uplink(rows, tmp_path / "figure.png"))
    assert image.shape[0] > 600 and image.shape[1] > 1200
    colors = np.unique((image[..., :3].reshape(-1, 3) * 255).round().astype(int), axis=0)
    for private, color in ((False, [0, 0x72, 0xB2]), (True, [0xD5, 0x5E, 0])):
        assert (colors == color).all(axis=1).any() == any(row["way"]["private"] == private for row in rows)


def test_nothing_to_plot_is_said(tmp_path):
    with pytest.raises(ValueError, match="no row to plot"):
        accuracy_against_uplink([], tmp_path / "figure.png")


def test_a_row_is_stored_whole_or_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in ROWS:
        reporting.append(path, row, fields=UPLINK_FIELDS)
    assert reporting.read(path) == ROWS
    with pytest.raises(ValueError, match=r"^row lacks bytes$"):
        reporting.append(path, {k: v for k, v in ROWS[0].items() if k != "bytes"}, fields=UPLINK_FIELDS)
