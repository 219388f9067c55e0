"""The grid of combinations and seeds, resumable, and what it leaves behind."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import grid
from experiments.combinations import pruning
from experiments.combinations.federation import build_model, hospitals, make_plan
from experiments.combinations.row import make_row, name_of, name_of_row
from experiments.combinations.settings import Study
from fedrobust import reporting

_NOT_OF_A_ROW = ("seeds", "combinations", "out", "data_dir", "client_map", "parallel", "checkpoint_every")
"""Settings that say what to run and where, not what a row is: rows of one folder may differ in them."""


def run(study: Study, console: Console) -> Path:
    """Trains what is missing, then writes tables and figures.

    Args:
        study: the settings.
        console: where progress and the table are shown.

    Returns:
        The folder that holds `rows.jsonl`, `ledger.jsonl` of its private rows, `table.md`, `table.tex`, the figures,
        and `effects.md`, `effects.tex` where two rows that differ in one method share two seeds.

    Raises:
        ValueError: bad settings or data, or a folder that holds rows of another configuration. Nothing is written.
    """
    out = Path(study.out or f"results/{study.experiment}-{Path(study.dataset).stem}-{study.scale}")
    config = config_of(study)
    grid.require_same(out, config)
    sites = {seed: hospitals(study, seed) for seed in study.seeds}
    wanted = [(seed, reporting.Combination.parse(name)) for seed in study.seeds for name in study.combinations]
    for seed, combination in wanted:  # a plan that cannot be made is an error before anything is written
        if combination.dp:
            make_plan(study, sites[seed])
        if combination.mc and study.mc.group_sparsity:
            train = sites[seed].splits.train
            model = build_model(study, train.image.shape[1:], train.num_classes)
            pruning.require_groups(study.mc, pruning.channels(model, train.image.shape[1:]))
    cases = {
        name_of(combination, seed): functools.partial(make_row, study, config, combination, seed, sites[seed], out)
        for seed, combination in wanted
    }
    has_rows = grid.fill(out, config, cases, name_of_row, console)
    if has_rows:
        report(out, console)
    return out


def report(out: Path, console: Console) -> None:
    """Shows the table of a folder's rows and writes it, with the figures, beside them."""
    rows = reporting.read(out / "rows.jsonl")
    grid.write_table(out, "table", reporting.table(rows), console)
    effects = reporting.effects_table(rows)
    if effects.lines:
        grid.write_table(out, "effects", effects, console)
    reporting.accuracy_against_radius(rows, out / "accuracy_against_radius.png")
    reporting.trade_off(rows, out / "trade_off.png")
    reporting.training_curves(rows, out / "training_curves.png")
    console.print(f"\nrows.jsonl, ledger.jsonl, table.md, table.tex, figures and models: {out}")


def config_of(study: Study) -> dict[str, Any]:
    """The settings that make a row what it is, in plain JSON values."""
    settings = {k: v for k, v in dataclasses.asdict(study).items() if k not in _NOT_OF_A_ROW}
    return json.loads(json.dumps(settings))
