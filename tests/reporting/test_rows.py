"""Laws of rows: nothing missing, nothing lost, nothing half there."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust.reporting import append, config_hash, read, validate


def test_what_is_appended_is_read_back(tmp_path, study):
    path = tmp_path / "new" / "rows.jsonl"
    assert read(path) == []
    for row in study():
        append(path, row)
    assert read(path) == study()


def test_a_torn_line_is_ignored_and_repaired(tmp_path, study):
    path, (first, second, *_) = tmp_path / "rows.jsonl", study()
    append(path, first)
    whole = path.read_bytes()
    append(path, second)
    both = path.read_bytes()
    for cut in (len(whole) + 1, len(whole) + 200, len(both) - 1):
        path.write_bytes(both[:cut])
        assert read(path) == [first]
        append(path, second)
        assert path.read_bytes() == both
    path.write_bytes(whole[:100])  # nothing complete at all
    assert read(path) == []
    append(path, first)
    assert path.read_bytes() == whole


def test_rows_survive_kill_minus_nine(tmp_path, study):
    path, row = tmp_path / "rows.jsonl", tmp_path / "row.json"
    row.write_text(json.dumps(study()[0]))
    code = f"""
import json
from fedrobust.reporting.rows import append
row = json.load(open({str(row)!r}))
for seed in range(10**6):
    append({str(path)!r}, dict(row, seed=seed))
    print(seed, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    reported = process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    seeds = [found["seed"] for found in read(path)]
    assert seeds == list(range(len(seeds)))
    assert len(seeds) >= (int(reported[-1]) if reported else 0) + 1
    append(path, study()[0])
    assert len(read(path)) == len(seeds) + 1


def test_a_damaged_complete_line_is_named(tmp_path, study):
    path = tmp_path / "rows.jsonl"
    append(path, study()[0])
    path.write_bytes(path.read_bytes() + b"{broken\n")
    with pytest.raises(ValueError, match=r"line 2 of .*rows.jsonl"):
        read(path)


def test_numpy_and_numbers_that_are_not_finite_become_plain(tmp_path, study):
    row = study()[0]
    row["train_seconds"] = np.float32(0.5)
    row["history"] = {
        "round": np.arange(2),
        "val_loss": [float("nan"), np.inf],
        "val_accuracy": (0.1, np.float64("nan")),
    }
    append(tmp_path / "rows.jsonl", row)
    (found,) = read(tmp_path / "rows.jsonl")
    assert found["train_seconds"] == 0.5
    assert found["history"] == {"round": [0, 1], "val_loss": [None, None], "val_accuracy": [0.1, None]}


@pytest.mark.parametrize(
    "path",
    [
        "experiment",
        "combination.mc",
        "clean",
        "clean.auc",
        "size.bytes_ratio",
        "privacy.unit",
        "poisoned.mean",
        "robust.pgd20_linf_0.031.eps",
        "history.val_loss",
        "device",
    ],
)
def test_every_missing_field_is_named_and_nothing_is_written(tmp_path, study, path):
    row = copy.deepcopy(study()[-1])
    *outer, last = path.replace("0.031", "0:031").split(".")
    part = row
    for name in outer:
        part = part[name.replace(":", ".")]
    del part[last]
    with pytest.raises(ValueError, match=f"^row lacks {path}$"):
        append(tmp_path / "rows.jsonl", row)
    assert not (tmp_path / "rows.jsonl").exists()


def test_fields_that_do_not_apply_are_none_but_present(study):
    row = study()[0] | {"poisoned": None, "privacy": None}
    validate(row)
    with pytest.raises(ValueError, match=r"row lacks clean, device$"):
        validate(row | {"clean": None, "device": None})
    del row["privacy"]
    with pytest.raises(ValueError, match=r"row lacks privacy$"):
        validate(row)
    row = study()[0] | {"history": {"round": [1], "val_loss": [], "val_accuracy": []}}
    with pytest.raises(ValueError, match=r"^history is "):
        validate(row)


def test_config_hash_is_the_same_everywhere():
    assert config_hash({"a": 1, "b": {"c": [0.5, None]}}) == "ce9b82569bf9"  # sha256sum of {"a":1,"b":{"c":[0.5,null]}}
    assert config_hash({"a": np.float32(0.5)}) == config_hash({"a": 0.5})
    with pytest.raises(TypeError):
        config_hash({"a": object()})


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=3), st.integers() | st.booleans() | st.none(), min_size=1))
def test_config_hash_ignores_order_and_sees_every_value(config):
    assert config_hash(dict(reversed(config.items()))) == config_hash(config)
    key = next(iter(config))
    assert config_hash(config | {key: "changed"}) != config_hash(config)
