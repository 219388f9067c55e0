"""What a trained model is worth: accuracy, robustness with its verdict, cost."""

from fedrobust.evaluation.accuracy import Metrics, metrics, predict, predicted_class
from fedrobust.evaluation.cost import Cost, cost, latencies
from fedrobust.evaluation.robustness import Robustness, Threat, evaluate
from fedrobust.evaluation.threshold import best_shift

__all__ = [
    "Cost",
    "Metrics",
    "Robustness",
    "Threat",
    "best_shift",
    "cost",
    "evaluate",
    "latencies",
    "metrics",
    "predict",
    "predicted_class",
]
