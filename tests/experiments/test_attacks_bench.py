"""The benchmark of attacks: its names, its sides at small scale, and that models which disagree are not timed."""

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
    ]


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
