"""Times of two functions side by side, in one process and in one minute."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import jax


class Comparison(NamedTuple):
    """One row: what ours costs beside something else.

    Attributes:
        name: what is compared.
        ours: median time of ours.
        against: median time of the other.
        unit: of both.
        target: the largest ratio that is accepted, or None.
        repeats: timed calls of each.
    """

    name: str
    ours: float
    against: float
    unit: str
    target: float | None
    repeats: int

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
