"""Objectives by hand, and what must hold for any logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import objectives
from fedrobust.attacks.objectives import OBJECTIVES

LOGITS = jnp.asarray([2.0, 1.0, 0.5, -1.0])


@pytest.mark.parametrize(
    ("name", "label", "target", "expected"),
    [
        ("cross_entropy", 0, 1, np.log(np.exp([2, 1, 0.5, -1]).sum()) - 2),
        ("margin", 0, 1, -1.0),
        ("margin", 2, 1, 1.5),
        ("dlr", 0, 1, -1 / 1.5),
        ("dlr", 1, 0, 1 / 1.5),
        ("targeted_cross_entropy", 0, 2, 0.5 - np.log(np.exp([2, 1, 0.5, -1]).sum())),
        ("targeted_margin", 0, 3, -3.0),
        ("targeted_dlr", 0, 1, -1 / 2.25),
        ("targeted_dlr", 3, 0, 3 / 2.25),
    ],
)
def test_objectives_by_hand(name, label, target, expected):
    value = OBJECTIVES[name].value(LOGITS, jnp.asarray(label), jnp.asarray(target))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_margin_is_positive_just_where_the_model_is_wrong(num_classes):
    logits = jax.random.normal(jax.random.key(0), (200, num_classes))
    label = jnp.arange(200) % num_classes
    value = jax.vmap(objectives.margin)(logits, label)
    np.testing.assert_array_equal(value > 0, jnp.argmax(logits, 1) != label)


@pytest.mark.parametrize(("name", "num_classes"), [("dlr", 3), ("targeted_dlr", 4)])
def test_dlr_does_not_feel_scale_and_shift_and_needs_its_classes(name, num_classes):
    value = OBJECTIVES[name].value
    one, other = jnp.asarray(0), jnp.asarray(1)
    np.testing.assert_allclose(value(9 * LOGITS + 5, one, other), value(LOGITS, one, other), rtol=1e-5)
    assert OBJECTIVES[name].min_classes == num_classes
    value(LOGITS[:num_classes], one, other)
    with pytest.raises(
        ValueError, match=f"^number of classes is {num_classes - 1}: must be >= {num_classes} for {name}$"
    ):
        value(LOGITS[: num_classes - 1], one, other)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_logits_give_finite_values_and_gradients(name):
    value = jax.value_and_grad(OBJECTIVES[name].value)(jnp.zeros(4), jnp.asarray(1), jnp.asarray(2))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(value))


def test_targets_are_the_other_classes_in_falling_order():
    ranks = [int(objectives.target_class(LOGITS, jnp.asarray(1), jnp.asarray(r))) for r in range(3)]
    assert ranks == [0, 2, 3]
    objectives.check_targets(3, LOGITS)
    with pytest.raises(ValueError, match=r"^num_targets is 4: must be <= 3"):
        objectives.check_targets(4, LOGITS)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"^objective is 'hinge'"):
        objectives.resolve("hinge", 1)
    with pytest.raises(ValueError, match=r"^num_targets is 2"):
        objectives.resolve("dlr", 2)
    with pytest.raises(ValueError, match=r"^num_targets is 0"):
        objectives.resolve("targeted_dlr", 0)
