"""Architectures of three libraries, small, that pruning has to understand without a word from their authors.

Written as a user would write them: Flax linen, Haiku, or functions of a dict of arrays. Every row of a batch is
computed alone: group, layer or channel norms, no BatchNorm. Where a paper has BatchNorm, GroupNorm stands here.
"""

from collections.abc import Callable

from experiments.zoo import flax_nets, haiku_nets, plain_nets
from experiments.zoo.weights import away_from_zero_and_one
from fedrobust.types import Model

ARCHITECTURES: dict[str, Callable[[int, int], Model]] = {
    **flax_nets.ARCHITECTURES,
    **haiku_nets.ARCHITECTURES,
    **plain_nets.ARCHITECTURES,
}
"""Name -> `(width, num_classes) -> Model`; width, a multiple of 4, is the channels of the first layer."""

__all__ = ["ARCHITECTURES", "away_from_zero_and_one"]
