"""Everything a run of the curve can be told; the command line is generated from it."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.combinations.settings import DP, Scale, Study, Training, honest_study
from fedrobust import check

Noise = Literal["silo", "secure_sum"]


@dataclass(frozen=True)
class Curve:
    """One run: every epsilon, with every kind of noise, with every seed."""

    dataset: str = "digits"
    """digits, a TFDS name such as pneumonia_mnist, or a path to a MedMNIST .npz."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    out: str | None = None
    """Folder for rows, tables and the figure (default: results/epsilon_curve-DATASET-SCALE)."""
    scale: Scale = "cpu"
    """Preset of all sizes: smoke (seconds, tests), cpu (2 cores), paper (an accelerator)."""
    epsilons: tuple[float, ...] = (0.5, 1.0, 3.0, 8.0, math.inf)
    """Budgets; inf is the federation without privacy, which has no noise."""
    noises: tuple[Noise, ...] = ("silo", "secure_sum")
    """silo: each hospital adds all its noise; secure_sum: each adds its share, for a sum that nobody looks into."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each trains the whole curve."""
    clients: int = 5
    """Hospitals."""
    model: Literal["small_cnn", "resnet9", "resnet18"] = "resnet9"
    """Architecture."""
    width: int = 16
    """Channels of its first convolution."""
    norm_groups: int = 8
    """Groups of every GroupNorm."""
    parallel: bool = True
    """Train two points at a time where there is one device; changes speed only."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints of a point in training."""
    train: Training = field(default_factory=Training)
    """Rounds without privacy."""
    dp: DP = field(default_factory=DP)
    """Differential privacy. The learning rate is for --dp.epsilon and noise in each silo; a point with more noise takes
    a twentieth of it. The part spent on label counts is for --dp.epsilon and shrinks with the root of epsilon."""

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: one line, under the name the setting has on the command line.
        """
        for name in ("epsilons", "noises", "seeds"):
            values = getattr(self, name)
            check.require(0 < len(values) == len(set(values)), f"--{name}", values, "at least one, none twice")
        for epsilon in self.epsilons:
            check.require(epsilon > 0, "--epsilons", epsilon, "a number > 0, or inf")
        check.require(self.dp.noise == "silo", "--dp.noise", self.dp.noise, "silo here, where --noises gives it")
        for noise, epsilon in self.points:
            self.study(noise, epsilon)

    @property
    def points(self) -> list[tuple[Noise | None, float]]:
        """`(noise, epsilon)` of the whole curve; without privacy there is no noise, and one point for all curves."""
        private = [(noise, epsilon) for epsilon in self.epsilons if epsilon < math.inf for noise in self.noises]
        return [*((None, epsilon) for epsilon in self.epsilons if epsilon == math.inf), *private]

    def study(self, noise: Noise | None, epsilon: float) -> Study:
        """The settings that one point is trained with: all hospitals honest, nothing adversarial, nothing pruned."""
        dp = self.dp
        if noise is not None:
            counts = dp.histogram_epsilon * min(1.0, math.sqrt(epsilon / dp.epsilon))
            dp = replace(dp, epsilon=epsilon, noise=noise, histogram_epsilon=counts)
        return honest_study(self, "epsilon_curve", dp)
