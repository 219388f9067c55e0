"""Models of a study attacked again: the same figures by the same attacks, other ones by others, nothing trained."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments.attack import study as attack_study
from experiments.attack.settings import Attacking, study_of
from experiments.combinations.presets import preset
from experiments.combinations.study import config_of
from experiments.run import main
from fedrobust import data, evaluation, reporting
from fedrobust.models import SPECS
from fedrobust.models.spec import Conv, Dense, GlobalPool, Norm, Relu

TRAIN = (
    "combinations --dataset digits --scale smoke --combinations {names} --out {out} --seeds {seed} --width 8 "
    "--train.num-rounds 8 --train.num-steps 20 --train.batch-size 32 --train.average-decay 0 "
    "--train.learning-rate 0.02 --poison.malicious-share 0 "
    "--mc.activations int8 --mc.begin 0.2 --mc.end 0.6 --attack.eps 0.05 0.1 --attack.num-steps 2"
)
SAME = "--attack.suite pgd --attack.eps 0.05 0.1 --attack.num-steps 2 --attack.gate-examples 0"


def tiny(*, num_classes, width, groups):
    """One convolution in place of the architecture."""
    return (Conv(width), Norm(max(1, min(groups, width // 2))), Relu(), GlobalPool(), Dense(num_classes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of two seeds, trained apart; the second says other restarts, and is from before there were scopes."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "small_cnn", tiny)
        for seed, names in enumerate(("plain mc", "plain")):
            assert main(TRAIN.format(out=folder / f"seed{seed}", seed=seed, names=names).split()) == 0
        _replace(folder / "seed1/rows.jsonl", '"num_restarts": 1', '"num_restarts": 2')
        _replace(folder / "seed1/rows.jsonl", '"scope": "uniform", ', "")
        yield folder


def _replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def attack(trained, out, settings, folders="seed0 seed1"):
    """Exit status of the command."""
    paths = " ".join(str(trained / name) for name in folders.split())
    return main(f"attack --models {paths} --out {out} {settings}".split())


def test_the_same_attacks_find_what_the_study_found_and_more_steps_no_less(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.combinations.row.train", lambda *arguments: pytest.fail("trained"))
    assert attack(trained, tmp_path / "same", SAME, "seed1 seed0") == 0
    rows = reporting.read(tmp_path / "same" / "rows.jsonl")
    before = [row for seed in (0, 1) for row in reporting.read(trained / f"seed{seed}" / "rows.jsonl")]
    assert len({row["clean"]["accuracy"] for row in rows}) == 3  # no file would pass for another
    for row, old in zip(rows, before, strict=True):
        assert row["attacked_with"]["versions"] == row["versions"]
        attacks = "attacked_with", "config", "config_hash"
        assert all(row[name] == value for name, value in old.items() if name not in attacks)
        assert row["config"] == before[0]["config"]

    assert attack(trained, tmp_path / "more", SAME.replace("num-steps 2", "num-steps 9 --attack.num-restarts 2")) == 0
    for row, old in zip(reporting.read(tmp_path / "more" / "rows.jsonl"), rows, strict=True):
        assert row["config"]["attack"]["num_steps"] == 9
        assert {entry["steps"] for name, entry in row["robust"].items() if name.startswith("pgd")} == {9}
        assert row["config_hash"] == reporting.config_hash(row["config"]) != old["config_hash"]
        worst, once = (min(x["accuracy"] for x in each["robust"].values()) for each in (row, old))
        assert worst <= once
    for name in ("table.md", "trade_off.png"):
        assert (tmp_path / "more" / name).is_file()


def test_auto_attack_is_judged_by_the_whole_gate_on_what_it_left(trained, tmp_path, monkeypatch):
    """Every question about the examples of the gate, and of the model on integers the ways around its rounding."""
    found, asked = [], []
    real_evaluate, real_gate = evaluation.evaluate, evaluation.gate

    def evaluate(*arguments, **settings):
        assert settings["cascade"]
        found.append(real_evaluate(*arguments, **settings))
        return found[-1]

    def gate(apply, params, dataset, *arguments, **settings):
        asked.append((dataset, settings))
        return real_gate(apply, params, dataset, *arguments, **settings)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(evaluation, "gate", gate)
    settings = "--combinations mc --attack.eps 0.05 0.1 --attack.num-steps 4 --attack.gate-examples 24"
    assert attack(trained, tmp_path / "out", settings, "seed0") == 0
    (row,), (robustness,), ((dataset, settings),) = reporting.read(tmp_path / "out" / "rows.jsonl"), found, asked
    left = ~robustness.broken["linf", 0.1]
    np.testing.assert_array_equal(settings["standing"], left[:24])
    np.testing.assert_array_equal(dataset.image, data.load("digits").test.image[:24])
    assert settings["eps"] == 0.1 and left.mean() == row["robust"]["worst_linf_0.1"]["accuracy"]
    for eps in ("0.05", "0.1"):
        members = [f"{name}_linf_{eps}" for name in ("apgd_ce100", "apgd_t100", "fab_t100", "square5000", "worst")]
        course = [row["clean"]["accuracy"], *(row["robust"][name]["accuracy"] for name in members)]
        assert course == sorted(course, reverse=True) and course[-1] == course[-2] < course[0]
    outcome = {check["check"]: check for check in row["checks"]}
    assert outcome["transfer_finds_no_more"]["detail"] == "straight_through, dequantized, temperature, square"
    unasked = {name for name, check in outcome.items() if check["outcome"] == "not applicable"}
    assert unasked - {"the_radius_is_used_up"} == {"undefended_twin_falls"}


def test_settings_are_chosen_on_the_validation_split(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for settings in (SAME, f"{SAME} --split val"):
        assert main(f"attack --models {trained / 'seed1'} {settings}".split()) == 0
    folder = tmp_path / "results"
    (of_test,), (of_val,) = (reporting.read(folder / f"attack-seed1-pgd{end}/rows.jsonl") for end in ("", "-val"))
    (before,) = reporting.read(trained / "seed1" / "rows.jsonl")
    assert of_test["clean"] == before["clean"] != of_val["clean"]
    splits = data.load("digits")
    num = {entry["accuracy"] * len(splits.val.label) for entry in (of_val["clean"], *of_val["robust"].values())}
    assert all(abs(x - round(x)) < 1e-6 for x in num)
    assert of_val["config"] == {**of_test["config"], "split": "val"}
    assert "on the validation split" in (folder / "attack-seed1-pgd-val" / "table.md").read_text()
    capsys.readouterr()
    assert attack(trained, folder / "attack-seed1-pgd", f"{SAME} --split val", "seed1") == 2
    assert "split" in capsys.readouterr().err


def test_a_kill_loses_no_row_and_none_is_attacked_twice(trained, tmp_path, monkeypatch):
    asked = []
    real = attack_study.attack

    def watched(study, config, case, splits, show):
        if len(asked) == 1:
            asked.append("killed")
            raise KeyboardInterrupt
        asked.append(case.name)
        return real(study, config, case, splits, show)

    monkeypatch.setattr(attack_study, "attack", watched)
    with pytest.raises(KeyboardInterrupt):
        attack(trained, tmp_path / "out", SAME + " --combinations plain")
    assert attack(trained, tmp_path / "out", SAME + " --combinations plain") == 0
    assert asked == ["plain-seed0", "killed", "plain-seed1"]
    assert [row["seed"] for row in reporting.read(tmp_path / "out" / "rows.jsonl")] == [0, 1]


def _foreign(folder):
    shutil.copy(folder / "seed1/models/plain-seed1.safetensors", folder / "seed0/models/plain-seed0.safetensors")


def _lost(folder):
    (folder / "seed0/models/mc-seed0.safetensors").unlink()


def _cut(folder):
    path = folder / "seed0/models/mc-seed0.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def _other(folder):
    _replace(folder / "seed1/rows.jsonl", '"width": 8', '"width": 9')


def _of_codecs(folder):
    (folder / "seed0/rows.jsonl").write_text(json.dumps({"way": {}}) + "\n")


BAD = [
    (_foreign, "", "must be its row's ["),
    (_lost, "", "mc-seed0.safetensors': must be a file"),
    (_cut, "", "mc-seed0.safetensors"),
    (_other, "", "folders of one configuration"),
    (_of_codecs, "", "rows of the study combinations"),
    (shutil.rmtree, "", "rows of the study combinations"),
    (None, "--seeds 7", "--seeds is 7: must be one of 0, 1"),
    (None, "--combinations at", "--combinations is 'at': must be one of mc, plain"),
    (None, "--combinations fast", "--combinations is 'fast'"),
    (None, "--split train", "--split"),
    (None, "--seeds 1 1", "--seeds is (1, 1): must be none twice"),
    (None, "--attack.eps -1", "--attack.eps is -1.0"),
]


@pytest.mark.parametrize(("damage", "settings", "message"), BAD)
def test_what_cannot_be_attacked_is_one_line(trained, tmp_path, capsys, damage, settings, message):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    if damage:
        damage(copy)
    capsys.readouterr()
    assert attack(copy, tmp_path / "out", f"{SAME} {settings}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out" / "rows.jsonl").exists()


def test_rows_of_a_model_that_was_replaced_are_kept_and_named(trained, tmp_path, capsys):
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(trained, copy)
    assert attack(copy, out, SAME + " --seeds 0 --combinations plain") == 0
    before = (out / "rows.jsonl").read_text()
    _foreign(copy)
    capsys.readouterr()
    assert attack(copy, out, SAME + " --combinations plain") == 2
    assert "must be folders with the plain-seed0 that" in capsys.readouterr().err
    assert (out / "rows.jsonl").read_text() == before


def test_one_model_from_two_folders_is_refused(trained, tmp_path, capsys):
    assert attack(trained, tmp_path / "out", SAME, "seed0 seed0") == 2
    assert "the only folder with plain-seed0" in capsys.readouterr().err


@pytest.mark.parametrize(("dataset", "scale"), [("digits", "smoke"), ("digits", "cpu"), ("pneumonia_mnist", "paper")])
def test_a_study_comes_back_from_its_configuration(dataset, scale):
    study = dataclasses.replace(preset("combinations", dataset, scale), attack=Attacking().attack)
    back = study_of(config_of(study))
    assert back == dataclasses.replace(study, seeds=back.seeds)
    with pytest.raises(ValueError, match="setting is 'nonsense': must be one of"):
        study_of({**config_of(study), "nonsense": 1})
