"""Independent pieces of work in threads."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

Check = Callable[[], None]


class Stopped(Exception):  # not an error: another task failed, or the user wants to leave
    """Raised in a task that has to end because another one failed."""


def run(tasks: Sequence[Callable[[Check], T]], *, num_threads: int) -> list[T]:
    """Does every task and returns their results in order.

    Args:
        tasks: `check -> result`. A task calls `check()` often; it raises `Stopped` once another task has failed or the
            main thread was interrupted.
        num_threads: how many of them at the same time, >= 1.

    Raises:
        BaseException: the first failure of a task, after all others have ended.
    """
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    if num_threads == 1:
        return [task(check) for task in tasks]

    def start(task: Callable[[Check], T]) -> T:
        check()
        return task(check)

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(start, task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            if any(not future.done() or future.exception() for future in futures):
                stop.set()
    failures = [failure for future in futures if (failure := future.exception()) is not None]
    if failures:
        raise min(failures, key=lambda failure: isinstance(failure, Stopped))
    return [future.result() for future in futures]
