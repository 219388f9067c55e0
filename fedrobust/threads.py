"""Several threads, one compiler: what is compiled or cached is made by one of them and found by the others."""

import functools
import threading
from collections.abc import Callable
from typing import Any

COMPILING = threading.RLock()
"""Held around the first call of a compiled function that several threads may make at once.

One of them compiles, the others find it done. Without it each would compile a copy of its own.
"""


def cached(maxsize: int) -> Callable[[Callable], Callable]:
    """`functools.lru_cache` that never makes one value twice, whatever number of threads ask for it.

    Args:
        maxsize: values kept, >= 1.

    Returns:
        A decorator. Identity of the value counts where JAX remembers compiled programs by it.
    """

    def decorate(function: Callable) -> Callable:
        remembered = functools.lru_cache(maxsize)(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with COMPILING:
                return remembered(*args, **kwargs)

        return call

    return decorate
