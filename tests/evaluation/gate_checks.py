"""The probes of the gate's tests, and which of its checks failed."""

import jax

from fedrobust import attacks

KEY = jax.random.key(0)
EPS, SIZE = 0.1, 64
PROBE = attacks.probes(norm="linf", num_steps=20, num_queries=200, num_slots=32)


def failed(checks):
    return {name for name, check in checks.items() if check["outcome"] == "failed"}
