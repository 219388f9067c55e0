"""Exported models in onnxruntime beside the same models here.

ResNet-9 at base width 32 (610 k parameters, GroupNorm), two classes: scikit-learn's digits below 5 and above,
enlarged to 28 x 28 x 1; trained for two minutes; it tells 95 % of them apart, or the benchmark stops. Three files:
float32; int8 weights; int8 weights and int8 activations, their ranges from 128 training images. Labels are compared
on all 1797 images, with `compression.integer_apply` where activations are rounded. Latencies: medians, sides in
turns, onnxruntime with its own choice of threads.

- onnx_{float32,int8,int8_activations}_labels: share of the images with the same label, over 1;
- onnx_{int8,int8_activations}_bytes: of the file, over the float32 file's;
- onnx_{int8,int8_activations}_latency_{1,64}: in onnxruntime, over the float32 file's, for 1 and 64 images;
- onnx_float32_over_jax_{1,64}: latency of the float32 file in onnxruntime over the jitted model's here.

Command: python -m experiments.bench onnx, with `pip install -e ".[export]"`. Cost: about 3 minutes on 2 CPU cores.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.bench import attack_sides
from experiments.bench.timing import Comparison, compare
from fedrobust import compression, data
from fedrobust.compression import export

REPEATS = 30
NUM_CALIBRATION = 128
LABELS, BYTES = 0.995, 0.28
"""Targets: the smallest share of equal labels, the largest file in 8 bits over float32's."""


class Side(NamedTuple):
    """One file. Attributes: run: image -> logits in onnxruntime; here: the same in JAX; bytes: of the file."""

    run: Callable[[Any], np.ndarray]
    here: Callable[[Any], Any]
    bytes: int


def run() -> list[Comparison]:
    """Measures; see the module's first lines."""
    with tempfile.TemporaryDirectory() as folder:
        sides, image = _sides(Path(folder))
    found = [_equal_labels(name, side, image) for name, side in sides.items()]
    whole = sides["float32"]
    for name in ("int8", "int8_activations"):
        few = sides[name]
        found.append(Comparison(f"onnx_{name}_bytes", few.bytes, whole.bytes, "bytes", BYTES, 1))
    for num in (1, 64):
        float32 = partial(whole.run, image[:num])
        for name in ("int8", "int8_activations"):
            int8 = partial(sides[name].run, image[:num])
            found.append(compare(f"onnx_{name}_latency_{num}", int8, float32, repeats=REPEATS))
        here = partial(whole.here, image[:num])
        found.append(compare(f"onnx_float32_over_jax_{num}", float32, here, repeats=REPEATS))
    return found


def _sides(folder: Path) -> tuple[dict[str, Side], np.ndarray]:
    """The files, and all images."""
    stored = folder / "model.npz"
    attack_sides.save(str(stored), "resnet9", NUM_CALIBRATION)
    with np.load(stored) as arrays:
        params = attack_sides.parameters({name: arrays[name] for name in arrays.files if "/" in name})
        some = arrays["image"]
    splits = data.load("digits")
    image = np.concatenate([split.image for split in splits if hasattr(split, "image")])
    image = np.asarray(jax.image.resize(image, (len(image), 28, 28, 1), "linear"))
    apply, few = attack_sides.build("resnet9").apply, compression.quantize(params)
    ranges = compression.calibrate(apply, compression.dequantize(few), some)
    whole, integer = jax.jit(apply), jax.jit(compression.integer_apply(apply, ranges))
    dequantized = compression.dequantize(few)
    kinds: dict[str, tuple[Any, compression.Ranges | None, Callable[[Any], Any]]] = {
        "float32": (params, None, lambda x: whole(params, x)),
        "int8": (few, None, lambda x: whole(dequantized, x)),
        "int8_activations": (few, ranges, lambda x: integer(few, x)),
    }
    sides = {}
    for name, (values, mapping, here) in kinds.items():
        path = folder / f"{name}.onnx"
        size = export.save_onnx(path, apply, values, image_shape=image.shape[1:], guarantee={}, ranges=mapping)
        sides[name] = Side(export.load_onnx(path), here, size)
    return sides, image


def _equal_labels(name: str, side: Side, image: np.ndarray) -> Comparison:
    batches = np.array_split(image, -(-len(image) // 64))
    equal = np.concatenate([side.run(x).argmax(1) == np.asarray(side.here(x)).argmax(1) for x in batches])
    return Comparison(f"onnx_{name}_labels", float(equal.mean()), 1.0, "share", LABELS, 1, more_is_better=True)
