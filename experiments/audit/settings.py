"""Settings of the audit: those of the study, and its own."""

import dataclasses
from dataclasses import dataclass

from experiments.combinations.presets import preset
from experiments.combinations.settings import COMBINATIONS, Scale, Study
from fedrobust import check

PRIVATE = tuple(name for name in COMBINATIONS if "dp" in name)


@dataclass(frozen=True)
class Audit(Study):
    """An audit of the combinations with privacy; everything that is not about it is as in the study."""

    experiment: str = "audit"
    """Name of the study."""
    combinations: tuple[str, ...] = PRIVATE
    """Which of dp, dp+mc, dp+at, dp+at+mc to audit."""
    canaries: int = 200
    """Mislabelled images of the one-run audit, each in the data by a fair coin."""
    trials: int = 10_000
    """Steps of the one-step audit with its canary, and as many without."""
    confidence: float = 0.95
    """Of every lower bound by itself."""

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: one line, under the name the setting has on the command line.
        """
        super().__post_init__()
        for name in self.combinations:
            check.one_of("--combinations", name, PRIVATE)
        check.at_least("--canaries", self.canaries, 8)
        check.at_least("--trials", self.trials, 10)
        check.fraction("--confidence", self.confidence, zero=False, one=False)


def audit_preset(name: str, dataset: str, scale: Scale) -> Audit:
    """The settings the command starts from, before the overrides on its line: the study's, see `preset`."""
    study = preset(name, dataset, scale)
    shared = {field.name: getattr(study, field.name) for field in dataclasses.fields(study)}
    audit = Audit(**shared | {"combinations": PRIVATE})
    return dataclasses.replace(audit, canaries=40, trials=400) if scale == "smoke" else audit
