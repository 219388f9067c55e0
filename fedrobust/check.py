"""Checks of static settings: one-line `ValueError`s that name the setting, its value and what is allowed."""

from collections.abc import Collection
from numbers import Integral
from typing import Any


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raises unless `condition` holds.

    Args:
        condition: what must be true.
        name: the setting as its user wrote it.
        value: what was given.
        allowed: the allowed range, in words.

    Raises:
        ValueError: one line: name, value, allowed range.
    """
    if not condition:
        raise ValueError(f"{name} is {value!r}: must be {allowed}")


def positive(name: str, value: float) -> None:
    """Requires a finite number > 0."""
    require(0 < value < float("inf"), name, value, "a finite number > 0")


def non_negative(name: str, value: float) -> None:
    """Requires a finite number >= 0."""
    require(0 <= value < float("inf"), name, value, "a finite number >= 0")


def at_least(name: str, value: int, minimum: int) -> None:
    """Requires a whole number >= minimum."""
    require(isinstance(value, Integral) and value >= minimum, name, value, f"a whole number >= {minimum}")


def fraction(name: str, value: float, *, zero: bool = True, one: bool = True) -> None:
    """Requires a number in [0, 1], with either end left out on request."""
    inside = (value > 0 or (zero and value == 0)) and (value < 1 or (one and value == 1))
    require(inside, name, value, f"in {'[' if zero else '('}0, 1{']' if one else ')'}")


def one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Requires a member of a collection."""
    require(value in allowed, name, value, "one of " + ", ".join(sorted(map(str, allowed))))
