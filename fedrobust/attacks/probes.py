"""The attacks that tell whether another attack's number can be believed."""

from collections.abc import Callable

import jax

from fedrobust import check
from fedrobust.attacks import balls
from fedrobust.attacks.auto_pgd import auto_pgd
from fedrobust.attacks.driver import run
from fedrobust.attacks.momentum_pgd import momentum_pgd
from fedrobust.attacks.noise import random_noise
from fedrobust.attacks.square import square
from fedrobust.types import Run, Search


def probes(
    *, norm: str, num_steps: int = 20, num_queries: int = 300, num_slots: int = 32, num_devices: int | None = 1
) -> dict[str, Callable[[jax.Array], Run]]:
    """One attack for each question of `evaluation.gate`, as a function of the radius.

    Args:
        norm: "linf" or "l2".
        num_steps: of PGD, >= 4; its steps are a fifth of the radius.
        num_queries: of the black boxes, >= 1.
        num_slots, num_devices: as in `run`.

    Returns:
        By name: "fgsm" (one step), "pgd", "more_steps" (twice as many), "more_restarts" (two), "auto_pgd" (on the
        margin), "square" and "noise" (which see no gradient). Keep the dictionary from one model to the next: what is
        compiled for a model's function is remembered by it.

    Raises:
        ValueError: unknown norm, a number out of range.
    """
    check.one_of("norm", norm, ("linf", "l2"))
    check.at_least("num_steps", num_steps, 4)
    check.at_least("num_queries", num_queries, 1)
    check.at_least("num_slots", num_slots, 1)

    def pgd(eps: balls.Radius, num_steps: int, num_restarts: int = 1) -> Search:
        return momentum_pgd(
            norm=norm,
            eps=eps,
            step_size=eps / 5,
            num_steps=num_steps,
            momentum=0.0,
            random_start=True,
            num_restarts=num_restarts,
        )

    def fgsm(eps: balls.Radius) -> Search:
        return momentum_pgd(norm=norm, eps=eps, step_size=eps, num_steps=1, momentum=0.0, random_start=False)

    searches: dict[str, Callable[[jax.Array], Search]] = {
        "fgsm": fgsm,
        "pgd": lambda eps: pgd(eps, num_steps),
        "more_steps": lambda eps: pgd(eps, 2 * num_steps),
        "more_restarts": lambda eps: pgd(eps, num_steps, 2),
        "auto_pgd": lambda eps: auto_pgd(
            norm=norm, eps=eps, num_steps=num_steps, random_start=True, objective="margin"
        ),
        "square": lambda eps: square(norm=norm, eps=eps, num_queries=num_queries, p_init=0.8),
        "noise": lambda eps: random_noise(norm=norm, eps=eps, num_queries=min(num_queries, 20)),
    }

    def runner(search: Callable[[jax.Array], Search]) -> Callable[[jax.Array], Run]:
        return lambda eps: run(search(eps), num_slots=num_slots, num_devices=num_devices)

    return {name: runner(search) for name, search in searches.items()}
