"""Attacks: on images at inference time, on the data a client trains on, on the update it sends."""

from collections.abc import Callable, Mapping

from fedrobust.attacks.auto_attack import AutoAttack, Member, Replacement, auto_attack
from fedrobust.attacks.auto_pgd import auto_pgd
from fedrobust.attacks.byzantine import UPDATE_ATTACKS, sign_flip
from fedrobust.attacks.driver import as_attack, run
from fedrobust.attacks.evasion import NORMS, fgsm, pgd
from fedrobust.attacks.fab import fab
from fedrobust.attacks.hard_label import rays
from fedrobust.attacks.momentum_pgd import momentum_pgd
from fedrobust.attacks.noise import random_noise
from fedrobust.attacks.objectives import OBJECTIVES, Objective
from fedrobust.attacks.poisoning import adversarial_samples, flip_labels
from fedrobust.attacks.probes import probes
from fedrobust.attacks.routes import routes
from fedrobust.attacks.square import square
from fedrobust.attacks.transfer import transfer, with_gradient_of
from fedrobust.types import Search

SEARCHES: Mapping[str, Callable[..., Search]] = {
    "auto_pgd": auto_pgd,
    "fab": fab,
    "momentum_pgd": momentum_pgd,
    "random_noise": random_noise,
    "rays": rays,
    "square": square,
}
"""Attacks that only evaluate, for `run`."""

__all__ = [
    "NORMS",
    "OBJECTIVES",
    "SEARCHES",
    "UPDATE_ATTACKS",
    "AutoAttack",
    "Member",
    "Objective",
    "Replacement",
    "adversarial_samples",
    "as_attack",
    "auto_attack",
    "auto_pgd",
    "fab",
    "fgsm",
    "flip_labels",
    "momentum_pgd",
    "pgd",
    "probes",
    "random_noise",
    "rays",
    "routes",
    "run",
    "sign_flip",
    "square",
    "transfer",
    "with_gradient_of",
]
