"""Attacks: on images at inference time, on the data a client trains on, on the update it sends."""

from fedrobust.attacks.byzantine import UPDATE_ATTACKS, sign_flip
from fedrobust.attacks.evasion import NORMS, fgsm, pgd
from fedrobust.attacks.poisoning import adversarial_samples, flip_labels

__all__ = ["NORMS", "UPDATE_ATTACKS", "adversarial_samples", "fgsm", "flip_labels", "pgd", "sign_flip"]
