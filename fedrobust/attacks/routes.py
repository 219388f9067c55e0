"""Ways around a model whose own gradient is cut or vanishes, such as one that computes in integers."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fedrobust import check, trace
from fedrobust.attacks.auto_pgd import auto_pgd
from fedrobust.attacks.driver import run
from fedrobust.attacks.square import NORMS, square
from fedrobust.attacks.transfer import transfer, with_gradient_of
from fedrobust.types import Found, Key, LogitsFn, Run, Search

Wrapper = Callable[[LogitsFn], LogitsFn]


def routes(
    logits_fn: LogitsFn,
    image: jax.Array,
    *,
    norm: str,
    num_steps: int,
    num_queries: int,
    num_slots: int,
    num_devices: int | None = 1,
    dequantized: LogitsFn | None = None,
    parent: LogitsFn | None = None,
) -> dict[str, Callable[[jax.Array], Run]]:
    """The routes that a model needs, read from its jaxpr and from its logits.

    - "straight_through": the gradient of the same program with slope 1 at every rounding and cast;
    - "dequantized": the gradient of the model with its weights as floats;
    - "parent": points found on the float model it was made from, each tried on the model;
    - "temperature": the straight-through gradient of logits brought to a margin of 1;
    - "square": no gradient.

    Args:
        logits_fn: `image[B,H,W,C] -> logits[B,L]`, the model as it is served.
        image: [B,H,W,C], some images; the margins on them decide about "temperature".
        norm: "linf", "l2" or "l1".
        num_steps: of Auto-PGD on the margin, >= 1.
        num_queries: of Square, >= 1.
        num_slots, num_devices: as in `run`.
        dequantized: as `logits_fn`, differentiable; None leaves its route out.
        parent: likewise.

    Returns:
        By name, from a radius to an attack whose success is counted on the model it is given, which must be
        `logits_fn`. Empty for a model that no rounding, cast or stop stands in the way of and whose median margin is
        below 15: its own gradient is the route.

    Raises:
        ValueError: unknown norm, a number out of range.

    Source: Athalye, Carlini, Wagner 2018 (arXiv 1802.00420); Gupta, Ajanthan 2021 (arXiv 2003.13511) for the
        temperature of quantized networks.
    """
    check.one_of("norm", norm, NORMS)
    check.at_least("num_queries", num_queries, 1)
    top = jax.lax.top_k(logits_fn(image), 2)[0].astype(jnp.float32)
    margin = jnp.median(top[:, 0] - top[:, 1])
    if not trace.interruptions(logits_fn, image) and margin < _SATURATED:
        return {}

    on_many = functools.partial(run, num_slots=num_slots, num_devices=num_devices)

    def search(eps: jax.Array) -> Search:
        return auto_pgd(norm=norm, eps=eps, num_steps=num_steps, random_start=True, objective="margin")

    def along(twin_of: Wrapper, search: Callable[[jax.Array], Search]) -> Callable[[jax.Array], Run]:
        def attack(eps: jax.Array) -> Run:
            plain = on_many(search(eps))

            def on_twin(key: Key, model: LogitsFn, image: jax.Array, label: jax.Array, todo: jax.Array) -> Found:
                twin = twin_of(model)

                def pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
                    return model(jax.lax.stop_gradient(x)), twin(x)

                return plain(key, pair, image, label, todo)

            return on_twin

        return attack

    def straight(model: LogitsFn) -> LogitsFn:
        return with_gradient_of(trace.straight_through(model), model)

    def entropy(eps: jax.Array) -> Search:
        return auto_pgd(norm=norm, eps=eps, num_steps=num_steps, random_start=True, objective="cross_entropy")

    scale = 1 / jnp.maximum(margin, 1e-6)
    found = {"straight_through": along(straight, search)}
    if dequantized is not None:
        found["dequantized"] = along(lambda model: with_gradient_of(dequantized, model), search)
    if parent is not None:
        found["parent"] = lambda eps: transfer(search(eps), parent, num_slots=num_slots, num_devices=num_devices)
    found["temperature"] = along(lambda model: lambda x: scale * straight(model)(x), entropy)
    found["square"] = lambda eps: on_many(square(norm=norm, eps=eps, num_queries=num_queries, p_init=0.8))
    return found


_SATURATED = 15.0  # of a softmax in float32 a margin of 17 leaves the larger share 1, and no slope
