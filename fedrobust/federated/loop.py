"""Rounds, one after the other."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fedrobust import threads
from fedrobust.types import Cohort, Federated, Key


def rounds(
    federated: Federated,
    state: Any,
    cohorts: Callable[[int], Cohort],
    key: Key,
    num_rounds: int,
    *,
    between: Callable[[Any, int], Any] | None = None,
) -> Iterator[tuple[int, Any, Any]]:
    """Runs a federation from where its state stands up to `num_rounds`, yielding after every round.

    Round r uses `fold_in(key, r)` and `cohorts(r)` alone, so a run that goes on from a saved state draws the same
    numbers, and ends in the same bits, as one that was never interrupted.

    Args:
        federated: its `round` is compiled once.
        state: from `federated.init` or a checkpoint; has a field `round`, the number of rounds done.
        cohorts: pure function of the round.
        key: the root key of training, shape ().
        num_rounds: where to stop.
        between: `(state, rounds done) -> state`, what the server does after a round and before it is yielded, outside
            what is compiled: renew pruning masks, say. Shapes and dtypes must stay.

    Yields:
        `(rounds done, state, info)`.
    """
    step = jax.jit(federated.round)
    first = int(state.round)
    for r in range(first, num_rounds):
        # From the host: a map over devices leaves the state placed on them, which would compile a second program.
        arguments = jax.random.fold_in(key, r), jax.device_get(state), cohorts(r)
        with threads.COMPILING if r == first else contextlib.nullcontext():
            state, info = step(*arguments)
        state = state if between is None else between(state, r + 1)
        yield r + 1, state, info
