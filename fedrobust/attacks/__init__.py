"""Attacks: on images at inference time, on the data a client trains on, on the update it sends."""

from fedrobust.attacks.auto_pgd import auto_pgd
from fedrobust.attacks.byzantine import UPDATE_ATTACKS, sign_flip
from fedrobust.attacks.driver import Found, as_attack, run
from fedrobust.attacks.evasion import NORMS, fgsm, pgd
from fedrobust.attacks.momentum_pgd import momentum_pgd
from fedrobust.attacks.objectives import OBJECTIVES, Objective
from fedrobust.attacks.poisoning import adversarial_samples, flip_labels

__all__ = [
    "NORMS",
    "OBJECTIVES",
    "UPDATE_ATTACKS",
    "Found",
    "Objective",
    "adversarial_samples",
    "as_attack",
    "auto_pgd",
    "fgsm",
    "flip_labels",
    "momentum_pgd",
    "pgd",
    "run",
    "sign_flip",
]
