"""Defenses: adversarial training inside the loss, robust aggregation on the server."""

from fedrobust.defenses.adversarial_training import adversarial_loss
from fedrobust.defenses.aggregation import AGGREGATORS, AggregationInfo, coordinate_median, mean, trimmed_mean
from fedrobust.defenses.choice import ChoiceState, choice
from fedrobust.defenses.fast import align_gradients, fast_attack
from fedrobust.defenses.free import Ascent, ReplayInfo, free_update, linf_ascent
from fedrobust.defenses.schedules import Schedule, cyclic, linear_warmup
from fedrobust.defenses.trades import trades_loss

__all__ = [
    "AGGREGATORS",
    "AggregationInfo",
    "Ascent",
    "ChoiceState",
    "ReplayInfo",
    "Schedule",
    "adversarial_loss",
    "align_gradients",
    "choice",
    "coordinate_median",
    "cyclic",
    "fast_attack",
    "free_update",
    "linear_warmup",
    "linf_ascent",
    "mean",
    "trades_loss",
    "trimmed_mean",
]
