"""A model on integers reports its clean accuracy to an attack that trusts its gradient; the routes break it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedrobust import attacks

KEY, EPS = jax.random.key(0), 0.1
RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(0.2, 0.8, (24, 4, 4, 1)).astype(np.float32)
WEIGHT = RNG.normal(size=(16, 3)).astype(np.float32)
SCALE = np.abs(WEIGHT).max() / 127
INTEGER = np.round(WEIGHT / SCALE).astype(np.int8)


def floating(x):
    return (x - 0.5).reshape(len(x), -1) @ WEIGHT


def dequantized(x):
    return (x - 0.5).reshape(len(x), -1) @ (INTEGER * SCALE).astype(np.float32)


def on_integers(x):
    """Images in 64 steps, weights in 255, sums in 32 bits."""
    steps = jnp.clip(jnp.round((x - 0.5) * 64), -127, 127).astype(jnp.int8).reshape(len(x), -1)
    total = lax.dot_general(steps, jnp.asarray(INTEGER), (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return total.astype(jnp.float32) * np.float32(SCALE / 64)


LABEL = np.asarray(on_integers(IMAGE)).argmax(1)
SETTINGS = {"norm": "linf", "num_steps": 10, "num_queries": 150, "num_slots": 24}


def broken(attack, model):
    found = jax.jit(lambda eps: attack(eps)(KEY, model, IMAGE, LABEL, np.ones(24, bool)))(jnp.float32(EPS))
    assert (np.asarray(model(found.image)).argmax(1) != LABEL).tolist() == found.wrong.tolist()  # on the model itself
    assert np.abs(found.image - IMAGE).max() <= EPS * (1 + 1e-5)
    return float(np.mean(found.wrong))


def blind(eps):
    """Its gradient is 0, and so is every step."""
    search = attacks.momentum_pgd(norm="linf", eps=eps, step_size=eps, num_steps=5, momentum=0.0, random_start=False)
    return attacks.run(search, num_slots=24)


def test_every_route_breaks_what_trusting_its_gradient_does_not():
    assert broken(blind, on_integers) == 0
    open_share = broken(blind, floating)  # one step is optimal for a linear model
    assert open_share > 0.5
    found = attacks.routes(on_integers, IMAGE, **SETTINGS, dequantized=dequantized, parent=floating)
    assert list(found) == ["straight_through", "dequantized", "parent", "temperature", "square"]
    for name, attack in found.items():
        assert broken(attack, on_integers) >= open_share - (0.25 if name == "square" else 0.1), name


def test_saturated_logits_are_reached_by_temperature():
    def saturated(x):
        return 1e4 * floating(x)

    label = np.asarray(floating(IMAGE)).argmax(1)
    np.testing.assert_array_equal(label, LABEL)
    found = attacks.routes(saturated, IMAGE, **SETTINGS)
    assert list(found) == ["straight_through", "temperature", "square"]
    assert broken(found["temperature"], saturated) >= broken(blind, floating) - 0.05


def test_a_model_with_a_gradient_needs_no_route():
    assert attacks.routes(floating, IMAGE, **SETTINGS) == {}


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"^norm is 'l0'"):
        attacks.routes(floating, IMAGE, **{**SETTINGS, "norm": "l0"})
    with pytest.raises(ValueError, match=r"^num_queries is 0"):
        attacks.routes(floating, IMAGE, **{**SETTINGS, "num_queries": 0})
