"""The gate's probes ask as often and go as far as their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrobust.attacks import balls, probes

KEY = jax.random.key(0)
IMAGE, LABEL = np.full((3, 4, 4, 1), 0.5, np.float32), np.zeros(3, int)


def firm(x):
    """Class 0 everywhere within reach, and a slope."""
    return jnp.stack([14 - jnp.sum(x, (1, 2, 3)), 0 * x[:, 0, 0, 0]], 1)


def found_by(probe, eps=0.1):
    return jax.jit(lambda: probe(eps)(KEY, firm, IMAGE, LABEL, LABEL == 0))()


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_probes_ask_as_often_and_go_as_far_as_they_say(norm):
    asked = {}
    for name, probe in probes(norm=norm, num_steps=7, num_queries=9, num_slots=3).items():
        found = found_by(probe)
        asked[name] = int(found.num_queries[0])
        lengths = [balls.length(norm, delta) for delta in found.image - IMAGE]
        np.testing.assert_allclose(lengths, 0.1, rtol=1e-3, err_msg=name)
    clean, once = 1, 7 + 1  # twice 7 steps are too few for a cycle
    assert asked == {
        "fgsm": clean + 2,
        "pgd": clean + once,
        "more_steps": clean + 7 + once,
        "more_restarts": clean + 2 * once,
        "auto_pgd": clean + once,
        "square": clean + 9,
        "noise": clean + 9,
    }
