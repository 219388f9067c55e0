"""Rows of a study, attacked again, one after the other, resumable."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from experiments import grid
from experiments.attack.settings import Attacking, study_of
from experiments.combinations.federation import build_model
from experiments.combinations.provenance import provenance
from experiments.combinations.row import name_of_row, robustness
from experiments.combinations.serving import from_file
from experiments.combinations.settings import COMBINATIONS, Study
from experiments.combinations.study import config_of, report
from experiments.combinations.training import BATCH_SIZE
from experiments.display import Show
from experiments.files import digest
from fedrobust import check, compression, data, evaluation, keys, reporting
from fedrobust.types import Dataset

TOLERANCE = 0.005
"""By how much a model's clean figures may differ from its row's: another machine rounds otherwise."""
_CLEAN = ("accuracy", "balanced_accuracy", "auc")


class Case(NamedTuple):
    """One model to attack. Attributes: row, what its study says of it; path, its file."""

    row: reporting.Row
    path: Path

    @property
    def name(self) -> str:
        """As its file is called."""
        return self.path.stem


def run(attacking: Attacking, console: Console) -> Path:
    """Attacks the models that were not yet, then writes tables and figures.

    Args:
        attacking: the settings.
        console: where progress and the table are shown.

    Returns:
        The folder that holds `rows.jsonl` and what `combinations` makes of it. A row is the study's, with what was
        measured now in place of `robust` and `checks` (of val: `clean`, too, and nothing of poisoned trainings), and
        `attacked_with`: the versions and the device of it, and `file`, the digest of the model's.

    Raises:
        ValueError: bad settings or data, damaged models, or a folder that holds rows of another configuration or of
            other models by the same names; nothing is written. A model that is not the one its row speaks of; rows
            before it are kept.
    """
    cases = find(attacking)
    first = Path(attacking.models[0]).resolve().name
    suffix = "-val" if attacking.split == "val" else ""
    out = Path(attacking.out or f"results/attack-{first}-{attacking.attack.suite}{suffix}")
    study = dataclasses.replace(study_of(cases[0].row["config"]), attack=attacking.attack, data_dir=attacking.data_dir)
    config = config_of(study) | ({"split": "val"} if attacking.split == "val" else {})
    grid.require_same(out, config)
    digests = {case.name: digest(case.path) for case in cases}
    for row in reporting.read(out / "rows.jsonl"):
        name, file = name_of_row(row), row.get("attacked_with", {}).get("file")
        same = digests.get(name, file) == file
        check.require(same, "--models", attacking.models, f"folders with the {name} that {out} has a row of")
    splits = data.load(study.dataset, data_dir=study.data_dir)
    has_rows = grid.fill(
        out,
        config,
        {case.name: functools.partial(attack, study, config, case, splits) for case in cases},
        name_of_row,
        console,
    )
    if has_rows:
        report(out, console)
    return out


def find(attacking: Attacking) -> Sequence[Case]:
    """The models that are asked for, by seed, then in the order their folders have them.

    Raises:
        ValueError: a folder without rows, rows of several configurations, a row or a model that is not there, or a
            damaged one.
    """
    cases: dict[str, Case] = {}
    for folder in map(Path, attacking.models):
        rows = reporting.read(folder / "rows.jsonl")
        usable = len(rows) > 0 and all("combination" in row for row in rows)
        check.require(usable, "--models", str(folder), "a folder with rows of the study combinations")
        for row in rows:
            case = Case(row, folder / "models" / f"{name_of_row(row)}.safetensors")
            check.require(case.name not in cases, "--models", str(folder), f"the only folder with {case.name}")
            cases[case.name] = case
    trained = {reporting.config_hash(_training(case.row)) for case in cases.values()}
    check.require(len(trained) == 1, "--models", attacking.models, "folders of one configuration, attacks apart")
    for seed in attacking.seeds:
        check.one_of("--seeds", seed, {case.row["seed"] for case in cases.values()})
    for combination in attacking.combinations:
        check.one_of("--combinations", combination, {_combination(case.row) for case in cases.values()})
    wanted = [
        case
        for case in cases.values()
        if case.row["seed"] in (attacking.seeds or (case.row["seed"],))
        and _combination(case.row) in (attacking.combinations or COMBINATIONS)
    ]
    for case in wanted:
        check.require(case.path.is_file(), "--models", str(case.path), "a file that is there, as its row is")
        compression.guarantee(case.path)  # a damaged file is an error before anything is written
    return sorted(wanted, key=lambda case: case.row["seed"])


def attack(study: Study, config: dict[str, Any], case: Case, splits: data.Splits, progress: Show) -> reporting.Row:
    """One model's row, with what the attacks find now, on val where the configuration says so.

    Raises:
        ValueError: the model is not the one that its row speaks of.
    """
    attacked = progress("attacks")
    attacked(0, 1, {})
    test, of_val = splits.test, config.get("split") == "val"
    model = build_model(study, test.image.shape[1:], test.num_classes)
    final = from_file(model, case.path, test.image[:BATCH_SIZE])

    def metrics(images: Dataset) -> evaluation.Metrics:
        logits = evaluation.predict(final.apply, final.params, images.image, BATCH_SIZE)
        return evaluation.metrics(logits, images.label)

    clean = metrics(test)._asdict()
    found, said = (np.asarray([figures[name] for name in _CLEAN], float) for figures in (clean, case.row["clean"]))
    same = np.allclose(found, said, rtol=0, atol=TOLERANCE, equal_nan=True)
    check.require(
        same,
        f"{case.path}: {', '.join(_CLEAN)}",
        found.round(3).tolist(),
        f"its row's {said.round(3).tolist()}",
    )
    measured = splits.val if of_val else test
    robust, checks = robustness(study.attack, final, measured, keys.stream(keys.root(case.row["seed"]), "evaluate"))
    return {
        **case.row,
        "config": config,
        "config_hash": reporting.config_hash(config),
        "clean": metrics(measured)._asdict() if of_val else clean,
        "robust": robust,
        "checks": checks,
        "poisoned": None if of_val else case.row["poisoned"],
        "attacked_with": {**provenance(), "file": digest(case.path)},
    }


def _training(row: reporting.Row) -> dict[str, Any]:
    """The settings of a row but for its attacks; one from before there was a setting has its default."""
    return {**config_of(study_of(row["config"])), "attack": None}


def _combination(row: reporting.Row) -> str:
    return reporting.Combination(**row["combination"]).name
