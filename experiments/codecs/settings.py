"""Everything a run of the study of codecs can be told; the command line is generated from it."""

from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.combinations.settings import DP, MC, Scale, Study, Training, honest_study
from experiments.ways import WAYS
from fedrobust import check


@dataclass(frozen=True)
class Codecs:
    """One run: every way with every seed."""

    dataset: str = "digits"
    """digits, a TFDS name such as pneumonia_mnist, or a path to a MedMNIST .npz."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    out: str | None = None
    """Folder for rows, table and figure (default: results/codecs-DATASET-SCALE)."""
    scale: Scale = "cpu"
    """Preset of all sizes: smoke (seconds, tests), cpu (2 cores), paper (an accelerator)."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Which of the ways to train; each is compared with float32, so keep that."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each trains all ways."""
    clients: int = 5
    """Hospitals."""
    model: Literal["small_cnn", "resnet9", "resnet18"] = "resnet9"
    """Architecture."""
    width: int = 16
    """Channels of its first convolution."""
    norm_groups: int = 8
    """Groups of every GroupNorm."""
    sparsity: float = 0.0
    """Share of the channels removed between 20 and 40 % of the rounds, in [0, 1): a small model has small updates."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints of a model in training."""
    train: Training = field(default_factory=Training)
    """Rounds without privacy."""
    dp: DP = field(default_factory=DP)
    """Differential privacy, of the ways that have it."""

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: one line, under the name the setting has on the command line.
        """
        for name in ("ways", "seeds"):
            values = getattr(self, name)
            check.require(0 < len(values) == len(set(values)), f"--{name}", values, "at least one, none twice")
        for way in self.ways:
            check.one_of("--ways", way, WAYS)
        noise = self.dp.noise  # a server that decodes each update would see it with a share of the noise alone
        check.require(noise == "silo", "--dp.noise", noise, "silo where updates are decoded one by one")
        check.fraction("--sparsity", self.sparsity, one=False)
        self.study()

    def study(self) -> Study:
        """The settings a model is trained with: all hospitals honest, nothing adversarial."""
        return replace(honest_study(self, "codecs", self.dp), mc=MC(sparsity=self.sparsity, begin=0.2, end=0.4))
