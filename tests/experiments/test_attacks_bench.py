"""The benchmark of attacks: its names, its sides at small scale, and that models which disagree are not timed."""

import itertools

import numpy as np
import pytest
from rich.console import Console

from experiments.bench import NAMES, attack_sides, attacks
from experiments.bench.__main__ import table
from experiments.bench.timing import Comparison


def test_rows_are_those_that_are_asked_for():
    assert NAMES["attacks"] == "experiments.bench.attacks"
    assert [row.name for group in attacks.GROUPS for row in group] == [
        "pgd40_over_torchattacks",
        "pgd40_over_foolbox_torch",
        "pgd40_over_foolbox_jax",
        "pgd40_over_foolbox_jax_jit",
        "pgd40_over_art",
        "apgd100_over_torchattacks",
        "pgd40_compacted_over_plain",
        "small_cnn_pgd40_over_torchattacks",
        "small_cnn_pgd40_over_foolbox_torch",
        "small_cnn_pgd40_over_foolbox_jax",
        "small_cnn_pgd40_over_foolbox_jax_jit",
        "small_cnn_pgd40_over_art",
    ]


def test_a_side_is_its_network_attack_library_and_size():
    assert attack_sides.parts("small_cnn-pgd40_foolboxjax_512") == ("small_cnn", "pgd40", "foolboxjax", 512)
    cases = itertools.product(("resnet9", "small_cnn"), ("pgd40",), ("ours", "foolboxjax"), (64, 512))
    assert [attack_sides.num_steps(*case) for case in cases] == [40, 40, 40, 8, 40, 40, 40, 40]
    assert attack_sides.num_steps("resnet9", "apgd100", "torchattacks", 512) == 20
    assert attack_sides.num_steps("resnet9", "weak40", "plain", 512) == 40


class FakeSide:
    """Takes 100 ms where it is ours and 200 ms otherwise; told the file of its own network."""

    def __init__(self, name, file, *, module):
        assert module == "experiments.bench.attack_sides"
        assert file.endswith(name.split("-")[0] + ".npz")
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self):
        return 100.0 if "_ours_" in self.name else 200.0


@pytest.mark.parametrize("installed", [("jax", "foolbox", "art", "torchattacks"), ("jax",)])
def test_speeds_are_images_times_steps_over_seconds(installed, monkeypatch, capsys):
    monkeypatch.setattr(attacks, "Side", FakeSide)
    monkeypatch.setattr(attack_sides, "save", lambda file, network, num: None)
    monkeypatch.setattr(attacks.importlib.util, "find_spec", lambda name: name if name in installed else None)
    found = {row.name: row for row in attacks.run()}
    brief = {f"pgd40_over_{name}_512" for name in ("foolbox_jax", "foolbox_jax_jit")}  # a fifth of our steps
    assert {name: row.ratio for name, row in found.items()} == {name: 2.0 + 8.0 * (name in brief) for name in found}
    assert found["pgd40_compacted_over_plain_512"].ours == pytest.approx(512 * 40 / 0.1)
    if "art" in installed:
        assert len(found) == 24
        assert found["pgd40_over_foolbox_jax_512"].ours == pytest.approx(512 * 40 / 0.1)
        assert found["pgd40_over_foolbox_jax_512"].against == pytest.approx(512 * 8 / 0.2)
        assert found["small_cnn_pgd40_over_art_512"].against == pytest.approx(512 * 40 / 0.2)
    else:
        assert len(found) == 2 and "small_cnn_pgd40_over_art: left out, needs pip install" in capsys.readouterr().err


def test_a_network_that_has_learnt_nothing_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(attack_sides, "NUM_TRAINING_STEPS", 0)
    with pytest.raises(RuntimeError, match=r"small_cnn is right on \d+\.\d% of its training images: 95% are wanted"):
        attack_sides.save(str(tmp_path / "model.npz"), "small_cnn", 64)
    assert not list(tmp_path.iterdir())


def test_a_speed_has_a_smallest_accepted_ratio():
    row = Comparison("a_over_b", 3.0, 2.0, "image-steps/s", 1.5, 5, more_is_better=True)
    console = Console(width=200, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as printed:
        console.print(table("x", [row]))
    assert ">= 1.5" in printed.get()


def test_models_that_disagree_are_not_timed():
    attack_sides._agree(np.array([1, 0]), np.array([1, 0]))
    with pytest.raises(RuntimeError, match=r"agree on 50\.00% of the images"):
        attack_sides._agree(np.array([1, 0]), np.array([1, 1]))
