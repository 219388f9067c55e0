import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

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
