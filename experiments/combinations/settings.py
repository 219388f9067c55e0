"""Everything a run of the study can be told, and the presets of each data set and scale.

All of it is frozen dataclasses; the command line is generated from them, help texts included.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from fedrobust import check, compression
from fedrobust.data import PARTITIONS
from fedrobust.federated import BACKENDS
from fedrobust.models import SPECS

Scale = Literal["smoke", "cpu", "paper"]
COMBINATIONS = ("plain", "mc", "at", "at+mc", "dp", "dp+mc", "dp+at", "dp+at+mc")


@dataclass(frozen=True)
class Training:
    """Rounds without privacy: every client trains on `num_steps` batches, the server averages."""

    num_rounds: int = 16
    """Rounds."""
    num_steps: int = 15
    """Local optimizer steps per round."""
    batch_size: int = 32
    """Images per local step."""
    learning_rate: float = 1e-3
    """Peak learning rate of the clients' Adam; it falls to 0 by a cosine over the rounds."""
    average_decay: float = 0.5
    """Decay per round of the running average of the server's parameters, the model that is kept; 0 for none."""


@dataclass(frozen=True)
class DP:
    """Differential privacy of one record of one silo (DP-SGD in each silo, every step averaged)."""

    epsilon: float = 8.0
    """Budget, label counts included."""
    noise: Literal["silo", "secure_sum"] = "silo"
    """Who is protected against: silo: each adds all its noise, against everyone else; secure_sum: each adds its share,
    against a server that only ever sees the sum over all silos, none of which colludes or drops out."""
    delta: float = 1e-4
    """Probability that the bound does not hold; below 1 / records of a silo."""
    num_rounds: int = 150
    """Rounds; each is one noised step in every silo."""
    sampling_rate: float = 0.1
    """Chance of each record to enter a step (Poisson)."""
    clip_norm: float = 1.0
    """L2 bound on one record's gradient."""
    learning_rate: float = 0.5
    """Peak learning rate of the server; it falls to 0 by a cosine over the rounds."""
    momentum: float = 0.9
    """Momentum of the server."""
    average_decay: float = 0.9
    """As in training, per noised step."""
    histogram_epsilon: float = 0.1
    """Part of epsilon spent on label counts, for class weights after the clip; 0 for equal weights."""
    microbatch_size: int = 16
    """Records differentiated at a time; changes speed and memory only."""


@dataclass(frozen=True)
class AT:
    """Adversarial training: PGD inside the loss, Madry's or TRADES."""

    eps: float = 8 / 255
    """Linf radius, images in [0, 1]."""
    num_steps: int = 3
    """PGD steps."""
    relative_step: float = 0.5
    """Length of a PGD step over the radius."""
    clean_share: float = 0.0
    """Weight of the clean image in each record's loss."""
    trades_beta: float = 0.0
    """Above 0: TRADES, the clean image's loss and this times the divergence of the sample's prediction from its own."""
    warmup: float = 0.5
    """Share of the rounds over which the radius grows linearly from 0."""


@dataclass(frozen=True)
class MC:
    """Model compression: structured pruning during training, then weights in few bits, and activations on request."""

    sparsity: float = 0.625
    """Share of the units (channels, or groups of them) that is removed, in [0, 1)."""
    scope: Literal["uniform", "global"] = "uniform"
    """Whether that is the share of every layer, or of the whole model: scores then decide which layers keep more."""
    group_sparsity: tuple[float, ...] = ()
    """In place of --mc.sparsity, scope uniform: a share for every group of layers that are pruned together, in the
    order in which the error of a wrong number lists them."""
    begin: float = 0.03
    """Pruning begins after this share of the rounds."""
    end: float = 0.15
    """Pruning is complete, and the model physically smaller, after this share."""
    num_events: int = 4
    """Times the masks are renewed in between (cubic schedule), or once more where that does not divide the rounds."""
    label_share: float = 1.0
    """Weight of the label in the small model's loss; the rest is that of what the full model answered when pruning
    began. Under privacy that model is public, so that learning from it costs nothing more."""
    bits: Literal[8, 4] = 8
    """Of the served weights."""
    activations: Literal["float", "int8"] = "float"
    """What the served model computes in; int8: ranges are measured on the val split, attacks see a straight-through
    slope."""
    aware_share: float = 0.0
    """The last share of the rounds, in which the model is trained as it is served; at most 1 - mc.end."""

    @property
    def symmetric(self) -> bool:
        """Whether weights have no zero points: in 4 bits these save a fifth of the error for a byte a channel."""
        return self.bits == 8


