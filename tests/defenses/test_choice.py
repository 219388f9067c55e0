"""Several rules in one program: each as if it were alone, switched without compiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.defenses import AggregationInfo, choice, coordinate_median, mean, trimmed_mean
from fedrobust.types import Aggregator

KEY = jax.random.key(0)
RULES = (mean(), coordinate_median(), trimmed_mean(0.2))
PARAMS = {"a": jnp.zeros(3)}
UPDATES = {"a": np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)}
WEIGHT = jnp.asarray([1, 2, 0, 1, 3, 1.0])


def counting(step):
    """The mean, with a state that counts its rounds by `step`."""

    def apply(key, state, updates, weight):
        update, _, info = mean().apply(key, (), updates, weight)
        return update, state + step, info

    return Aggregator(lambda params: jnp.zeros(()), apply)


def chosen(aggregator, index):
    return aggregator.init(PARAMS)._replace(chosen=jnp.asarray(index, jnp.int32))


def test_the_rule_in_force_acts_as_if_alone_and_switching_compiles_nothing():
    aggregator, traces = choice(*RULES), []

    @jax.jit
    def apply(state):
        traces.append(state)
        return aggregator.apply(KEY, state, UPDATES, WEIGHT)

    results = []
    for index in (0, 1, 2, 1):
        update, state, info = apply(chosen(aggregator, index))
        expected, _, expected_info = RULES[index].apply(KEY, (), UPDATES, WEIGHT)
        np.testing.assert_allclose(update["a"], expected["a"], rtol=1e-6)
        assert info == expected_info
        assert state.chosen == index
        results.append(tuple(update["a"].tolist()))
    assert len(set(results)) == 3
    assert len(traces) == 1


def test_it_begins_with_the_first_rule():
    aggregator = choice(coordinate_median(), mean())
    update, _, info = aggregator.apply(KEY, aggregator.init(PARAMS), UPDATES, WEIGHT)
    np.testing.assert_allclose(update["a"], np.median(UPDATES["a"][np.array(WEIGHT) > 0], axis=0), rtol=1e-5)
    assert isinstance(info, AggregationInfo)


def test_only_the_state_of_the_rule_in_force_moves():
    aggregator = choice(counting(1), counting(10))
    state = chosen(aggregator, 1)
    for _ in range(3):
        _, state, _ = aggregator.apply(KEY, state, UPDATES, WEIGHT)
    _, state, _ = aggregator.apply(KEY, state._replace(chosen=jnp.asarray(0)), UPDATES, WEIGHT)
    assert [float(s) for s in state.states] == [1, 30]


@pytest.mark.parametrize(("index", "used"), [(-1, 0), (99, 2)])
def test_a_choice_out_of_range_is_clamped(index, used):
    aggregator = choice(*RULES)
    update = aggregator.apply(KEY, chosen(aggregator, index), UPDATES, WEIGHT)[0]
    np.testing.assert_allclose(update["a"], RULES[used].apply(KEY, (), UPDATES, WEIGHT)[0]["a"], rtol=1e-6)


def test_choosing_among_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^the number of aggregators is 0"):
        choice()
