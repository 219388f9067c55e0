"""Runs a benchmark: `python -m experiments.bench NAME [--json FILE]`."""

import datetime
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from experiments.bench import NAMES
from experiments.files import write_text
from fedrobust import check

if TYPE_CHECKING:
    from experiments.bench.timing import Comparison


_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "torch",
    "opacus",
    "jax-privacy",
    "torchattacks",
    "foolbox",
    "onnx",
    "onnxruntime",
)


def main(name: Annotated[str, tyro.conf.Positional], json: Path | None = None) -> None:
    """Runs a benchmark and prints its table.

    Args:
        name: the benchmark.
        json: where to write the rows.
    """
    check.one_of("benchmark", name, NAMES)
    check.require(json is None or json.parent.is_dir(), "--json", str(json), "in a folder that exists")
    comparisons = importlib.import_module(NAMES[name]).run()
    Console().print(table(name, comparisons))
    if json is not None:
        write_text(json, rows(comparisons))


def table(name: str, comparisons: Sequence["Comparison"]) -> Table:
    """The rows for a reader."""
    view = Table(title=f"{name} on {_device()}")
    for title in ("name", "ours", "against", "ratio", "target", "repeats"):
        view.add_column(title, justify="left" if title == "name" else "right")
    for c in comparisons:
        times = (f"{c.ours:.1f} {c.unit}", f"{c.against:.1f} {c.unit}")
        view.add_row(
            c.name,
            *times,
            f"{c.ratio:.2f}",
            f"{'>=' if c.more_is_better else '<='} {c.target}" if c.target else "",
            str(c.repeats),
        )
    return view


def rows(comparisons: Sequence["Comparison"]) -> str:
    """The rows for a program: a JSON list."""
    where = {
        "device": _device(),
        "versions": {package: version(package) for package in _PACKAGES if find_spec(package.replace("-", "_"))}
        | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    records = [c._asdict() | {"sides": dict(c.sides), "ratio": c.ratio} | where for c in comparisons]
    return json.dumps(records, indent=1) + "\n"


def _device() -> str:
    import jax  # here, so that a bad name answers at once

    return f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
