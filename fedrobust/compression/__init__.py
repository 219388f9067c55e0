"""Smaller models: structured pruning of any pure function, weights in few bits, and a file that holds them."""

from fedrobust.compression.artifact import Stored, guarantee, load, save, stored
from fedrobust.compression.fake import fake_quantize
from fedrobust.compression.integer import integer_apply
from fedrobust.compression.pruning import (
    Channels,
    find_channels,
    kept_units,
    masks,
    masks_from_units,
    max_difference,
    shrink,
    shrink_apply,
    slice_tree,
)
from fedrobust.compression.quantization import Quantized, dequantize, quantize
from fedrobust.compression.ranges import Ranges, calibrate
from fedrobust.compression.schedule import cubic_sparsity

__all__ = [
    "Channels",
    "Quantized",
    "Ranges",
    "Stored",
    "calibrate",
    "cubic_sparsity",
    "dequantize",
    "fake_quantize",
    "find_channels",
    "guarantee",
    "integer_apply",
    "kept_units",
    "load",
    "masks",
    "masks_from_units",
    "max_difference",
    "quantize",
    "save",
    "shrink",
    "shrink_apply",
    "slice_tree",
    "stored",
]
