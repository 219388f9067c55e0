"""The command line: presets, typed overrides, and one line for every mistake, before anything is written."""

import json

import numpy as np
import pytest

from experiments.combinations.presets import preset
from experiments.combinations.settings import COMBINATIONS, Study
from experiments.run import main, parse


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """A wrong command that writes somewhere is found out: `results/...` by default lies below the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no" / "tfds"))


def test_a_study_without_overrides_is_its_preset():
    assert parse(["quickstart"]) == preset("quickstart", "digits", "cpu")
    assert parse(["combinations", "--dataset", "pneumonia_mnist"]) == preset("combinations", "pneumonia_mnist", "cpu")
    for scale in ("smoke", "paper"):
        assert parse(["combinations", "--scale", scale]) == preset("combinations", "digits", scale)
        assert parse(["combinations", f"--scale={scale}", "--dataset=mnist"]) == preset("combinations", "mnist", scale)


def test_presets_by_hand():
    quick = parse(["quickstart"])
    assert (quick.experiment, quick.dataset, quick.scale, quick.seeds) == ("quickstart", "digits", "cpu", (0,))
    assert quick.combinations == COMBINATIONS
    assert len(set(COMBINATIONS)) == 8
    assert quick.dp.epsilon <= 8
    assert quick.poison.malicious_share == 0.2
    pneumonia = parse(["combinations", "--dataset", "pneumonia_mnist"])
    assert pneumonia.model == "resnet9"
    assert pneumonia.at.eps == 8 / 255
    smoke = parse(["combinations", "--dataset", "pneumonia_mnist", "--scale", "smoke"])
    assert smoke.model == "resnet9"
    assert smoke.train.num_rounds < pneumonia.train.num_rounds


def test_every_setting_can_be_overridden_and_is_typed():
    line = (
        "quickstart --dp.epsilon 4 --dp.num-rounds 7 --seeds 3 1 --combinations plain dp+mc --clients 9 --out there "
        "--attack.eps 0.1 0.2 --train.learning-rate 1e-2 --client-map pmap --mc.sparsity 0 "
        "--poison.rule coordinate_median"
    )
    study = parse(line.split())
    assert (study.dp.epsilon, study.dp.num_rounds, study.mc.sparsity) == (4.0, 7, 0.0)
    assert (study.seeds, study.combinations, study.clients) == ((3, 1), ("plain", "dp+mc"), 9)
    assert (study.attack.eps, study.train.learning_rate, study.client_map) == ((0.1, 0.2), 0.01, "pmap")
    assert (study.out, study.poison.rule) == ("there", "coordinate_median")
    assert isinstance(study.dp.epsilon, float)
    assert isinstance(study.dp.num_rounds, int)
    assert study.dp.delta == parse(["quickstart"]).dp.delta


def test_an_override_beats_the_preset_of_the_scale():
    study = parse(["quickstart", "--scale", "smoke", "--train.num-rounds", "9"])
    assert study.train.num_rounds == 9
    assert study.width == preset("quickstart", "digits", "smoke").width


@pytest.mark.parametrize("arguments", [[], ["--help"], ["quickstart", "--help"]])
def test_help_is_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "quickstart" in shown
    if len(arguments) == 2:
        assert "--dp.epsilon" in shown
        assert "Budget, label counts included." in shown


BAD_SETTINGS = [
    ("nonsense", "study is 'nonsense'"),
    ("quickstart --scale huge", "--scale"),
    ("quickstart --dataset no_such_set", "no_such_set"),
    ("quickstart --dataset missing.npz", "missing.npz"),
    ("quickstart --clients 5000", "clients"),
    ("quickstart --clients 0", "--clients"),
    ("quickstart --at.eps -0.1", "--at.eps"),
    ("quickstart --at.trades-beta -1", "--at.trades-beta"),
    ("quickstart --at.trades-beta 2 --mc.label-share 0.5", "--at.trades-beta"),
    ("quickstart --attack.eps -0.1", "--attack.eps"),
    ("quickstart --attack.eps 0.1 -0.1", "--attack.eps"),
    ("quickstart --attack.eps 0.0301 0.0302", "--attack.eps"),
    ("quickstart --attack.num-steps 3 --attack.gate-examples 8", "--attack.num-steps"),
    ("quickstart --dp.epsilon 0", "--dp.epsilon"),
    ("quickstart --dp.epsilon -1", "--dp.epsilon"),
    ("quickstart --dp.epsilon nan", "--dp.epsilon"),
    ("quickstart --dp.epsilon four", "--dp.epsilon"),
    ("quickstart --dp.histogram-epsilon 9", "--dp.histogram-epsilon"),
    ("quickstart --dp.delta 1", "--dp.delta"),
    ("quickstart --dp.delta 1.5", "--dp.delta"),
    ("quickstart --dp.delta 0", "--dp.delta"),
    ("quickstart --mc.sparsity 1", "--mc.sparsity"),
    ("quickstart --mc.sparsity -0.1", "--mc.sparsity"),
    ("quickstart --mc.aware-share -0.1", "--mc.aware-share"),
    ("quickstart --poison.rounds-share 0", "--poison.rounds-share"),
    ("quickstart --mc.end 0.6 --poison.rounds-share 0.6", "--poison.rounds-share"),
    ("quickstart --mc.label-share 1.1", "--mc.label-share"),
    ("quickstart --mc.group-sparsity 0.5 0.5", "or 3 shares with --mc.scope uniform: of conv_0, conv_4, conv_8"),
    ("quickstart --mc.group-sparsity 0.5 1.0", "--mc.group-sparsity is 1.0"),
    ("quickstart --mc.scope layer", "--mc.scope"),
    ("quickstart --mc.aware-share 0.9", "--mc.aware-share"),  # pruning ends after 0.15 of the rounds
    ("quickstart --mc.begin 0.6 --mc.end 0.5", "--mc.begin"),
    ("quickstart --poison.malicious-share 0.5", "--poison.malicious-share"),
    ("quickstart --train.num-rounds 0", "--train.num-rounds"),
    ("quickstart --train.num-rounds 2.5", "--train.num-rounds"),
    ("quickstart --train.learning-rate -1", "--train.learning-rate"),
    ("quickstart --seeds -1", "--seeds"),
    ("quickstart --combinations plain dp+xx", "--combinations"),
    ("quickstart --combinations at+dp", "--combinations"),
    ("quickstart --model vgg", "--model"),
    ("quickstart --partition random", "--partition"),
    ("quickstart --client-map threads", "--client-map"),
    ("quickstart --dp.eps 3", "--dp.eps"),
    ("quickstart --privacy.epsilon 3", "--privacy.epsilon"),
    ("quickstart --epsilon=3", "--epsilon"),
]


def assert_refused(arguments, names, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert shown.err.endswith("\n")
    assert names in shown.err
    assert shown.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("line", "names"), BAD_SETTINGS)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(line, names, tmp_path, capsys):
    assert_refused(line.split(), names, tmp_path, capsys)
    assert_refused([*line.split(), "--out", "there"], names, tmp_path, capsys)


def write_npz(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {"train_images": rng.integers(0, 256, (30, 8, 8), np.uint8), "train_labels": np.arange(30)[:, None] % 3}
    np.savez(path, **(arrays | changes))


def test_a_damaged_npz_is_named(tmp_path, capsys):
    path = tmp_path / "broken.npz"
    write_npz(path)
    path.write_bytes(path.read_bytes()[:700])
    assert_refused(["quickstart", "--dataset", str(path)], "broken.npz", tmp_path, capsys)
    path.write_bytes(b"no archive")
    assert_refused(["quickstart", "--dataset", str(path)], "broken.npz", tmp_path, capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_labels": np.arange(30) - 1},
        {"test_images": np.zeros((4, 8, 8), np.uint8), "test_labels": np.array([0, 1, 2, 3])},
    ],
)
def test_labels_out_of_range_are_named(changes, tmp_path, capsys):
    write_npz(tmp_path / "set.npz", **changes)
    assert_refused(["quickstart", "--dataset", str(tmp_path / "set.npz")], "labels", tmp_path, capsys)


def test_a_folder_of_another_configuration_is_refused_and_left_as_it_is(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    config = {"dp": {"epsilon": 1.0}}
    (out / "config.json").write_text(json.dumps(config))
    (out / "rows.jsonl").write_text("")
    assert_refused(["quickstart", "--out", str(out)], "--out", tmp_path, capsys)
    assert json.loads((out / "config.json").read_text()) == config


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("important")
    assert_refused(["quickstart", "--out", str(tmp_path / "thesis")], "--out", tmp_path, capsys)


def test_every_preset_passes_its_own_checks():
    for dataset in ("digits", "pneumonia_mnist"):
        for scale in ("smoke", "cpu", "paper"):
            assert isinstance(preset("combinations", dataset, scale), Study)


def test_a_setting_out_of_range_is_told_without_the_parser_around_it(capsys):
    assert main(["quickstart", "--dp.epsilon", "-1"]) == 2
    assert capsys.readouterr().err.startswith("error: --dp.epsilon is -1.0: must be ")
