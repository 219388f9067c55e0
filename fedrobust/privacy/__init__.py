"""Differential privacy: clipping, noise, plans, the ledger. What leaves this room knows its sensitivity or its cost."""

from fedrobust.privacy import ledger
from fedrobust.privacy.accounting import ACCOUNTANTS, SAMPLINGS, Event, total_epsilon
from fedrobust.privacy.clipping import RELATIONS, ClipInfo, ClippedGrad, blank_padding, clip, clipped_grad
from fedrobust.privacy.histogram import private_class_weight
from fedrobust.privacy.matrix import correlated_mean, correlated_noise, toeplitz
from fedrobust.privacy.noise import add_gaussian, private_grad, private_mean
from fedrobust.privacy.plan import (
    UNITS,
    Plan,
    distributed_multiplier,
    epsilon_spent,
    federation_epsilon,
    joint_multiplier,
    make_plan,
)

__all__ = [
    "ACCOUNTANTS",
    "RELATIONS",
    "SAMPLINGS",
    "UNITS",
    "ClipInfo",
    "ClippedGrad",
    "Event",
    "Plan",
    "add_gaussian",
    "blank_padding",
    "clip",
    "clipped_grad",
    "correlated_mean",
    "correlated_noise",
    "distributed_multiplier",
    "epsilon_spent",
    "federation_epsilon",
    "joint_multiplier",
    "ledger",
    "make_plan",
    "private_class_weight",
    "private_grad",
    "private_mean",
    "toeplitz",
    "total_epsilon",
]
