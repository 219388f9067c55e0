"""What a trained model is worth: accuracy, robustness with its verdict, cost."""

from fedrobust.evaluation.accuracy import Metrics, metrics, predict, predicted_class
from fedrobust.evaluation.attacked import Outcome, attack_all
from fedrobust.evaluation.cost import Cost, Latency, costs, latencies
from fedrobust.evaluation.gate import PROBES, gate
from fedrobust.evaluation.one_step import OneStepGap, one_step_gap
from fedrobust.evaluation.randomised import averaged
from fedrobust.evaluation.robustness import Check, Robustness, Threat, evaluate, is_overestimated
from fedrobust.evaluation.smoothing import (
    ABSTAIN,
    Certificates,
    CertifiedAccuracy,
    certificates,
    certified_accuracy,
    certify,
    noisy_counts,
)
from fedrobust.evaluation.threshold import best_shift

__all__ = [
    "ABSTAIN",
    "PROBES",
    "Certificates",
    "CertifiedAccuracy",
    "Check",
    "Cost",
    "Latency",
    "Metrics",
    "OneStepGap",
    "Outcome",
    "Robustness",
    "Threat",
    "attack_all",
    "averaged",
    "best_shift",
    "certificates",
    "certified_accuracy",
    "certify",
    "costs",
    "evaluate",
    "gate",
    "is_overestimated",
    "latencies",
    "metrics",
    "noisy_counts",
    "one_step_gap",
    "predict",
    "predicted_class",
]
