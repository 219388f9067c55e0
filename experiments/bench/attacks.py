"""Image-steps per second of attacks, beside torchattacks, foolbox and ART.

ResNet-9 at base width 32 (610 k parameters, GroupNorm), two classes: scikit-learn's digits below 5 and above,
enlarged to 28 x 28 x 1; trained for two minutes; it tells 95 % of them apart, or the benchmark stops. Equal weights
on every side: each process checks that its model predicts the same class for every image. PGD of 40 steps and
Auto-PGD of 100 from the clean image, cross-entropy, "linf", at a radius of 1e-4, where no example breaks and every
side takes every step. PyTorch takes the faster of its memory formats. Each side is a process of its own and runs when
its turn comes; medians; compilation is not timed. Ratios are ours over theirs, of speed. Every JAX process has as
many CPU devices as cores, and our side deals the images out to them (`attacks.run(num_devices=None)`). Rows for 64
images have the plain name, those for 512 end in _512; there Auto-PGD, and foolbox on JAX, whose steps are all alike,
take a fifth of the steps. Rows that begin with small_cnn_ are of the small CNN at base width 24 (32 k parameters) on
the digits as they are, 8 x 8, all steps at both sizes: there a step costs less than what surrounds it.

- pgd40_over_torchattacks, pgd40_over_foolbox_torch, pgd40_over_art;
- pgd40_over_foolbox_jax: the model given as the function it is; pgd40_over_foolbox_jax_jit: wrapped in jax.jit;
- apgd100_over_torchattacks;
- pgd40_compacted_over_plain: at 0.3, where this model breaks within a few steps, with slots that are filled again, over
  the same search with all examples in step to its end. 40 steps per image count on both sides.

Command: python -m experiments.bench attacks, with `pip install -e ".[attacks]"` for the rows of the others.
Cost: 20 to 35 minutes on 2 CPU cores.
"""

import importlib.util
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from experiments.bench import attack_sides
from experiments.bench.timing import Comparison, Side

SIZES = (64, 512)
"""Numbers of images."""

REPEATS = {"resnet9": 3, "small_cnn": 9}
"""Timed attacks of each side; a short one wavers more."""

EXTRA = "attacks"
MODULE = "experiments.bench.attack_sides"


class Row(NamedTuple):
    """One row to be measured.

    Attributes:
        name: of the row.
        ours: `NETWORK-ATTACK_LIBRARY` of our side.
        against: of the other.
        target: the smallest ratio that is accepted.
        package: what the other side needs.
    """

    name: str
    ours: str
    against: str
    target: float
    package: str


def _over_peers(network: str, prefix: str) -> tuple[Row, ...]:
    """PGD beside every peer."""
    peers = {
        "torchattacks": ("torchattacks", 1.0, "torchattacks"),
        "foolbox_torch": ("foolboxtorch", 1.0, "foolbox"),
        "foolbox_jax": ("foolboxjax", 8.0, "foolbox"),
        "foolbox_jax_jit": ("foolboxjaxjit", 1.0, "foolbox"),
        "art": ("art", 8.0, "art"),
    }
    ours = f"{network}-pgd40_ours"
    return tuple(
        Row(f"{prefix}pgd40_over_{name}", ours, f"{network}-pgd40_{library}", target, package)
        for name, (library, target, package) in peers.items()
    )


# Rows of one group are measured in the same minutes.
GROUPS = (
    _over_peers("resnet9", ""),
    (Row("apgd100_over_torchattacks", "resnet9-apgd100_ours", "resnet9-apgd100_torchattacks", 1.0, "torchattacks"),),
    (Row("pgd40_compacted_over_plain", "resnet9-weak40_ours", "resnet9-weak40_plain", 3.0, "jax"),),
    _over_peers("small_cnn", "small_cnn_"),
)


def run() -> list[Comparison]:
    """Measures; see the module's first lines. Rows against packages that are not installed are left out with a line."""
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {network: str(Path(folder) / f"{network}.npz") for network in attack_sides.NETWORKS}
        for network, file in files.items():
            attack_sides.save(file, network, max(SIZES))
        for size in SIZES:
            for group in GROUPS:
                rows = [row for row in group if importlib.util.find_spec(row.package) is not None]
                for row in (row for row in group if row not in rows):
                    print(f'{row.name}: left out, needs pip install -e ".[{EXTRA}]"', file=sys.stderr)
                comparisons += _compared(rows, files, size)
    return comparisons


def _compared(rows: list[Row], files: dict[str, str], size: int) -> list[Comparison]:
    """The rows of one group: one attack of each side in turns."""
    if not rows:
        return []
    names = dict.fromkeys(side for row in rows for side in (row.ours, row.against))
    repeats = REPEATS[attack_sides.parts(f"{rows[0].ours}_{size}")[0]]
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(Side(f"{name}_{size}", files[name.split("-")[0]], module=MODULE))
            for name in names
        }
        turns = [{name: side.call() for name, side in sides.items()} for _ in range(repeats)]

    def speed(name: str) -> float:
        steps = attack_sides.num_steps(*attack_sides.parts(f"{name}_{size}"))
        return size * steps / (median(turn[name] for turn in turns) / 1e3)

    found = [
        Comparison(
            row.name if size == min(SIZES) else f"{row.name}_{size}",
            speed(row.ours),
            speed(row.against),
            "image-steps/s",
            row.target,
            repeats,
            {name: speed(name) for name in (row.ours, row.against)},
            more_is_better=True,
        )
        for row in rows
    ]
    for comparison in found:
        print(f"{comparison.name}: {comparison.ratio:.2f}", file=sys.stderr, flush=True)
    return found
