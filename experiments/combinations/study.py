"""The grid of combinations and seeds, resumable, and what it leaves behind."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.combinations.federation import hospitals, make_plan
from experiments.combinations.row import make_row
from experiments.combinations.settings import Study
from experiments.display import Display
from experiments.files import write_text
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
        and `effects.md` where two rows that differ in one method share two seeds.

    Raises:
        ValueError: bad settings or data, or a folder that holds rows of another configuration. Nothing is written.
    """
    out = Path(study.out or f"results/{study.experiment}-{Path(study.dataset).stem}-{study.scale}")
    config = config_of(study)
    require_same(out, config)
    sites = {seed: hospitals(study, seed) for seed in study.seeds}
    wanted = [(seed, reporting.Combination.parse(name)) for seed in study.seeds for name in study.combinations]
    for seed, combination in wanted:  # a plan that cannot be made is an error before anything is written
        if combination.dp:
            make_plan(study, sites[seed])
    done = {(_name(row), row["seed"]) for row in rows_of(out, config)}
    todo = [(seed, combination) for seed, combination in wanted if (combination.name, seed) not in done]
    with Display(console, len(wanted), len(wanted) - len(todo)) as display:
        for seed, combination in todo:
            progress = display.row(f"{combination.name}, seed {seed}")
            reporting.append(out / "rows.jsonl", make_row(study, config, combination, seed, sites[seed], out, progress))
            shutil.rmtree(out / "work")  # only now that the row is safe
            display.advance()
    report(out, console)
    return out


def report(out: Path, console: Console) -> None:
    """Shows the table of a folder's rows and writes it, with the figures, beside them."""
    rows = reporting.read(out / "rows.jsonl")
    console.print(reporting.to_rich(rows))
    write_text(out / "table.md", reporting.to_markdown(rows))
    write_text(out / "table.tex", reporting.to_latex(rows))
    effects = reporting.effects_table(rows)
    if effects.lines:
        console.print(reporting.screen(effects, num_labels=2))
        write_text(out / "effects.md", reporting.markdown(effects, num_labels=2))
    reporting.accuracy_against_radius(rows, out / "accuracy_against_radius.png")
    reporting.trade_off(rows, out / "trade_off.png")
    reporting.training_curves(rows, out / "training_curves.png")
    console.print(f"\nrows.jsonl, ledger.jsonl, table.md, table.tex, figures and models: {out}")


def config_of(study: Study) -> dict[str, Any]:
    """The settings that make a row what it is, in plain JSON values."""
    settings = {k: v for k, v in dataclasses.asdict(study).items() if k not in _NOT_OF_A_ROW}
    return json.loads(json.dumps(settings))


def require_same(out: Path, config: dict[str, Any]) -> None:
    """Refuses a folder whose rows came from other settings."""
    path = out / "config.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"--out is {out}: must be an empty folder, a new one, or one of this study")
        return
    other = json.loads(path.read_text())
    differing = sorted(k for k in config.keys() | other.keys() if config.get(k) != other.get(k))
    if differing:
        raise ValueError(f"--out is {out}: it holds rows with another {', '.join(differing)}; must be another folder")


def rows_of(out: Path, config: dict[str, Any]) -> list[Any]:
    """The rows a folder holds already; makes it one of these settings. Ask `require_same` before."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    return reporting.read(out / "rows.jsonl")


def _name(row: reporting.Row) -> str:
    return reporting.Combination(**row["combination"]).name
