"""FAB and Square beside torchattacks and pyautoattack: the same weights, 1000 digits, what broke there.

`tests/golden/torch_fab_square.py` made the file, versions inside.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedrobust.attacks import fab, run, square

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "torch_fab_square.json").read_text())
RUNS = [dict(zip(GOLDEN["fields"], row, strict=True)) for row in GOLDEN["runs"]]


def broken(net, norm, family, search):
    """[1000] bool of ours, [runs, 1000] of the peers'."""
    bundled = load_digits()
    image = (bundled.images / 16).astype(np.float32)[GOLDEN["num_train"] :, ..., None]
    digit = bundled.target[GOLDEN["num_train"] :]
    label = digit if net == "ten" else (digit < 5).astype(int)
    w1, b1, w2, b2 = (np.asarray(x, np.float32) for x in GOLDEN["weights"][net])
    rows = [row for row in RUNS if (row["net"], row["norm"], row["family"]) == (net, norm, family)]
    theirs = [np.unpackbits(np.frombuffer(bytes.fromhex(row["errors"]), np.uint8))[: len(digit)] for row in rows]
    attack = run(search(rows[0]), num_slots=256)

    def model(x):
        return jax.nn.relu(x.reshape(len(x), -1) @ w1 + b1) @ w2 + b2

    found = jax.jit(lambda x, y: attack(jax.random.key(0), model, x, y, y >= 0))(image, label)
    return np.asarray(found.wrong), np.array(theirs, bool)


@pytest.mark.parametrize(
    ("net", "norm"), [("ten", "linf"), ("two", "l2"), pytest.param("ten", "l1", marks=pytest.mark.slow)]
)
def test_fab_breaks_what_torch_breaks(net, norm):
    """Robust accuracy at most 0.2 points above the peers', and at most 1 % of the images told otherwise."""
    num_targets = 9 if net == "ten" else 1
    ours, theirs = broken(
        net,
        norm,
        "fab",
        lambda row: fab(norm=norm, eps=row["eps"], num_steps=row["fab_steps"], num_targets=num_targets),
    )
    for errors in theirs:
        assert ours.sum() >= errors.sum() - 2
        assert np.sum(ours != errors) <= 10


@pytest.mark.parametrize(
    ("net", "norm"),
    [("ten", "linf"), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("two", "l2"), ("ten", "l1")))],
)
def test_square_breaks_at_least_as_many_as_torch(net, norm):
    """Robust accuracy at most 0.5 points above the highest of the peers' seeds; it is lower on such small images.

    Both peers draw corners from [0, side - square), so that a square never covers the last row and column.
    """
    ours, theirs = broken(
        net, norm, "square",
        lambda row: square(norm=norm, eps=row["eps"], num_queries=row["square_queries"], p_init=0.8),
    )  # fmt: skip
    assert len(theirs) >= 3 and ours.sum() >= theirs.sum(1).min() - 5