@dataclass(frozen=True)
class Poison:
    """Dishonest clients at training time."""

    malicious_share: float = 0.2
    """Share of the clients."""
    scale: float = 6.0
    """They send minus this times their honest update."""
    rule: Literal["coordinate_median", "trimmed_mean"] = "trimmed_mean"
    """The robust rule that plain averaging is compared with; the trimmed mean trims the malicious share."""
    rounds_share: float = 1.0
    """Poisoned trainings stop after this share of the rounds; above mc.end."""


@dataclass(frozen=True)
class Attack:
    """Attacks at inference time."""

    eps: tuple[float, ...] = (2 / 255, 4 / 255, 8 / 255)
    """Linf radii."""
    num_steps: int = 20
    """PGD steps (FGSM is run beside it)."""
    relative_step: float = 0.25
    """Length of a PGD step over the radius."""
    num_restarts: int = 1
    """Random starts of PGD."""
    suite: Literal["pgd", "auto_attack"] = "pgd"
    """pgd: FGSM and PGD, alone; auto_attack, standard: each on what is left, smaller radii on what larger broke."""
    gate_examples: int = 0
    """Test images about which the gate's attacks ask, too, at the largest radius; 0: outputs and gradients only."""

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: one line, under the name the setting has on the command line.
        """
        for eps in self.eps:
            check.positive("--attack.eps", eps)
        different = 0 < len({f"{eps:.2g}" for eps in self.eps}) == len(self.eps)  # as a row's entries are named
        check.require(different, "--attack.eps", self.eps, "one or more that differ in their first two digits")
        check.at_least("--attack.num-steps", self.num_steps, 4 if self.gate_examples else 1)  # as attacks.probes
        check.positive("--attack.relative-step", self.relative_step)
        check.at_least("--attack.num-restarts", self.num_restarts, 1)
        check.one_of("--attack.suite", self.suite, ("pgd", "auto_attack"))
        examples = self.gate_examples
        check.require(examples == 0 or examples >= 2, "--attack.gate-examples", examples, "0 or a whole number >= 2")


@dataclass(frozen=True)
class Study:
    """One run of the study: all chosen combinations on one data set."""

    experiment: str = "combinations"
    """Name of the study."""
    dataset: str = "digits"
    """digits, a TFDS name such as pneumonia_mnist, mnist, cifar10, or a path to a MedMNIST .npz."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    out: str | None = None
    """Folder for rows, tables and figures (default: results/NAME-DATASET-SCALE)."""
    scale: Scale = "cpu"
    """Preset of all sizes: smoke (seconds, tests), cpu (2 cores), paper (an accelerator)."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each trains all combinations."""
    combinations: tuple[str, ...] = COMBINATIONS
    """Which of plain, dp, at, mc, dp+at, ... to train."""
    clients: int = 5
    """Hospitals."""
    partition: Literal["iid", "dirichlet", "shards", "quantity_skew"] = "iid"
    """How training images are shared out."""
    alpha: float = 1.0
    """Concentration of the dirichlet and quantity_skew partitions."""
    model: Literal["small_cnn", "resnet9", "resnet18"] = "resnet9"
    """Architecture."""
    builder: Literal["flax", "haiku"] = "flax"
    """Library that builds it."""
    width: int = 16
    """Channels of its first convolution."""
    norm_groups: int = 8
    """Groups of every GroupNorm; the group is the unit of pruning, so more groups prune finer."""
    calibrate: bool = True
    """Two classes only: shift the decision threshold to the best balanced accuracy on val (clean; with AT, the mean of
    clean and under the training attack)."""
    client_map: Literal["auto", "loop", "scan", "vmap", "pmap", "shard_map"] = "auto"
    """How clients are mapped over the machine; changes speed only."""
    parallel: bool = True
    """Train a row's model and its two poisoned ones at the same time where there is one device; changes speed only."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints of a row in training."""
    train: Training = field(default_factory=Training)
    """Rounds without privacy."""
    dp: DP = field(default_factory=DP)
    """Differential privacy."""
    at: AT = field(default_factory=AT)
    """Adversarial training."""
    mc: MC = field(default_factory=MC)
    """Model compression."""
    poison: Poison = field(default_factory=Poison)
    """Dishonest clients."""
    attack: Attack = field(default_factory=Attack)
    """Attacks at inference time."""

    @property
    def malicious(self) -> tuple[int, ...]:
        """Ids of the dishonest clients: the last ones."""
        return tuple(range(self.clients - round(self.poison.malicious_share * self.clients), self.clients))

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: one line, under the name the setting has on the command line.
        """
        self._check_study()
        self._check_groups()

    def _check_study(self) -> None:
        for name in ("combinations", "seeds"):
            values = getattr(self, name)
            check.require(0 < len(values) == len(set(values)), f"--{name}", values, "at least one, none twice")
        for combination in self.combinations:
            check.one_of("--combinations", combination, COMBINATIONS)
        for seed in self.seeds:
            check.require(0 <= seed < 2**32, "--seeds", seed, "in [0, 2**32)")
        check.one_of("--partition", self.partition, PARTITIONS)
        check.one_of("--model", self.model, SPECS)
        check.one_of("--client-map", self.client_map, ("auto", *BACKENDS))
        check.at_least("--clients", self.clients, 1)
        check.at_least("--width", self.width, 1)
        check.at_least("--norm-groups", self.norm_groups, 1)
        check.positive("--alpha", self.alpha)
        check.non_negative("--checkpoint-every", self.checkpoint_every)

    def _check_groups(self) -> None:
        for group, names in _WHOLE.items():
            for name in names:
                check.at_least(_flag(group, name), getattr(getattr(self, group), name), 1)
        for group, names in _POSITIVE.items():
            for name in names:
                check.positive(_flag(group, name), getattr(getattr(self, group), name))
        check.fraction("--dp.delta", self.dp.delta, zero=False, one=False)
        check.fraction("--dp.sampling-rate", self.dp.sampling_rate, zero=False)
        check.fraction("--dp.momentum", self.dp.momentum, one=False)
        part, whole = self.dp.histogram_epsilon, self.dp.epsilon
        check.require(0 <= part < whole, "--dp.histogram-epsilon", part, f"in [0, --dp.epsilon = {whole})")
        for group in ("train", "dp"):
            check.fraction(f"--{group}.average-decay", getattr(self, group).average_decay, one=False)
        check.non_negative("--at.eps", self.at.eps)
        check.fraction("--at.clean-share", self.at.clean_share)
        check.non_negative("--at.trades-beta", self.at.trades_beta)
        taught = self.at.trades_beta == 0 or self.mc.label_share == 1
        check.require(taught, "--at.trades-beta", self.at.trades_beta, "0 where --mc.label-share is below 1")
        check.fraction("--at.warmup", self.at.warmup)
        self._check_compression()
        share = self.poison.malicious_share
        check.require(0 <= share < 0.5, "--poison.malicious-share", share, "in [0, 0.5)")
        check.require(
            self.dp.noise == "silo" or not self.malicious,
            "--dp.noise",
            self.dp.noise,
            "silo, unless --poison.malicious-share is 0: a robust rule reads every update, a secure sum shows none",
        )
        share = self.poison.rounds_share
        check.fraction("--poison.rounds-share", share, zero=False)
        after_pruning = share > self.mc.end or not self.malicious
        check.require(after_pruning, "--poison.rounds-share", share, f"in (--mc.end = {self.mc.end}, 1]")

    def _check_compression(self) -> None:
        check.fraction("--mc.sparsity", self.mc.sparsity, one=False)
        check.require(
            0 <= self.mc.begin < self.mc.end < 1,
            "--mc.begin",
            self.mc.begin,
            f"in [0, --mc.end = {self.mc.end}), that < 1",
        )
        for share in self.mc.group_sparsity:
            check.fraction("--mc.group-sparsity", share, one=False)
        check.one_of("--mc.scope", self.mc.scope, compression.SCOPES)
        check.fraction("--mc.label-share", self.mc.label_share)
        check.one_of("--mc.bits", self.mc.bits, (8, 4))
        check.one_of("--mc.activations", self.mc.activations, ("float", "int8"))
        check.require(
            0 <= self.mc.aware_share <= 1 - self.mc.end,
            "--mc.aware-share",
            self.mc.aware_share,
            f"in [0, 1 - --mc.end = {1 - self.mc.end:g}]",
        )


_SHARED = (
    "dataset",
    "data_dir",
    "scale",
    "seeds",
    "clients",
    "model",
    "width",
    "norm_groups",
    "checkpoint_every",
    "train",
)


def honest_study(settings: Any, experiment: str, dp: DP) -> Study:
    """What another study trains a model with: all hospitals honest, nothing adversarial, nothing pruned.

    Args:
        settings: of that study; it has the fields of a `Study` that say on what, and how without privacy.
        experiment: its name.
        dp: how with privacy.
    """
    shared = {name: getattr(settings, name) for name in _SHARED}
    return Study(experiment=experiment, dp=dp, poison=Poison(malicious_share=0.0), **shared)


_WHOLE = {
    "train": ("num_rounds", "num_steps", "batch_size"),
    "dp": ("num_rounds", "microbatch_size"),
    "at": ("num_steps",),
    "mc": ("num_events",),
}
_POSITIVE = {
    "train": ("learning_rate",),
    "dp": ("epsilon", "clip_norm", "learning_rate"),
    "at": ("relative_step",),
    "poison": ("scale",),
}


def _flag(group: str, name: str) -> str:
    return f"--{group}.{name.replace('_', '-')}"
