"""Rows: one trained model, one line of JSON, never lost and never half there."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedrobust import check, jsonl


class Combination(NamedTuple):
    """Whether differential privacy (DP), adversarial training (AT), model compression (MC) took part."""

    dp: bool
    at: bool
    mc: bool

    @property
    def name(self) -> str:
        """As on a command line: "dp+at"; "plain" for none."""
        return "+".join(name for name, on in self._asdict().items() if on) or "plain"

    @property
    def label(self) -> str:
        """As in a figure: "DP + AT"; "plain" for none."""
        return " + ".join(name.upper() for name, on in self._asdict().items() if on) or "plain"

    @classmethod
    def parse(cls, name: str) -> "Combination":
        """The combination of a name.

        Raises:
            ValueError: it has a part that is none of dp, at, mc, or plain beside others.
        """
        parts = [] if name == "plain" else name.split("+")
        for part in parts:
            check.one_of("combination", part, cls._fields)
        return cls(*(field in parts for field in cls._fields))


Row = dict[str, Any]
"""One trained model, in plain JSON values. A field that does not apply is None; none is left out.

- `experiment`: str; `seed`: int; `config`: dict; `config_hash`: `config_hash(config)`
- `combination`: `dp`, `at`, `mc`: bool
- `clean`: `accuracy`, `balanced_accuracy`, `auc` (or None), `degenerate`
- `robust`: by name such as `pgd20_linf_0.031`: `accuracy`, `balanced_accuracy`, `degenerate`, `norm`, `eps`, `steps`,
  `restarts`
- `checks`: of the robust accuracies: `check`, `outcome` ("passed", "failed", "not applicable"), `figure`, `limit`,
  `detail`
- `poisoned`: None, or `attack`, `malicious_share`, `rounds_share` (of the rounds it was trained for), then `mean` and
  one robust rule by its name, each with `accuracy` and `balanced_accuracy`
- `size`: `parameters`, `bytes`, `flops`, `latency_ms`, and each `_ratio`: this model over the dense float32 one; rows
  made since 2026-11-28 also have `peak_bytes`, `latency_p95_ms`, and of one image `latency_1_ms`, `latency_1_p95_ms`
- `privacy`: None, or at least `epsilon`, `delta`, `unit`, `relation`, `sampling`
- `history`: `round`, `val_loss` (nats), `val_accuracy`: lists of one length, on the validation split
- `train_seconds`: float; `versions`: dict; `device`: str; where it was attacked again later, `attacked_with`: both of
  these, and `file`, which the SHA-256 of the model's file begins with
"""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "experiment": (),
    "combination": ("dp", "at", "mc"),
    "seed": (),
    "config": (),
    "config_hash": (),
    "clean": ("accuracy", "balanced_accuracy", "auc", "degenerate"),
    "robust": (),
    "checks": (),
    "poisoned": ("attack", "malicious_share", "rounds_share", "mean"),
    "size": tuple(
        name + suffix for name in ("parameters", "bytes", "flops", "latency_ms") for suffix in ("", "_ratio")
    ),
    "privacy": ("epsilon", "delta", "unit", "relation", "sampling"),
    "history": ("round", "val_loss", "val_accuracy"),
    "train_seconds": (),
    "versions": (),
    "device": (),
}
ROBUST_FIELDS = ("accuracy", "balanced_accuracy", "degenerate", "norm", "eps", "steps", "restarts")
NULLABLE = ("poisoned", "privacy")


def config_hash(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a configuration, equal on every machine and for every order of its keys.

    Args:
        config: JSON values; NumPy numbers, tuples and paths are taken as numbers, lists and strings.

    Raises:
        TypeError: a value that is none of these.

    >>> config_hash({"a": 1, "b": (2, 3)}) == config_hash({"b": [2, 3], "a": 1})
    True
    """
    text = json.dumps(jsonl.plain(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def validate(row: Mapping[str, Any], fields: Mapping[str, tuple[str, ...]] = FIELDS) -> None:
    """Checks that a row has every field, by default those of `Row`; None where one does not apply.

    Raises:
        ValueError: one line that names all fields that are missing.
    """
    missing = []
    for name, inner in fields.items():
        value = row.get(name)
        if value is None:
            if name not in row or name not in NULLABLE:
                missing.append(name)
        else:
            missing += [f"{name}.{field}" for field in inner if field not in value]
    for name, entry in (row.get("robust") or {}).items():
        missing += [f"robust.{name}.{field}" for field in ROBUST_FIELDS if field not in entry]
    if missing:
        raise ValueError(f"row lacks {', '.join(missing)}")
    lengths = {name: len(row["history"][name]) for name in fields.get("history", ())}
    check.require(len(set(lengths.values())) <= 1, "history", lengths, "lists of one length")


def append(path: Path | str, row: Mapping[str, Any], *, fields: Mapping[str, tuple[str, ...]] = FIELDS) -> None:
    """Adds a row to a file so that it survives the process being killed at any moment after the call returns.

    A line torn by an earlier kill is removed first. One writer at a time.

    Args:
        path: the file; it and its folder are made where missing.
        row: a `Row`; NumPy values become plain ones, numbers that are not finite become None.
        fields: what the row must have.

    Raises:
        ValueError: a field is missing; nothing is written.
    """
    validate(row, fields)
    jsonl.append(path, [row])


def read(path: Path | str) -> list[Row]:
    """All complete rows of a file, in the order they were added; none where there is no file.

    Raises:
        ValueError: a complete line that is not JSON, by its number.
    """
    return jsonl.read(path)
