"""Several aggregation rules in one compiled program."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedrobust import check
from fedrobust.types import Aggregator, Key, Params


class ChoiceState(NamedTuple):
    """Attributes: chosen: [] int32, the rule in force. states: every rule's own state."""

    chosen: jax.Array
    states: tuple


def choice(*aggregators: Aggregator) -> Aggregator:
    """An aggregator whose state says which of several rules is applied.

    A study that compares rules compiles its round once and swaps the state: `state._replace(chosen=1)`.

    Args:
        *aggregators: at least one; all must report the same kind of info.

    Returns:
        An `Aggregator` with a `ChoiceState`, which begins with the first rule. Only the state of the rule in force
        moves; a `chosen` out of range is clamped.

    Raises:
        ValueError: no aggregator.
    """
    check.at_least("the number of aggregators", len(aggregators), 1)

    def init(params: Params) -> ChoiceState:
        return ChoiceState(jnp.zeros((), jnp.int32), tuple(a.init(params) for a in aggregators))

    def apply(key: Key, state: ChoiceState, updates: Params, weight: jax.Array) -> tuple[Params, ChoiceState, Any]:
        def branch(index: int) -> Any:
            def run(states: tuple) -> tuple[Params, tuple, Any]:
                update, new, info = aggregators[index].apply(key, states[index], updates, weight)
                return update, (*states[:index], new, *states[index + 1 :]), info

            return run

        branches = [branch(i) for i in range(len(aggregators))]
        update, states, info = jax.lax.switch(state.chosen, branches, state.states)
        return update, ChoiceState(state.chosen, states), info

    return Aggregator(init, apply)
