"""A study from its command to its files, killed on the way and resumed."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from experiments import grid
from experiments.combinations import study as study_module
from experiments.combinations.federation import build_model
from experiments.display import Display
from experiments.run import main, parse
from fedrobust import compression, data, evaluation, privacy, reporting
from fedrobust.models import SPECS
from fedrobust.models.spec import Conv, Dense, GlobalPool, Norm, Relu

COMMAND = (
    "quickstart --scale smoke --combinations plain dp+at+mc --out out --width 8 --checkpoint-every 0 "
    "--train.num-rounds 3 --train.num-steps 1 --train.batch-size 8 --dp.num-rounds 5 --dp.sampling-rate 0.05 "
    "--poison.rounds-share 1 --no-parallel "
    "--attack.eps 0.1 --attack.num-steps 2"
)
FIGURES = ("accuracy_against_radius.png", "trade_off.png", "training_curves.png")
MODELS = ("models/plain-seed0.safetensors", "models/dp+at+mc-seed0.safetensors")
FILES = ("config.json", "rows.jsonl", "ledger.jsonl", "table.md", "table.tex", *FIGURES, *MODELS)


class Killed(BaseException):
    """Not an `Exception`: nothing that merely handles errors may swallow a kill."""


def tiny(*, num_classes, width, groups):
    """One convolution in place of the architecture: a study's course does not depend on it, its time does."""
    return (Conv(width), Norm(max(1, min(groups, width // 2))), Relu(), GlobalPool(), Dense(num_classes))


@pytest.fixture
def watched(monkeypatch):
    """Runs `COMMAND` in a folder: tells the phases it went through, and kills it at a given one."""
    monkeypatch.setitem(SPECS, "small_cnn", tiny)

    def run(folder, kill_at=None, command=COMMAND):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)  # the same relative --out, so that nothing is compiled twice
        seen = []

        class Watching(Display):
            def row(self, name):
                of_row = super().row(name)

                def phase(title):
                    of_phase = of_row(title)

                    def report(done, total, figures):
                        of_phase(done, total, figures)
                        seen.append((name.partition("-seed")[0], title, done))
                        if seen[-1] == kill_at:
                            raise Killed

                    return report

                return phase

        monkeypatch.setattr(grid, "Display", Watching)
        if kill_at is None:
            assert main(command.split()) == 0
        else:
            with pytest.raises(Killed):
                main(command.split())
        return seen

    return run


def contents(path):
    """Every tensor of a model's file to the bit, and its metadata, whose order the format leaves open."""
    with safetensors.safe_open(path, "numpy") as file:
        tensors = {name: (x.dtype, x.shape, x.tobytes()) for name in file.keys() for x in [file.get_tensor(name)]}  # noqa: SIM118
        return tensors, file.metadata()


def timeless(row):
    """A row without what a clock had a say in."""
    size = {name: value for name, value in row["size"].items() if not name.startswith("latency")}
    return {**row, "size": size, "train_seconds": None}


def test_a_study_killed_twice_and_resumed_leaves_what_an_unbroken_one_leaves(watched, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    phases = watched(whole)
    rows = reporting.read(whole / "out" / "rows.jsonl")
    check_rows(rows)
    check_files(whole / "out", rows)
    check_ledger(whole / "out", rows[1])

    first = watched(broken, kill_at=("dp+at+mc", "training", 2))  # while the model is pruned
    assert (broken / "out" / "work").exists()
    plain_line = (broken / "out" / "rows.jsonl").read_bytes()
    assert plain_line.count(b"\n") == 1
    assert charged_rounds(broken / "out", "training") == 2  # blocks of one round here: what was looked at, no less
    second = watched(broken, kill_at=("dp+at+mc", "poisoned, trimmed mean", 4))  # when it is small
    assert charged_rounds(broken / "out", "poisoned, trimmed mean") == 4
    third = watched(broken)
    assert first + second + third != phases
    assert first[: first.index(("dp+at+mc", "training", 1))] == phases[: phases.index(("dp+at+mc", "training", 1))]
    assert {name for name, *_ in second + third} == {"dp+at+mc"}  # the finished row is skipped
    assert second[0] == ("dp+at+mc", "training", 2)  # from the checkpoint, not from the start
    trained_again = [phase for phase in third if phase[1] != "evaluation"]
    assert trained_again == [("dp+at+mc", "poisoned, trimmed mean", done) for done in (4, 5)]

    resumed = reporting.read(broken / "out" / "rows.jsonl")
    assert (broken / "out" / "rows.jsonl").read_bytes().startswith(plain_line)
    assert [timeless(row) for row in resumed] == [timeless(row) for row in rows]
    for model in MODELS:
        assert contents(broken / "out" / model) == contents(whole / "out" / model)
    check_files(broken / "out", resumed)
    assert (broken / "out" / "ledger.jsonl").read_bytes() == (whole / "out" / "ledger.jsonl").read_bytes()

    at_once = tmp_path / "at once"
    killed = watched(at_once, kill_at=("dp+at+mc", "training", 3), command=COMMAND.replace("no-parallel", "parallel"))
    phases_at_once = watched(at_once, command=COMMAND.replace("no-parallel", "parallel"))
    assert set(killed + phases_at_once) == set(phases)
    assert [timeless(row) for row in reporting.read(at_once / "out" / "rows.jsonl")] == [timeless(r) for r in rows]

    before = (broken / "out" / "rows.jsonl").read_bytes()
    assert watched(broken) == []  # all done: nothing is trained, only reported again
    assert (broken / "out" / "rows.jsonl").read_bytes() == before


INTEGERS = (
    "--combinations mc --mc.bits 4 --mc.activations int8 --mc.aware-share 0.4 --mc.label-share 0.5 "
    "--train.num-rounds 5 --poison.malicious-share 0"
)


@pytest.mark.slow
def test_a_study_in_four_bits_is_measured_on_the_integers_in_its_file(watched, tmp_path):
    command = COMMAND.replace("--combinations plain dp+at+mc", INTEGERS).replace("--train.num-rounds 3 ", "")
    watched(tmp_path / "whole", command=command)
    # While it learns to be rounded, and from a teacher that only the first checkpoint still holds.
    watched(tmp_path / "broken", kill_at=("mc", "training", 5), command=command)
    assert watched(tmp_path / "broken", command=command)[0] == ("mc", "training", 5)
    (row,), (again,) = (reporting.read(tmp_path / folder / "out" / "rows.jsonl") for folder in ("whole", "broken"))
    assert timeless(row) == timeless(again)
    outcome = {check["check"]: check["outcome"] for check in row["checks"]}
    assert outcome["gradient_path_is_whole"] == outcome["samples_inside_ball"] == "passed"

    study = parse(command.split())
    test = data.load("digits").test
    model = build_model(study, test.image.shape[1:], 10)
    shapes = jax.eval_shape(model.init, jax.random.key(0), test.image[:1])
    path = tmp_path / "whole" / "out" / "models" / "mc-seed0.safetensors"
    found = compression.stored(path, model.apply, shapes, test.image[:1])
    assert {x.dtype for x in jax.tree.leaves(found.params.value)} == {jnp.dtype("int4"), jnp.dtype("float16")}
    assert len(found.ranges) == 2
    params, apply = compression.load(path, model.apply, shapes, test.image[:1])
    clean = evaluation.metrics(evaluation.predict(apply, params, test.image, 256), test.label)
    assert row["clean"] == clean._asdict()


def check_rows(rows):
    """All fields, and the figures that can be known beforehand."""
    assert [row["combination"] for row in rows] == [
        {"dp": False, "at": False, "mc": False},
        {"dp": True, "at": True, "mc": True},
    ]
    for row in rows:
        reporting.validate(row)
        assert row["experiment"] == "quickstart"
        assert row["config_hash"] == reporting.config_hash(row["config"])
        assert {entry["eps"] for entry in row["robust"].values()} == {0.1}
        assert {name.partition("_")[0] for name in row["robust"]} >= {"fgsm", "pgd2"}
        assert row["poisoned"]["malicious_share"] == 0.2
        for rule in ("mean", "trimmed_mean"):
            assert 0 <= row["poisoned"][rule]["accuracy"] <= 1
        for figure in ("accuracy", "balanced_accuracy", "auc"):
            assert 0 <= row["clean"][figure] <= 1
        assert all(math.isfinite(loss) for loss in row["history"]["val_loss"])
        assert row["train_seconds"] > 0
        assert 0 < row["size"]["latency_ms"] <= row["size"]["latency_p95_ms"]
        assert 0 < row["size"]["latency_1_ms"] <= row["size"]["latency_1_p95_ms"]
        assert row["size"]["peak_bytes"] > 4 * row["size"]["parameters"]
    plain, private = rows
    assert plain["privacy"] is None
    assert plain["masked_minus_shrunk"] is None
    assert plain["history"]["round"] == [1, 2, 3]
    assert (plain["size"]["parameters"], plain["size"]["parameters_ratio"]) == (3 * 3 * 8 + 2 * 8 + 8 * 10 + 10, 1)
    assert 7.5 < private["privacy"]["epsilon"] <= 8
    expected = {"unit": "record", "relation": "add_or_remove_one", "sampling": "poisson", "delta": 1e-3}
    assert expected.items() <= private["privacy"].items()
    assert private["history"]["round"] == [1, 2, 3, 4, 5]
    assert private["size"]["parameters"] == 3 * 3 * 4 + 2 * 4 + 4 * 10 + 10  # half the channels
    assert private["size"]["bytes"] < plain["size"]["bytes"]
    assert private["size"]["flops_ratio"] < 0.6
    assert 0 <= private["masked_minus_shrunk"] <= 1e-5


def charged_rounds(out, phase):
    """Steps of the private training that are in the ledger, for a silo."""
    entries = privacy.ledger.read(out / "ledger.jsonl")
    scope = f"dp+at+mc-seed0, {phase}, silo 3"
    return sum(entry.num_steps for entry in entries if (entry.scope, entry.mechanism) == (scope, "gradient"))


def check_ledger(out, row):
    """Every training of the private row is in it whole, and the row says what it says."""
    for phase in ("training", "poisoned, mean", "poisoned, trimmed mean"):
        assert charged_rounds(out, phase) == 5
    lines = {line.scope: line for line in privacy.ledger.summary(out / "ledger.jsonl", row["privacy"]["delta"])}
    assert len(lines) == 3 * (5 + 1)
    silos = [line for scope, line in lines.items() if scope.startswith("dp+at+mc-seed0, training, silo")]
    assert {line.epsilon for line in silos} == {row["privacy"]["epsilon"]}
    looks = lines["dp+at+mc-seed0, training, validation split"]
    assert (looks.epsilon, looks.looks) == (0, (("tuning", 1),))  # ten classes: no threshold is calibrated


def check_files(out, rows):
    """Everything that was promised, and no remains."""
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(FILES)
    for figure in FIGURES:
        assert (out / figure).read_bytes().startswith(b"\x89PNG\r\n")
    for row, model in zip(rows, MODELS, strict=True):
        assert (out / model).stat().st_size == row["size"]["bytes"]
    for line in (out / "rows.jsonl").read_text().splitlines():
        assert "NaN" not in line
        json.loads(line)
    accuracy = f"{100 * rows[0]['clean']['accuracy']:.1f}"
    for table in ("table.md", "table.tex"):
        assert accuracy in (out / table).read_text()


def test_a_folder_is_refused_to_the_same_study_with_another_setting(tmp_path, monkeypatch, capsys):
    """What a first run leaves behind is what a second one is compared with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "make_row", lambda *arguments: pytest.fail("trained"))
    first = ["quickstart", "--out", "out", "--combinations", "plain"]
    with pytest.raises(pytest.fail.Exception):
        main(first)
    capsys.readouterr()
    left = sorted(tmp_path.rglob("*"))
    assert main([*first, "--dp.epsilon", "4"]) == 2
    assert capsys.readouterr().err == "error: --out is out: it holds rows with another dp; must be another folder\n"
    assert sorted(tmp_path.rglob("*")) == left
    with pytest.raises(pytest.fail.Exception):  # rows of other seeds and combinations may join
        main([*first, "--seeds", "3", "--client-map", "vmap"])


def test_silos_share_out_the_training_split_and_nothing_else():
    from experiments.combinations.federation import hospitals

    site = hospitals(parse(["quickstart"]), seed=0)
    assert len(site.parts) == 5
    assert sorted(np.concatenate(site.parts).tolist()) == list(range(len(site.splits.train.label)))
