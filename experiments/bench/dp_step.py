"""What one differentially private step costs beside a plain one, and beside PyTorch, Opacus and jax-privacy.

ResNet-9 at base width 32 (610 k parameters, GroupNorm), 28 x 28 x 1 images, 64 of them (512 for the memory). Each side
is a process of its own (`sides`, `torch_sides`) and runs when its turn comes: one call of each, again and again,
medians. Ratios are ours over theirs. The rows:

- clip_over_plain: `microbatch_size=None`, over the gradient of the mean loss;
- clip_over_plain_microbatched: in microbatches of 16, over that gradient summed over the same microbatches in a scan;
- clip_over_plain_clients: 4 vmapped clients of 16 images with their own weights, over the same without clipping;
- clip_over_opacus_best: whole batch, over the fastest of Opacus' hooks, functorch and ghost clipping;
- clip_over_jax_privacy, clip_over_jax_privacy_microbatched: over its `clipped_grad` on the same network with plain
  `lax` convolutions, whole batch and in microbatches of 16;
- plain_over_torch: the plain gradients, PyTorch's in the faster of its two memory formats;
- lean_memory_over_plain_memory: resident memory that one call adds at its peak, 512 images, norms first;
- microbatched_memory_over_plain_memory: the same in microbatches of 16;
- dp_pgd1_over_plain, dp_pgd7_over_plain: a clipped step of PGD-k training, over (k + 1) plain gradients.

Command: python -m experiments.bench dp_step, with `pip install -e ".[bench]"` for the rows of the others.
Cost: about 6 minutes on 2 CPU cores.
"""

import importlib.util
import sys
from contextlib import ExitStack
from statistics import median
from typing import NamedTuple

from experiments.bench.timing import Comparison, Side

REPEATS = 11
MEMORY_REPEATS = 3
EXTRA = "bench"


class Row(NamedTuple):
    """One row to be measured.

    Attributes:
        name: of the row.
        ours: a side.
        against: the other sides; the fastest counts.
        target: the largest ratio that is accepted.
        times: how many calls of the other one call of ours is compared with.
    """

    name: str
    ours: str
    against: tuple[str, ...]
    target: float
    times: int = 1


# Rows of one group are measured in the same minutes; all its processes are in memory at once.
GROUPS = (
    (
        Row("clip_over_plain", "clipped", ("plain",), 1.15),
        Row("plain_over_torch", "plain", ("torch", "torch_channels_last"), 1.4),
        Row("clip_over_opacus_best", "clipped", ("opacus_hooks", "opacus_functorch", "opacus_ghost"), 0.83),
        Row("clip_over_jax_privacy", "clipped", ("jax_privacy",), 0.4),
    ),
    (
        Row("clip_over_plain_microbatched", "clipped_microbatched", ("plain_microbatched",), 1.15),
        Row("clip_over_plain_clients", "clipped_clients", ("plain_clients",), 1.3),
    ),
    (Row("clip_over_jax_privacy_microbatched", "clipped_microbatched", ("jax_privacy_microbatched",), 0.067),),
    (
        Row("dp_pgd1_over_plain", "pgd1", ("plain",), 1.15, times=2),
        Row("dp_pgd7_over_plain", "pgd7", ("plain",), 1.15, times=8),
    ),
)
MEMORY = [
    Row("lean_memory_over_plain_memory", "lean_memory", ("plain_memory",), 1.3),
    Row("microbatched_memory_over_plain_memory", "microbatched_memory", ("plain_memory",), 1.3),
]

NEEDS = {"torch": "torch", "opacus": "opacus", "jax_privacy": "jax_privacy"}
"""The first word of a side -> the package it runs."""


def run() -> list[Comparison]:
    """Measures; see the module's first lines. Rows against packages that are not installed are left out with a line."""
    comparisons: list[Comparison] = []
    absent = {prefix for prefix, package in NEEDS.items() if importlib.util.find_spec(package) is None}
    for group in GROUPS:
        rows = [row for row in group if not row.against[0].startswith(tuple(absent))]
        for row in (row for row in group if row not in rows):
            print(f'{row.name}: left out, needs pip install -e ".[{EXTRA}]"', file=sys.stderr)
        comparisons += _compared(
            rows, _times([side for row in rows for side in (row.ours, *row.against)]), "ms", REPEATS
        )
    sides = [side for row in MEMORY for side in (row.ours, *row.against)]
    return comparisons + _compared(MEMORY, _memory(list(dict.fromkeys(sides))), "MB", MEMORY_REPEATS)


def _times(names: list[str]) -> dict[str, float]:
    """Median milliseconds of each side, one call of each in turns."""
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side(name)) for name in dict.fromkeys(names)}
        measured = [{name: side.call() for name, side in sides.items()} for _ in range(REPEATS)]
    return {name: median(turn[name] for turn in measured) for name in sides}


def _memory(names: list[str]) -> dict[str, float]:
    """Median megabytes of each side: only the first call of a process counts, so each turn is a new process."""
    measured: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(MEMORY_REPEATS):
        for name in names:
            with Side(name) as side:
                measured[name].append(side.call())
    return {name: median(values) for name, values in measured.items()}


def _compared(rows: list[Row], value: dict[str, float], unit: str, repeats: int) -> list[Comparison]:
    return [
        Comparison(
            row.name,
            value[row.ours],
            row.times * min(value[side] for side in row.against),
            unit,
            row.target,
            repeats,
            {side: value[side] for side in (row.ours, *row.against)},
        )
        for row in rows
    ]
