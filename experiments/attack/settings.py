"""Everything that attacking a study's models can be told; the command line is generated from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from experiments.combinations.settings import COMBINATIONS, Attack, Study
from fedrobust import check


@dataclass(frozen=True)
class Attacking:
    """One run: every model of the folders, or those that are named."""

    models: tuple[str, ...] = ("results/combinations-pneumonia_mnist-cpu",)
    """Folders that the study left (its --out), all of one configuration but for its attacks; several where seeds were
    trained apart."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    out: str | None = None
    """Folder for rows, tables and figures (default: results/attack-NAME-SUITE, NAME that of the first folder; for val
    with -val)."""
    seeds: tuple[int, ...] = ()
    """Which seeds (default: all there are)."""
    combinations: tuple[str, ...] = ()
    """Which combinations (default: all there are)."""
    split: Literal["test", "val"] = "test"
    """Images that are attacked. Settings are chosen by those of val."""
    attack: Attack = field(default_factory=lambda: Attack(suite="auto_attack", gate_examples=128))
    """Attacks at inference time."""

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ValueError: one line, under the name the setting has on the command line.
        """
        check.require(len(self.models) > 0, "--models", self.models, "at least one folder that a study left")
        for combination in self.combinations:
            check.one_of("--combinations", combination, COMBINATIONS)
        check.one_of("--split", self.split, ("test", "val"))
        check.require(len(set(self.seeds)) == len(self.seeds), "--seeds", self.seeds, "none twice")


def study_of(config: Mapping[str, Any]) -> Study:
    """The study whose settings a row or a folder holds, as `dataclasses.asdict` and JSON left them.

    Raises:
        ValueError: a setting that there is none of, or a value that is not allowed.
    """
    return _restored(Study, config)


def _restored(kind: Any, values: Mapping[str, Any]) -> Any:
    known = {setting.name: setting for setting in fields(kind)}
    for name in values:
        check.one_of("setting", name, known)

    def value(name: str, found: Any) -> Any:
        if isinstance(found, Mapping):
            return _restored(known[name].default_factory, found)
        return tuple(found) if isinstance(found, list) else found

    return kind(**{name: value(name, found) for name, found in values.items()})
