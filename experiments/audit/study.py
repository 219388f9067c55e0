"""Claimed and measured epsilon of every combination, shown and written."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import grid
from experiments.audit import one_run, one_step
from experiments.audit.settings import Audit
from experiments.combinations.federation import Hospitals, hospitals, make_plan
from experiments.display import Display
from experiments.files import write_text
from fedrobust import privacy, reporting
from fedrobust.reporting import Combination

Row = dict[str, Any]
Column = tuple[str, str]

COLUMNS: tuple[Column, ...] = (
    ("combination", "combination"),
    ("seed", "seed"),
    ("claimed_epsilon", "ε claimed"),
    ("one_run_epsilon", "one run ≥"),
    ("canaries", "canaries"),
    ("one_step_claimed_epsilon", "one step claimed"),
    ("one_step_epsilon", "one step ≥"),
    ("one_step_ratio", "ratio"),
    ("trials", "trials"),
    ("confidence", "confidence"),
    ("verdict", "verdict"),
)


def run(settings: Audit, console: Console) -> int:
    """Audits what was asked for.

    Args:
        settings: the settings.
        console: where progress and the table are shown.

    Returns:
        The exit status: 1 where a lower bound is above its claim.

    Raises:
        ValueError: bad settings or data. Nothing is written.
    """
    out = Path(settings.out or f"results/{settings.experiment}-{Path(settings.dataset).stem}-{settings.scale}")
    sites = {seed: hospitals(settings, seed) for seed in settings.seeds}
    for site in sites.values():  # a plan that cannot be made is an error before anything is written
        make_plan(settings, site)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with Display(console, len(sites) * len(settings.combinations)) as display:
        for seed, site in sites.items():
            for name in settings.combinations:
                rows.append(_row(settings, Combination.parse(name), seed, site, display))
                write_text(out / "audit.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
                display.done(f"{name}, seed {seed}")
    grid.write_table(out, "audit", _table(rows), console)
    console.print(f"\naudit.jsonl, audit.md and audit.tex: {out}")
    violations = [row for row in rows if row["verdict"] != "holds"]
    for row in violations:
        console.print(f"VIOLATION: {row['combination']}, seed {row['seed']}: a lower bound is above its claim")
    return int(len(violations) > 0)


def _row(settings: Audit, combination: Combination, seed: int, site: Hospitals, display: Display) -> Row:
    progress = display.row(f"{combination.name}, seed {seed}")
    watched = one_run.train(settings, combination, seed, site, progress("one run"))
    plan = watched.recipe.plan
    assert plan is not None
    whole = one_run.bound(settings, watched)
    progress("one step")
    step = one_step.measure(settings, watched.recipe, watched.apply, watched.params, seed, site)
    alone = privacy.Event("gaussian", plan.noise_multiplier)
    claim = privacy.total_epsilon([(alone, 1)], relation=plan.relation, delta=settings.dp.delta, accountant="pld")
    violated = whole > plan.epsilon or max(step.gaussian, step.clopper_pearson) > claim
    return {
        "combination": combination.name,
        "seed": seed,
        "dataset": settings.dataset,
        "scale": settings.scale,
        "unit": plan.unit,
        "relation": plan.relation,
        "delta": settings.dp.delta,
        "noise_multiplier": plan.noise_multiplier,
        "claimed_epsilon": plan.epsilon,
        "one_run_epsilon": whole,
        "canaries": len(watched.score),
        "one_step_claimed_epsilon": claim,
        "one_step_epsilon": step.gaussian,
        "one_step_ratio": step.gaussian / claim,
        "one_step_clopper_pearson_epsilon": step.clopper_pearson,
        "canary_norm_over_clip_norm": step.canary_norm,
        "trials": 2 * settings.trials,
        "confidence": settings.confidence,
        "verdict": "VIOLATION" if violated else "holds",
    }


def _table(rows: list[Row]) -> reporting.Table:
    header = [("", title) for _, title in COLUMNS]
    return reporting.Table(header, [_cells(row) for row in rows], [_note(rows)], num_labels=2)


def _cells(row: Row) -> list[str]:
    return [f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key, _ in COLUMNS]


def _note(rows: list[Row]) -> str:
    return (
        f"Epsilon at delta {rows[0]['delta']:g} for one record of one silo. One run: what the server of a whole "
        "training can prove from canaries. One step: what somebody who knows all but one record can prove of one step "
        "in which that record takes part, where the claim is a Gaussian mechanism's; ratio: of that to its claim. "
        f"Every lower bound by itself is right with probability {rows[0]['confidence']:g} at least."
    )
