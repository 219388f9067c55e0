import json
import subprocess
import sys
from typing import ClassVar

import jax.numpy as jnp
import pytest

from experiments.bench import dp_step
from experiments.bench.timing import Comparison, compare


def test_functions_are_called_in_turns_after_one_call_each():
    calls = []

    def function(name):
        return lambda: calls.append(name) or jnp.zeros(())

    got = compare("a_over_b", function("a"), function("b"), repeats=3, target=2.0)
    assert calls == ["a", "b"] * 4
    assert got.ratio == got.ours / got.against and got.unit == "ms" and got.repeats == 3


def test_rows_hold_every_field_of_the_format():
    from experiments.bench.__main__ import rows, table

    comparisons = [Comparison("a_over_b", 3.0, 2.0, "ms", None, 5)]
    (row,) = json.loads(rows(comparisons))
    assert row["name"] == "a_over_b" and row["ratio"] == 1.5 and row["unit"] == "ms"
    assert {"ours", "against", "device", "versions", "date"} <= set(row)
    assert table("x", comparisons).row_count == 1


@pytest.mark.parametrize(
    ("arguments", "named"), [(["nothing"], "nothing"), (["ops", "--json", "/no/such/folder/x.json"], "--json")]
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, named):
    done = subprocess.run([sys.executable, "-m", "experiments.bench", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert named in done.stderr and len(done.stderr.splitlines()) == 1


class FakeSide:
    """Answers with 3, 2 and 1 times the number of its name, and notes whose turn it was."""

    turns: ClassVar[list[str]] = []
    value: ClassVar = {"plain": 10.0, "clipped": 11.0, "torch": 9.0, "torch_channels_last": 5.0, "pgd7": 64.0}

    def __init__(self, name):
        self.name, self.calls = name, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self):
        self.turns.append(self.name)
        self.calls += 1
        return self.value.get(self.name, 20.0) * (1, 3, 2)[self.calls % 3]


def measured(monkeypatch, installed):
    monkeypatch.setattr(FakeSide, "turns", [])
    monkeypatch.setattr(dp_step, "Side", FakeSide)
    monkeypatch.setattr(dp_step, "REPEATS", 3)
    monkeypatch.setattr(dp_step.importlib.util, "find_spec", lambda package: installed or None)
    return {row.name: row for row in dp_step.run()}


def test_sides_take_turns_and_the_fastest_of_the_others_counts(monkeypatch):
    rows = measured(monkeypatch, installed=True)
    first = FakeSide.turns[: FakeSide.turns.index("clipped", 1)]
    assert FakeSide.turns[: 3 * len(first)] == first * 3 and len(set(first)) == len(first) == 8
    assert rows["clip_over_plain"].ratio == pytest.approx(1.1)
    assert rows["plain_over_torch"].against == 10.0  # the median of 5, 10 and 15
    assert rows["dp_pgd7_over_plain"].ratio == pytest.approx(64 / (8 * 10))


def test_rows_against_absent_packages_are_left_out_with_one_line_each(monkeypatch, capsys):
    rows = measured(monkeypatch, installed=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all('".[bench]"' in line for line in lines)
    assert set(rows) == {
        "clip_over_plain",
        "clip_over_plain_microbatched",
        "clip_over_plain_clients",
        "dp_pgd1_over_plain",
        "dp_pgd7_over_plain",
        "lean_memory_over_plain_memory",
        "microbatched_memory_over_plain_memory",
    }
