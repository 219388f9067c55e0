import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust import evaluation, ops, trace, trees
from fedrobust.compression import (
    find_channels,
    kept_units,
    masks,
    masks_within,
    measure_bytes,
    measure_flops,
    measure_parameters,
    num_kept,
    quantize,
    save,
    shrink,
)

ONE = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)


def apply(p, x):
    x = jax.nn.relu(ops.conv(x, p["a"]) + p["b"])
    return jax.nn.relu(ops.conv(x, p["c"])).mean((1, 2)) @ p["d"]


SHAPES = {"a": (3, 3, 2, 8), "b": (8,), "c": (3, 3, 8, 12), "d": (12, 3)}
PARAMS = {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate(SHAPES.items())
}
CHANNELS = find_channels(apply, PARAMS, ONE)


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_the_masks_are_the_largest_ones_within_the_budget(scope):
    """Against a search through every sparsity in steps of less than a unit."""

    def cost(chosen):
        return measure_parameters(*reversed(shrink(apply, CHANNELS, PARAMS, chosen)))

    every = [
        cost(masks(CHANNELS, PARAMS, sparsity=sparsity, scope=scope)) for sparsity in np.arange(0, 1, 1 / 48).tolist()
    ]
    for budget in (0.9, 0.5, 0.36):
        found = masks_within(apply, CHANNELS, PARAMS, measure=measure_parameters, budget=budget, scope=scope)
        assert cost(found) == max(c for c in every if c <= budget * trees.size(PARAMS))


@pytest.mark.parametrize("measure", [measure_flops(ONE), measure_bytes])
def test_a_step_less_would_not_have_been_within_the_budget(measure):
    small = shrink(apply, CHANNELS, PARAMS, masks_within(apply, CHANNELS, PARAMS, measure=measure, budget=0.5))
    sparsity = 1 - small[0]["c"].shape[-1] / 12
    larger = shrink(apply, CHANNELS, PARAMS, masks(CHANNELS, PARAMS, sparsity=max(sparsity - 1 / 12, 0)))
    dense = measure(apply, PARAMS)
    assert measure(*reversed(small)) <= 0.5 * dense < measure(*reversed(larger))


def test_measures_are_what_their_names_say(tmp_path):
    by_hand = 2 * 16 * 9 * (2 * 8 + 8 * 12) + 2 * 12 * 3
    assert measure_flops(ONE)(apply, PARAMS) == trace.flops(apply, PARAMS, ONE) == by_hand
    assert measure_parameters(apply, PARAMS) == trees.size(PARAMS) == 144 + 8 + 864 + 36
    assert measure_bytes(apply, PARAMS) == save(tmp_path / "x", quantize(PARAMS), guarantee={})


def test_a_whole_budget_removes_nothing_and_measures_nothing():
    found = masks_within(apply, CHANNELS, PARAMS, measure=lambda *_: pytest.fail("measured"), budget=1.0)
    assert kept_units(CHANNELS, found).all()


def test_multiples_and_scores_are_those_of_masks():
    score = np.arange(20.0)
    settings = {"score": score, "multiple_of": 4}
    found = masks_within(apply, CHANNELS, PARAMS, measure=measure_parameters, budget=0.5, **settings)
    assert (num_kept(CHANNELS, found) % 4 == 0).all()
    same = [masks(CHANNELS, PARAMS, sparsity=k / 96, **settings) for k in range(96)]
    assert any((kept_units(CHANNELS, found) == kept_units(CHANNELS, other)).all() for other in same)


def test_measured_time_is_a_budget_like_any_other():
    """A measure of another room, with a clock whose figures are the model's channels."""

    def latency(*model):
        (found,) = evaluation.latencies(model, image_shape=(4, 4, 2), batch_size=1, num_repeats=1)
        assert found.median_ms > 0
        return float(model[1]["a"].shape[-1])

    found = masks_within(apply, CHANNELS, PARAMS, measure=latency, budget=0.5)
    assert num_kept(CHANNELS, found).tolist() == [4, 6]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"budget": 0.0}, r"budget is 0.0: must be in \(0, 1\]"),
        ({"budget": 1.5}, r"budget is 1.5: must be in \(0, 1\]"),
        ({"budget": 0.01}, r"budget is 0.01: must be >= 0\.\d+, what the sparsest model costs"),
        ({"scope": "layer"}, "scope is 'layer': must be one of global, uniform"),
        ({"score": "l3"}, "score is 'l3': must be one of fpgm, l1, l2, random"),
        ({"multiple_of": 0}, "multiple_of is 0: must be a whole number >= 1"),
    ],
)
def test_bad_settings_are_named_in_one_line(setting, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        masks_within(apply, CHANNELS, PARAMS, **{"measure": measure_parameters, "budget": 0.5, **setting})
