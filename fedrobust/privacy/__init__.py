"""Differential privacy: clipping, noise, plans, the ledger. What leaves this room knows its sensitivity or its cost."""

from fedrobust.privacy import ledger
from fedrobust.privacy.accounting import ACCOUNTANTS, SAMPLINGS, Event, total_epsilon
from fedrobust.privacy.adaptive import AdaptiveClipNorm, adaptive_clip_norm
from fedrobust.privacy.auditing import (
    Scores,
    epsilon_clopper_pearson,
    epsilon_gaussian,
    epsilon_one_run,
    one_run_p_value,
    one_step_scores,
)
from fedrobust.privacy.clipping import (
    METHODS,
    RELATIONS,
    ClipInfo,
    ClippedGrad,
    blank_padding,
    by_layer,
    clip,
    clipped_grad,
)
from fedrobust.privacy.discrete import Words, discrete_gaussian
from fedrobust.privacy.entropy import add_system_gaussian, system_words
from fedrobust.privacy.histogram import private_class_weight
from fedrobust.privacy.isolation import coupling, require_isolated
from fedrobust.privacy.matrix import correlated_mean, correlated_noise, toeplitz
from fedrobust.privacy.noise import Noise, add_gaussian, private_grad, private_mean
from fedrobust.privacy.plan import (
    UNITS,
    Plan,
    distributed_multiplier,
    epsilon_spent,
    federation_epsilon,
    joint_multiplier,
    make_plan,
)
from fedrobust.privacy.secure_sum import SecureSum, decode, encode, secure_sum_epsilon, secure_sum_zcdp

__all__ = [
    "ACCOUNTANTS",
    "METHODS",
    "RELATIONS",
    "SAMPLINGS",
    "UNITS",
    "AdaptiveClipNorm",
    "ClipInfo",
    "ClippedGrad",
    "Event",
    "Noise",
    "Plan",
    "Scores",
    "SecureSum",
    "Words",
    "adaptive_clip_norm",
    "add_gaussian",
    "add_system_gaussian",
    "blank_padding",
    "by_layer",
    "clip",
    "clipped_grad",
    "correlated_mean",
    "correlated_noise",
    "coupling",
    "decode",
    "discrete_gaussian",
    "distributed_multiplier",
    "encode",
    "epsilon_clopper_pearson",
    "epsilon_gaussian",
    "epsilon_one_run",
    "epsilon_spent",
    "federation_epsilon",
    "joint_multiplier",
    "ledger",
    "make_plan",
    "one_run_p_value",
    "one_step_scores",
    "private_class_weight",
    "private_grad",
    "private_mean",
    "require_isolated",
    "secure_sum_epsilon",
    "secure_sum_zcdp",
    "system_words",
    "toeplitz",
    "total_epsilon",
]
