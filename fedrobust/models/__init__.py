"""Image classifiers without BatchNorm, from one specification, through Flax or Haiku."""

from fedrobust.models.flax_builder import build_flax, from_flax
from fedrobust.models.haiku_builder import build_haiku, from_haiku
from fedrobust.models.registry import BUILDERS, SPECS, build
from fedrobust.models.spec import resnet9, resnet18, small_cnn

__all__ = [
    "BUILDERS",
    "SPECS",
    "build",
    "build_flax",
    "build_haiku",
    "from_flax",
    "from_haiku",
    "resnet9",
    "resnet18",
    "small_cnn",
]
