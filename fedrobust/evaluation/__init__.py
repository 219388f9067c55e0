"""What a trained model is worth: accuracy, robustness with its verdict, cost."""

from fedrobust.evaluation.accuracy import Metrics, metrics, predict
from fedrobust.evaluation.cost import Cost, cost, latencies
from fedrobust.evaluation.robustness import Robustness, Threat, evaluate

__all__ = ["Cost", "Metrics", "Robustness", "Threat", "cost", "evaluate", "latencies", "metrics", "predict"]
