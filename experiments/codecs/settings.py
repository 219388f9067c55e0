"""Everything a run of the study of codecs can be told; the command line is generated from it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.combinations.settings import DP, Scale, Study, Training, honest_study
from fedrobust import check
from fedrobust.compression.codecs import CODECS, error_feedback, quantized
from fedrobust.types import Codec, Params


@dataclass(frozen=True)
class Way:
    """How a federation says its updates.

    Attributes:
        codec: name of a builder in `CODECS`.
        settings: its settings, as pairs.
        num_bits: of every number that the codec sends; None for 32.
        feedback: whether what was not said is said later.
        both: whether the server says its changes so, too; else it sends float32 parameters.
        private: whether gradients are clipped and noised, one step a round, before the codec.
    """

    codec: str
    settings: tuple[tuple[str, Any], ...] = ()
    num_bits: int | None = None
    feedback: bool = False
    both: bool = False
    private: bool = False

    def build(self, like: Params) -> Codec:
        """The codec for a model.

        Args:
            like: a pytree of `jax.ShapeDtypeStruct`, its parameters.
        """
        codec = CODECS[self.codec](like, **dict(self.settings))
        if self.num_bits is not None:
            codec = quantized(codec, num_bits=self.num_bits)
        return error_feedback(codec) if self.feedback else codec


def _top_k(share: float, num_bits: int | None = None, **more: bool) -> Way:
    return Way("top_k", (("share", share),), num_bits, feedback=True, **more)


def _random_k(share: float, *, unbiased: bool) -> Way:
    return Way("random_k", (("share", share), ("unbiased", unbiased)), feedback=not unbiased)


WAYS = {
    "float32": Way("identity"),
    "top-k": _top_k(0.007),
    "top-k, 3 bits": _top_k(0.027, 3),
    "top-k, 1 bit": _top_k(0.035, 1),
    "top-k, 3 bits, both ways": _top_k(0.027, 3, both=True),
    "random-k, unbiased": _random_k(0.0098, unbiased=True),
    "random-k, feedback": _random_k(0.0098, unbiased=False),
    "QSGD, 1 level": Way("qsgd", (("num_levels", 1),)),
    "TernGrad": Way("terngrad"),
    "sign, feedback": Way("sign", feedback=True),
    "PowerSGD, rank 1": Way("power_sgd", (("rank", 1),), feedback=True),
    "PowerSGD, rank 1, 8 bits": Way("power_sgd", (("rank", 1),), 8, feedback=True),
    "DP, float32": Way("identity", private=True),
    "DP, top-k, 3 bits": _top_k(0.027, 3, private=True),
}
"""By the name in tables and on the command line. Shares were chosen by bytes alone, for 100 to 120 times fewer where a
codec can be set so; accuracy was not looked at."""


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
        self.study()

    def study(self) -> Study:
        """The settings a model is trained with: all hospitals honest, nothing adversarial, nothing pruned."""
        return honest_study(self, "codecs", self.dp)
