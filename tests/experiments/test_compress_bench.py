"""The benchmark of compression: its names, and that its ratios are those of what was measured."""

import functools
import json

import pytest

from experiments.bench import NAMES, compress
from experiments.bench.__main__ import rows
from fedrobust import compression, evaluation


def test_rows_are_those_that_are_asked_for_and_ratios_say_how_many_times_better(monkeypatch):
    assert NAMES["compress"] == "experiments.bench.compress"

    def latencies(*models, **settings):
        assert settings == {"image_shape": (28, 28, 1), "batch_size": 64, "num_repeats": 2}
        return [evaluation.Latency(ms, 2 * ms) for ms in (120.0, 40.0, 20.0)[: len(models)]]

    monkeypatch.setattr(evaluation, "latencies", latencies)
    monkeypatch.setattr(compression, "shrink", functools.partial(compression.shrink, verify=False))  # it compiles
    found = {row["name"]: row for row in json.loads(rows(compress.run(width=8, repeats=2)))}
    assert list(found) == [
        f"{name}_{left}_{measure}_over_dense"
        for name in ("resnet9", "resnet18")
        for left in ("half", "quarter")
        for measure in ("latency", "parameters")
    ]
    assert all(row["more_is_better"] for row in found.values())
    targets = {"half_latency": 1.8, "half_parameters": 3.5, "quarter_latency": 3.0, "quarter_parameters": 12.0}
    for name in ("resnet9", "resnet18"):
        row = {key: found[f"{name}_{key}_over_dense"] for key in targets}
        assert {key: row[key]["target"] for key in targets} == targets
        assert row["half_latency"]["ratio"] == pytest.approx(3)
        assert row["quarter_latency"]["ratio"] == pytest.approx(6)
        assert row["quarter_latency"]["sides"] == {"quarter": 20.0, "dense": 120.0}
        # Kernels lose the square of the factor, norms and the last layer the factor itself.
        assert 3.5 < row["half_parameters"]["ratio"] < 4
        assert 12 < row["quarter_parameters"]["ratio"] < 16
