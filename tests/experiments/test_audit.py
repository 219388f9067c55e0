"""The audit at smoke scale: its table, its files, its exit status, and the coins of its canaries.

Seeds are fixed. At 95 % confidence each of the lower bounds is above a right claim for one seed in 20 at most; noise of
half the size moves the one-step bound from 0.8 of its claim to more than twice it.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments.audit import one_run, one_step
from experiments.audit.settings import audit_preset
from experiments.combinations.federation import hospitals, private_gradient
from experiments.run import main, parse

SMOKE = ["audit", "--scale", "smoke", "--combinations", "dp", "--dp.num-rounds", "2"]


@pytest.mark.slow
def test_a_right_trainer_holds_and_one_with_half_the_noise_is_a_violation(tmp_path, capsys, monkeypatch):
    arguments = [*SMOKE, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "holds" in shown
    (row,) = map(json.loads, (tmp_path / "out" / "audit.jsonl").read_text().splitlines())
    assert 0 <= row["one_run_epsilon"] <= row["claimed_epsilon"] <= 8
    assert 0.6 * row["one_step_claimed_epsilon"] < row["one_step_epsilon"] <= row["one_step_claimed_epsilon"]
    assert row["canary_norm_over_clip_norm"] > 1
    assert row["verdict"] == "holds"
    assert "| dp | 0 |" in (tmp_path / "out" / "audit.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["audit.jsonl", "audit.md", "audit.tex"]

    noise = row["noise_multiplier"]
    monkeypatch.setattr(
        one_step,
        "private_gradient",
        lambda recipe, loss: private_gradient(
            replace(recipe, plan=replace(recipe.plan, noise_multiplier=noise / 2)), loss
        ),
    )
    assert main(arguments) == 1
    assert "VIOLATION" in capsys.readouterr().out
    (row,) = map(json.loads, (tmp_path / "out" / "audit.jsonl").read_text().splitlines())
    assert row["one_step_epsilon"] > row["one_step_claimed_epsilon"]
    assert row["verdict"] == "VIOLATION"


def test_canaries_are_mislabelled_and_in_by_fair_coins_that_nothing_else_follows():
    settings = replace(audit_preset("audit", "digits", "smoke"), canaries=400)
    site = hospitals(settings, 0)
    changed, canaries, included = one_run.place_canaries(settings, 0, site)
    before, after = site.splits.train, changed.splits.train
    index = np.flatnonzero(before.label != after.label)
    assert len(index) == len(canaries.label) == len(included) == 400
    assert abs(included.sum() - 200) < 6 * 10  # six standard deviations of 400 coins
    for client, (part, old) in enumerate(zip(changed.parts, site.parts, strict=True)):
        assert set(part) <= set(old)
        missing = set(old) - set(part)
        out = np.flatnonzero(~included & (canaries.owner == client))
        assert sorted(after.image[sorted(missing)].sum((1, 2, 3))) == sorted(canaries.image[out].sum((1, 2, 3)))
    shifted = one_run.place_canaries(settings, 1, site)
    assert (shifted[2] != included).any()


def test_the_audit_begins_with_the_settings_of_the_study():
    settings = parse(["audit", "--scale", "smoke", "--canaries", "12", "--dp.epsilon", "3"])
    study = parse(["quickstart", "--scale", "smoke"])
    assert (settings.canaries, settings.dp.epsilon) == (12, 3.0)
    assert (settings.model, settings.width, settings.train) == (study.model, study.width, study.train)
    assert settings.combinations == ("dp", "dp+mc", "dp+at", "dp+at+mc")


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--combinations plain", "--combinations is 'plain'"),
        ("--canaries 2", "--canaries is 2"),
        ("--trials 3", "--trials is 3"),
        ("--confidence 1", "--confidence is 1.0"),
        ("--dp.epsilon -1", "--dp.epsilon is -1.0"),
        ("--dataset missing.npz", "missing.npz"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(line, names, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["audit", *line.split()]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert names in shown
    assert shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
