"""Differential privacy: clipping, noise, plans. What leaves this room knows its sensitivity or its cost."""

from fedrobust.privacy.clipping import RELATIONS, ClipInfo, ClippedGrad, blank_padding, clip, clipped_grad
from fedrobust.privacy.histogram import private_class_weight
from fedrobust.privacy.noise import add_gaussian, private_grad, private_mean
from fedrobust.privacy.plan import UNITS, Plan, epsilon_spent, make_plan

__all__ = [
    "RELATIONS",
    "UNITS",
    "ClipInfo",
    "ClippedGrad",
    "Plan",
    "add_gaussian",
    "blank_padding",
    "clip",
    "clipped_grad",
    "epsilon_spent",
    "make_plan",
    "private_class_weight",
    "private_grad",
    "private_mean",
]
