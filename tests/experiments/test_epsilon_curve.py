"""The curve from its command to its files, killed on the way and resumed."""

import math

import numpy as np
import pytest

from experiments import grid
from experiments.combinations.federation import hospitals
from experiments.display import Display
from experiments.epsilon_curve import study as curve_module
from experiments.epsilon_curve.presets import preset
from experiments.epsilon_curve.study import Point, plan_of, recipe_of
from experiments.run import main, parse
from fedrobust import reporting
from fedrobust.models import SPECS
from fedrobust.models.spec import Conv, Dense, GlobalPool, Relu

COMMAND = (
    "epsilon_curve --scale smoke --epsilons 8 inf --seeds 0 --out out --width 4 --checkpoint-every 0 "
    "--train.num-rounds 2 --train.num-steps 1 --train.batch-size 8 --dp.num-rounds 3 --dp.sampling-rate 0.05"
)
FILES = {"ledger.jsonl", "config.json", "rows.jsonl", "table.md", "table.tex", "auc_against_epsilon.png"}


class Killed(BaseException):
    """Not an `Exception`: nothing that merely handles errors may swallow a kill."""


@pytest.fixture
def watched(monkeypatch):
    """Runs a command in a folder: tells the rounds it went through, and kills it at a given one."""
    tiny = lambda *, num_classes, width, groups: (Conv(width), Relu(), GlobalPool(), Dense(num_classes))  # noqa: E731
    monkeypatch.setitem(SPECS, "small_cnn", tiny)

    def run(folder, kill_at=None, command=COMMAND):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        seen = []

        class Watching(Display):
            def row(self, name):
                of_phase = super().row(name)("training")

                def report(done, total, figures):
                    of_phase(done, total, figures)
                    seen.append((name, done))
                    if seen[-1] == kill_at:
                        raise Killed

                return lambda title: report

        monkeypatch.setattr(grid, "Display", Watching)
        if kill_at is None:
            assert main(command.split()) == 0
        else:
            with pytest.raises(Killed):
                main(command.split())
        return seen

    return run


