"""Side-by-side measurements: every claim about speed is a row that one of these modules prints.

Each module is one benchmark: a docstring that states its source, command, cost and device, and
`run() -> list[Comparison]`. `NAMES` is the registry.
"""

NAMES = {
    "attacks": "experiments.bench.attacks",
    "compress": "experiments.bench.compress",
    "coupling": "experiments.bench.coupling",
    "dp_step": "experiments.bench.dp_step",
    "onnx": "experiments.bench.onnx",
    "ops": "experiments.bench.ops",
}
"""Benchmark name -> the module that runs it."""
