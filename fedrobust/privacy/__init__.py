"""Differential privacy: clipping, noise, plans. What leaves this room knows its sensitivity or its cost."""

from fedrobust.privacy.auditing import (
    Scores,
    epsilon_clopper_pearson,
    epsilon_gaussian,
    epsilon_one_run,
    one_run_p_value,
    one_step_scores,
)
from fedrobust.privacy.clipping import RELATIONS, ClipInfo, ClippedGrad, blank_padding, clip, clipped_grad
from fedrobust.privacy.discrete import Words, discrete_gaussian
from fedrobust.privacy.entropy import add_system_gaussian, system_words
from fedrobust.privacy.histogram import private_class_weight
from fedrobust.privacy.noise import Noise, add_gaussian, private_grad, private_mean
from fedrobust.privacy.plan import UNITS, Plan, epsilon_spent, make_plan
from fedrobust.privacy.secure_sum import SecureSum, decode, encode, secure_sum_epsilon, secure_sum_zcdp

__all__ = [
    "RELATIONS",
    "UNITS",
    "ClipInfo",
    "ClippedGrad",
    "Noise",
    "Plan",
    "Scores",
    "SecureSum",
    "Words",
    "add_gaussian",
    "add_system_gaussian",
    "blank_padding",
    "clip",
    "clipped_grad",
    "decode",
    "discrete_gaussian",
    "encode",
    "epsilon_clopper_pearson",
    "epsilon_gaussian",
    "epsilon_one_run",
    "epsilon_spent",
    "make_plan",
    "one_run_p_value",
    "one_step_scores",
    "private_class_weight",
    "private_grad",
    "private_mean",
    "secure_sum_epsilon",
    "secure_sum_zcdp",
    "system_words",
]
