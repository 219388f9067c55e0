"""Attacks that take their direction from another model than the one they must fool."""

import jax

from fedrobust.attacks.driver import run
from fedrobust.types import Found, Key, LogitsFn, Run, Search


def transfer(
    search: Search, twin: LogitsFn, *, num_slots: int, compact: bool = True, num_devices: int | None = 1
) -> Run:
    """The function that runs a search on a twin and judges each of its points by the target.

    The search goes on from the twin's logits and gradients alone, past the twin's own boundary, until the target fails.

    Args:
        search: what to run.
        twin: a model of the same classes, such as the float parent of a quantized one; differentiable.
        num_slots, compact, num_devices: as in `run`.

    Returns:
        `(key, logits_fn, image[N,H,W,C], label[N], todo[N] bool) -> Found`, as of `run`: its `wrong` and its choice of
        successes are those of `logits_fn`, which need not be differentiable. Where none was found, the image is the one
        of the twin's largest objective.

    Source:
        Papernot, McDaniel, Goodfellow 2016, https://arxiv.org/abs/1605.07277. Deviation: every point is tried on the
        target, not the last alone.
    """
    attack = run(search, num_slots=num_slots, compact=compact, num_devices=num_devices)

    def on_twin(key: Key, logits_fn: LogitsFn, image: jax.Array, label: jax.Array, todo: jax.Array) -> Found:
        def pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return logits_fn(jax.lax.stop_gradient(x)), twin(x)

        return attack(key, pair, image, label, todo)

    return on_twin


def with_gradient_of(twin: LogitsFn, logits_fn: LogitsFn) -> LogitsFn:
    """`logits_fn` with the derivative of `twin`: a way around what has no useful gradient, such as rounding.

    Args:
        twin: a differentiable model of the same classes.
        logits_fn: the model to attack.

    Returns:
        A function with the values of `logits_fn`, exactly where the twin's are finite, and the twin's derivative.

    Source:
        Athalye, Carlini, Wagner 2018, https://arxiv.org/abs/1802.00420, section 4.1.2 (BPDA).
    """

    def logits(x: jax.Array) -> jax.Array:
        of_twin = twin(x)
        return logits_fn(jax.lax.stop_gradient(x)) + (of_twin - jax.lax.stop_gradient(of_twin))

    return logits
