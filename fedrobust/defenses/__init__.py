"""Defenses: adversarial training inside the loss, robust aggregation on the server."""

from fedrobust.defenses.adversarial_training import adversarial_loss
from fedrobust.defenses.aggregation import AGGREGATORS, AggregationInfo, coordinate_median, mean, trimmed_mean
from fedrobust.defenses.choice import ChoiceState, choice

__all__ = [
    "AGGREGATORS",
    "AggregationInfo",
    "ChoiceState",
    "adversarial_loss",
    "choice",
    "coordinate_median",
    "mean",
    "trimmed_mean",
]