def test_a_curve_killed_and_resumed_leaves_what_an_unbroken_one_leaves(watched, monkeypatch, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    rounds = watched(whole)
    assert rounds == [
        *(("plain-epsiloninf-seed0", done) for done in (1, 2)),
        *((f"{noise}-epsilon8-seed0", done) for noise in ("silo", "secure_sum") for done in (1, 2, 3)),
    ]
    first = watched(broken, kill_at=("silo-epsilon8-seed0", 2))
    monkeypatch.setattr(curve_module, "_num_at_once", lambda curve: 2)
    second = watched(broken)
    assert first[-1] == ("silo-epsilon8-seed0", 2)
    again = [("silo-epsilon8-seed0", done) for done in (2, 3)]  # from the checkpoint after round 1
    assert set(second) == {*again, *(("secure_sum-epsilon8-seed0", done) for done in (1, 2, 3))}
    rows, resumed = (reporting.read(folder / "out" / "rows.jsonl") for folder in (whole, broken))
    timeless = [{name_of(row): row | {"train_seconds": None} for row in each} for each in (rows, resumed)]
    assert timeless[0] == timeless[1]  # in the order in which they were done
    for folder in (whole, broken):
        assert {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*")} == FILES
    check_rows(rows)
    (whole / "out" / "work" / "silo-epsilon8-seed0").mkdir(
        parents=True
    )  # a kill between the row and the end of its work
    assert watched(whole) == []  # all done: nothing is trained, only reported again
    assert {path.name for path in (whole / "out").rglob("*")} == FILES


def name_of(row):
    """What tells a row from others."""
    return row["privacy"] and row["privacy"]["noise"]


def check_rows(rows):
    """What can be known beforehand."""
    for row in rows:
        reporting.validate(row, reporting.POINT_FIELDS)
        assert row["config_hash"] == reporting.config_hash(row["config"])
        assert all(0 <= row[split][name] <= 1 for split in ("clean", "val") for name in ("auc", "accuracy"))
    plain, silo, shares = rows
    assert plain["privacy"] is None
    assert [row["privacy"]["noise"] for row in (silo, shares)] == ["silo", "secure_sum"]
    assert [row["config"]["dp"]["noise"] for row in (silo, shares)] == ["silo", "secure_sum"]
    assert all(row["privacy"]["budget"] == 8 >= row["privacy"]["epsilon"] > 7.5 for row in (silo, shares))
    assert silo["privacy"]["noise_multiplier"] == shares["privacy"]["noise_multiplier"]  # one plan
    assert silo["history"]["val_loss"] != shares["history"]["val_loss"]  # other noise


def test_noisy_points_take_a_small_rate_and_small_budgets_spend_less_on_label_counts():
    curve = parse(["epsilon_curve", "--scale", "smoke", "--dp.histogram-epsilon", "0.1"])
    site = hospitals(curve.study(None, math.inf), 0)

    def dp_and_noise(noise, epsilon):
        point = Point(noise, epsilon, 0)
        recipe = recipe_of(curve, point, plan_of(curve, point, site), site)
        silos = {"silo": 1, "secure_sum": 5}[noise]
        return recipe.study.dp, recipe.plan.noise_multiplier / np.sqrt(silos)

    dp, noise = dp_and_noise("silo", 8.0)
    assert dp == curve.dp
    for kind, epsilon in (("silo", 1.0), ("secure_sum", 0.5)):
        other, other_noise = dp_and_noise(kind, epsilon)
        assert other_noise > noise
        assert other.learning_rate == pytest.approx(dp.learning_rate / 20)
        assert other.histogram_epsilon == pytest.approx(dp.histogram_epsilon * (epsilon / 8) ** 0.5)
    assert dp_and_noise("secure_sum", 8.0)[0].learning_rate == dp.learning_rate  # no more noise
    assert curve.study("silo", 20.0).dp.histogram_epsilon == dp.histogram_epsilon
    assert plan_of(curve, Point(None, math.inf, 0), site) is None


def test_presets_and_overrides():
    curve = parse(["epsilon_curve", "--dataset", "pneumonia_mnist"])
    assert curve == preset("pneumonia_mnist", "cpu")
    assert (curve.epsilons, curve.seeds, curve.clients) == ((0.5, 1, 3, 8, math.inf), (0, 1, 2), 5)
    assert curve.points[0] == (None, math.inf)
    assert len(curve.points) == 9
    study = curve.study("secure_sum", 3.0)
    assert (study.dp.epsilon, study.dp.noise, study.malicious) == (3.0, "secure_sum", ())
    other = parse(["epsilon_curve", "--epsilons", "2", "inf", "--noises", "silo", "--dp.num-rounds", "7"])
    assert (other.points, other.dp.num_rounds) == ([(None, math.inf), ("silo", 2.0)], 7)


def test_help_names_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["epsilon_curve", "--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "--epsilons" in shown and "--noises" in shown and "--dp.clip-norm" in shown


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--epsilons 0 1", "--epsilons"),
        ("--epsilons 1 1", "--epsilons"),
        ("--epsilons nan", "--epsilons"),
        ("--epsilons one", "--epsilons"),
        ("--noises everywhere", "--noises"),
        ("--seeds -1", "--seeds"),
        ("--dp.noise secure_sum", "--dp.noise"),
        ("--dp.clip-norm -1", "--dp.clip-norm"),
        ("--clients 0", "--clients"),
        ("--attack.eps 0.1", "--attack.eps"),
        ("--dataset no_such_set", "no_such_set"),
        ("--epsilons 200", "epsilon is 200"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(line, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no" / "tfds"))
    assert main(["epsilon_curve", "--scale", "smoke", *line.split()]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert names in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_secure_sum_is_refused_where_single_updates_are_read(capsys):
    assert main(["quickstart", "--dp.noise", "secure_sum"]) == 2
    assert "--dp.noise is 'secure_sum'" in capsys.readouterr().err
    assert parse(["quickstart", "--dp.noise", "secure_sum", "--poison.malicious-share", "0"]).dp.noise == "secure_sum"
