"""Smaller models: structured pruning of any pure function, weights in few bits, and a file that holds them."""

from fedrobust.compression.artifact import Stored, guarantee, load, save, stored
from fedrobust.compression.budget import Measure, masks_within, measure_bytes, measure_flops, measure_parameters
from fedrobust.compression.distillation import distillation_loss
from fedrobust.compression.fake import fake_quantize, fake_quantize_inputs
from fedrobust.compression.integer import integer_apply
from fedrobust.compression.learned import initial_scores, loss_of_scores
from fedrobust.compression.pruning import (
    Channels,
    find_channels,
    kept_units,
    masks_from_units,
    max_difference,
    shrink,
    shrink_apply,
    slice_tree,
)
from fedrobust.compression.quantization import Quantized, dequantize, quantize
from fedrobust.compression.ranges import Ranges, calibrate
from fedrobust.compression.schedule import cubic_sparsity, one_shot_sparsity
from fedrobust.compression.scores import SCORES, taylor_scores
from fedrobust.compression.selection import SCOPES, masks, num_kept
from fedrobust.compression.sparse import n_of_m_masks, unstructured_masks

__all__ = [
    "SCOPES",
    "SCORES",
    "Channels",
    "Measure",
    "Quantized",
    "Ranges",
    "Stored",
    "calibrate",
    "cubic_sparsity",
    "dequantize",
    "distillation_loss",
    "fake_quantize",
    "fake_quantize_inputs",
    "find_channels",
    "guarantee",
    "initial_scores",
    "integer_apply",
    "kept_units",
    "load",
    "loss_of_scores",
    "masks",
    "masks_from_units",
    "masks_within",
    "max_difference",
    "measure_bytes",
    "measure_flops",
    "measure_parameters",
    "n_of_m_masks",
    "num_kept",
    "one_shot_sparsity",
    "quantize",
    "save",
    "shrink",
    "shrink_apply",
    "slice_tree",
    "stored",
    "taylor_scores",
    "unstructured_masks",
]
