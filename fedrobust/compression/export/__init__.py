"""Models that run without this library: ONNX for onnxruntime, StableHLO for XLA. Needs the extra `export`."""

from fedrobust.compression.export.onnx_file import load_onnx, save_onnx
from fedrobust.compression.export.stablehlo import load_stablehlo, save_stablehlo

__all__ = ["load_onnx", "load_stablehlo", "save_onnx", "save_stablehlo"]
