"""Epsilons of Opacus' PRV accountant, to compare ours with. `python tests/golden/opacus_prv.py`, Opacus installed."""

import json
import warnings
from importlib.metadata import version
from pathlib import Path

GRID = [
    # sampling rate, noise multiplier, steps, delta
    *((0.01, 0.6, steps, 1e-5) for steps in (100, 1000)),
    *((0.01, 1.0, steps, 1e-6) for steps in (10, 5000)),
    *((0.01, 2.0, steps, 1e-5) for steps in (1000, 5000)),
    *((0.05, 0.8, steps, 1e-5) for steps in (50, 500)),
    *((0.05, 1.5, steps, 1e-4) for steps in (200, 2000)),
    *((0.1, 0.958, 150, delta) for delta in (1e-4, 1e-6)),
    *((0.1, 4.06, steps, 1e-4) for steps in (150, 5000)),
    *((0.2, 1.2, steps, 1e-3) for steps in (1, 60)),
    *((0.3, 4.0, steps, 1e-5) for steps in (100, 1000)),
    *((0.5, 2.0, steps, 1e-3) for steps in (5, 80)),
    *((0.5, 3.0, steps, 1e-6) for steps in (20, 300)),
    *((1.0, 4.0, steps, 1e-5) for steps in (1, 100)),
]


def main() -> None:
    """Writes the grid and its epsilons beside this file."""
    from opacus.accountants import PRVAccountant

    warnings.simplefilter("ignore")
    points = []
    for rate, noise, steps, delta in GRID:
        accountant = PRVAccountant()
        accountant.history = [(noise, rate, steps)]
        epsilon = accountant.get_epsilon(delta=delta, eps_error=0.002)
        print(rate, noise, steps, delta, epsilon, flush=True)
        points.append([rate, noise, steps, delta, round(float(epsilon), 6)])
    found = {
        "command": "python tests/golden/opacus_prv.py",
        "versions": {name: version(name) for name in ("opacus", "torch", "numpy", "scipy")},
        "fields": ["sampling_rate", "noise_multiplier", "num_steps", "delta", "epsilon"],
        "points": points,
    }
    text = json.dumps(found, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")


if __name__ == "__main__":
    main()
