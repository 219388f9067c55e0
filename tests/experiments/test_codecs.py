"""The study of codecs from its command to its files, killed on the way and resumed."""

import jax
import numpy as np
import pytest

from experiments import grid
from experiments.codecs.presets import preset
from experiments.display import Display
from experiments.run import main, parse
from experiments.ways import WAYS, Way
from fedrobust import reporting
from fedrobust.models import SPECS
from fedrobust.models.spec import Conv, Dense, GlobalPool, Relu

NAMES = ("float32", "top-k, 3 bits, both ways", "DP, top-k, 3 bits")
SETTINGS = (
    "codecs --scale smoke --out out --width 4 --train.num-rounds 2 --train.num-steps 1 --train.batch-size 8 "
    "--dp.num-rounds 2 --dp.sampling-rate 0.05 --clients 3 --checkpoint-every 0"
)
COMMAND = [*SETTINGS.split(), "--ways", *NAMES]
FILES = {"ledger.jsonl", "config.json", "rows.jsonl", "table.md", "table.tex", "accuracy_against_uplink.png"}


class Killed(BaseException):
    """Not an `Exception`: nothing that merely handles errors may swallow a kill."""


def test_the_study_goes_on_after_a_kill_and_counts_what_is_sent(monkeypatch, tmp_path):
    tiny = lambda *, num_classes, width, groups: (Conv(width), Relu(), GlobalPool(), Dense(num_classes))  # noqa: E731
    monkeypatch.setitem(SPECS, "small_cnn", tiny)
    monkeypatch.chdir(tmp_path)
    seen = []

    class Watching(Display):
        def row(self, name):
            def report(done, total, figures):
                seen.append((name, done))
                if len(seen) == 4:
                    raise Killed

            return lambda title: report

    monkeypatch.setattr(grid, "Display", Watching)
    with pytest.raises(Killed):
        main(COMMAND)
    assert [row["way"]["name"] for row in reporting.read("out/rows.jsonl")] == ["float32"]
    assert main(COMMAND) == 0
    of_both, private = (f"{name}-seed0" for name in NAMES[1:])
    assert seen[4:] == [(of_both, 2), (private, 1), (private, 2)]  # from the checkpoint after round 1
    assert {path.name for path in (tmp_path / "out").rglob("*")} == FILES
    check_rows(reporting.read("out/rows.jsonl"))
    assert main(COMMAND) == 0  # all done: nothing is trained, only reported again
    assert len(seen) == 7


def check_rows(rows):
    """What can be known beforehand."""
    assert [row["way"]["name"] for row in rows] == list(NAMES)
    for row in rows:
        reporting.validate(row, reporting.UPLINK_FIELDS)
        assert row["config_hash"] == reporting.config_hash(row["config"])
        assert all(0 <= row[split]["accuracy"] <= 1 for split in ("clean", "val"))
    plain, both, private = rows
    dense = 4 * (3 * 3 * 4 + 4 * 10 + 10)
    assert all(row["bytes"]["dense"] == dense for row in rows)
    assert plain["bytes"] == {"dense": dense, "uplink": dense, "downlink": dense}
    assert both["bytes"]["uplink"] < dense / 10 and both["bytes"]["downlink"] < dense / 10
    assert private["bytes"]["uplink"] < dense / 10 and private["bytes"]["downlink"] == dense
    assert (plain["privacy"], both["privacy"]) == (None, None)
    assert 7.5 < private["privacy"]["epsilon"] <= 8
    assert plain["history"]["val_loss"] != both["history"]["val_loss"]


def test_every_way_builds_a_codec_whose_state_says_whether_it_feeds_back():
    like = {"w": jax.ShapeDtypeStruct((3, 3, 8, 8), np.float32), "b": jax.ShapeDtypeStruct((8,), np.float32)}
    for way in WAYS.values():
        state = jax.eval_shape(way.build(like).init, like)
        assert hasattr(state, "residual") == way.feedback
    assert WAYS["float32"] == Way("identity")


def test_presets_and_overrides():
    codecs = parse(["codecs", "--dataset", "pneumonia_mnist"])
    assert codecs == preset("pneumonia_mnist", "cpu")
    assert (codecs.ways, codecs.seeds, codecs.clients) == (tuple(WAYS), (0,), 5)
    assert codecs.study().malicious == ()
    other = parse(["codecs", "--ways", "sign, feedback", "float32", "--seeds", "3"])
    assert (other.ways, other.seeds) == (("sign, feedback", "float32"), (3,))


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (["--ways", "gzip"], "--ways"),
        (["--ways", "float32", "float32"], "--ways"),
        (["--seeds", "-1"], "--seeds"),
        (["--sparsity", "1"], "--sparsity"),
        (["--dp.noise", "secure_sum"], "--dp.noise"),
        (["--train.num-rounds", "0"], "--train.num-rounds"),
        (["--dataset", "no_such_set"], "no_such_set"),
        (["--dp.epsilon", "200"], "epsilon is 200"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(line, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no" / "tfds"))
    assert main(["codecs", "--scale", "smoke", *line]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert names in shown.err
    assert list(tmp_path.iterdir()) == []
