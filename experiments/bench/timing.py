"""Times side by side: of two functions in one process, or of several processes in turns."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import jax


class Comparison(NamedTuple):
    """One row: what ours costs beside something else.

    Attributes:
        name: what is compared.
        ours: median time of ours, or another measure.
        against: that of the other.
        unit: of both.
        target: the largest ratio that is accepted, or None.
        repeats: timed calls of each.
        sides: the measure of each process behind the row, where the row names them.
        more_is_better: the measure is a speed, and `target` the smallest ratio that is accepted.
    """

    name: str
    ours: float
    against: float
    unit: str
    target: float | None
    repeats: int
    sides: Mapping[str, float] = MappingProxyType({})
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        """Ours over the other."""
        return self.ours / self.against


def compare(
    name: str, ours: Callable[[], Any], against: Callable[[], Any], *, repeats: int, target: float | None = None
) -> Comparison:
    """Times two functions in turns: ours, the other, ours, the other.

    In turns, because the speed of a shared machine drifts by more than the differences of interest. One call of each
    goes before, so that compilation is not timed.

    Args:
        name: of the row.
        ours: a function without arguments that returns JAX arrays.
        against: the other one.
        repeats: timed calls of each, >= 1.
        target: the largest ratio that is accepted.

    Returns:
        The medians, in milliseconds.
    """
    functions = (ours, against)
    for function in functions:
        jax.block_until_ready(function())
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, measured in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            measured.append(time.perf_counter() - start)
    return Comparison(name, 1e3 * median(seconds[0]), 1e3 * median(seconds[1]), "ms", target, repeats)


class Side:
    """A process that runs one side of a comparison when its turn comes: `python -m MODULE NAME ARGUMENTS`.

    A context manager: the process is there, warm and idle, between the start and the end.
    """

    def __init__(self, name: str, *arguments: str, module: str = "experiments.bench.sides"):
        self.name = name
        self._command = [sys.executable, "-m", module, name, *arguments]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read("ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def call(self) -> float:
        """The measure of one call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self, expected: str | None = None) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line or (expected is not None and line != expected):
            raise RuntimeError(f"side {self.name!r} ended or said {line!r}: see its messages above")
        return line
