"""Work in threads gives what work in turn gives, and a failure ends all of it."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from experiments import parallel
from fedrobust import threads


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(num_threads):
    def task(i):
        return lambda check: time.sleep(0.05 * (3 - i)) or i

    assert parallel.run([task(i) for i in range(3)], num_threads=num_threads) == [0, 1, 2]


def test_tasks_run_at_once_only_if_asked():
    together = threading.Barrier(2)
    parallel.run([lambda check: together.wait(5)] * 2, num_threads=2)
    with pytest.raises(threading.BrokenBarrierError):
        parallel.run([lambda check: together.wait(0.05)] * 2, num_threads=1)


def test_a_failure_stops_the_others_and_is_the_one_that_is_raised():
    ended = []

    def endless(check):
        try:
            while True:
                check()
                time.sleep(0.005)
        finally:
            ended.append(True)

    def failing(check):
        time.sleep(0.05)
        raise OSError("disk full")

    def forbidden(check):
        pytest.fail("begun after a failure")

    with pytest.raises(OSError, match="disk full"):
        parallel.run([endless, failing, endless, forbidden], num_threads=3)
    assert ended == [True, True]


def test_a_value_asked_for_by_many_threads_is_made_once():
    made = []

    @threads.cached(maxsize=2)
    def slow(name):
        time.sleep(0.05)
        made.append(name)
        return object()

    values = parallel.run([lambda check: slow("a")] * 4, num_threads=4)
    assert made == ["a"]
    assert len(set(map(id, values))) == 1


def test_a_program_called_first_under_the_lock_is_compiled_once():
    traced = []

    @jax.jit
    def program(x):
        traced.append(True)
        time.sleep(0.05)
        return x + 1

    def task(check):
        with threads.COMPILING:
            return float(program(jnp.zeros(())))

    assert parallel.run([task] * 3, num_threads=3) == [1.0] * 3
    assert traced == [True]
