"""The points of the curve, two at a time, resumable, and what they leave behind."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from experiments import grid
from experiments.combinations.account import charge_label_counts, note_look, open_account, spent
from experiments.combinations.federation import Hospitals, Recipe, build_model, hospitals, make_plan, make_recipe
from experiments.combinations.provenance import provenance
from experiments.combinations.study import config_of
from experiments.combinations.training import Job, train
from experiments.display import Show
from experiments.epsilon_curve.settings import Curve, Noise
from fedrobust import privacy, reporting

_NOT_OF_A_ROW = ("epsilons", "noises", "seeds", "out", "data_dir", "parallel", "checkpoint_every")
"""Settings that say what to run and where, not what a row is: rows of one folder may differ in them."""

NOISY_SHARE = 0.05
"""Of the learning rate, for points with more noise than --dp.epsilon with noise in each silo.

AUC on val of pneumonia_mnist, epsilon 1, noise in each silo, seeds 0, 1, 2 (2026-11-24): rate 0.03 0.940, 0.956, 0.930;
0.02 0.933, 0.969, -; 0.012 0.927, 0.961, 0.937; 0.045 0.945, 0.927, 0.915. Of a secure sum: 0.15 0.931, 0.906, 0.925.
"""


class Point(NamedTuple):
    """One training of the curve. Attributes: noise, None without privacy; epsilon, inf without; seed."""

    noise: Noise | None
    epsilon: float
    seed: int

    @property
    def name(self) -> str:
        """As in a folder's name: "silo-epsilon8-seed0"."""
        return f"{self.noise or 'plain'}-epsilon{self.epsilon:g}-seed{self.seed}"


def run(curve: Curve, console: Console) -> Path:
    """Trains what is missing, then writes the table and the figure.

    Args:
        curve: the settings.
        console: where progress and the table are shown.

    Returns:
        The folder that holds `rows.jsonl`, `ledger.jsonl`, `table.md`, `table.tex` and `auc_against_epsilon.png`.

    Raises:
        ValueError: bad settings or data, or a folder that holds rows of another configuration. Nothing is written.
    """
    out = Path(curve.out or f"results/epsilon_curve-{Path(curve.dataset).stem}-{curve.scale}")
    settings = {k: v for k, v in dataclasses.asdict(curve).items() if k not in _NOT_OF_A_ROW}
    config = json.loads(json.dumps(settings))
    grid.require_same(out, config)
    sites = {seed: hospitals(curve.study(*curve.points[0]), seed) for seed in curve.seeds}
    cases = {}
    for point in (Point(noise, epsilon, seed) for seed in curve.seeds for noise, epsilon in curve.points):
        site = sites[point.seed]
        plan = plan_of(curve, point, site)  # one that cannot be made is an error before anything is written
        cases[point.name] = functools.partial(make_row, curve, point, plan, site, out)
    fields, num_threads = reporting.POINT_FIELDS, _num_at_once(curve)
    has_rows = grid.fill(out, config, cases, _name_of_row, console, fields=fields, num_threads=num_threads)
    if has_rows:
        report(out, console)
    return out


def report(out: Path, console: Console) -> None:
    """Shows the table of a folder's rows and writes it, with the figure, beside them."""
    rows = reporting.read(out / "rows.jsonl")
    grid.write_table(out, "table", reporting.epsilon_table(rows), console)
    reporting.auc_against_epsilon(rows, out / "auc_against_epsilon.png")
    console.print(f"\nrows.jsonl, ledger.jsonl, table.md, table.tex and auc_against_epsilon.png: {out}")


def plan_of(curve: Curve, point: Point, site: Hospitals) -> privacy.Plan | None:
    """The plan of every silo at a point; None without privacy."""
    return None if point.noise is None else make_plan(curve.study(point.noise, point.epsilon), site)


def recipe_of(curve: Curve, point: Point, plan: privacy.Plan | None, site: Hospitals) -> Recipe:
    """How a point is trained; label counts must have been charged.

    The curve's learning rate was chosen for one epsilon, where the network learns its features. With more noise than
    there, features learned at that rate, or at half or a quarter of it, are worse than those a network begins with; a
    small part of it, `NOISY_SHARE`, leaves them nearly as they are, and the noise of all steps averages out.
    """
    recipe = make_recipe(curve.study(point.noise, point.epsilon), point.seed, site, plan=plan, at=False)
    if plan is None:
        return recipe
    reference = make_plan(curve.study("silo", curve.dp.epsilon), site)
    shares = curve.clients if point.noise == "secure_sum" else 1
    is_noisy = plan.noise_multiplier > reference.noise_multiplier * math.sqrt(shares)
    rate = curve.dp.learning_rate * (NOISY_SHARE if is_noisy else 1.0)
    dp = dataclasses.replace(recipe.study.dp, learning_rate=rate)
    return dataclasses.replace(recipe, study=dataclasses.replace(recipe.study, dp=dp))


def make_row(
    curve: Curve, point: Point, plan: privacy.Plan | None, site: Hospitals, out: Path, progress: Show
) -> dict[str, Any]:
    """Trains and measures one point.

    Args:
        curve: the settings.
        point: what it is.
        plan: of every silo; None without privacy.
        site: the data of its seed.
        out: checkpoints go below `work`, looks at private data into `ledger.jsonl`.
        progress: makes the progress callback of its one phase.

    Returns:
        A complete row, see `reporting.POINT_FIELDS`. Killed at any time and called again, it goes on from the last
        checkpoint.
    """
    asked = curve.study(point.noise, point.epsilon)
    account = None
    if plan is not None:
        account = open_account(asked, reporting.config_hash(config_of(asked)), point.name, plan, site, out)
        note_look(account, "tuning")  # the learning rate was chosen on a validation split
        charge_label_counts(account)
    recipe = recipe_of(curve, point, plan, site)
    study, splits = recipe.study, site.splits
    config = config_of(study)
    model = build_model(study, splits.train.image.shape[1:], splits.train.num_classes)
    folder = out / "work" / point.name
    job = Job(recipe, site, point.seed, recipe.num_rounds, False, (), "mean", folder, account)
    trained = train(job, model, progress("training"))
    guarantee = None
    if plan is not None and account is not None:  # what was spent, in the ledger's words
        guarantee = dataclasses.asdict(plan) | {"epsilon": spent(account)}
        guarantee |= {"budget": point.epsilon, "noise": point.noise}
    return {
        "experiment": study.experiment,
        "seed": point.seed,
        "config": config,
        "config_hash": reporting.config_hash(config),
        **trained.measured(splits),
        "privacy": guarantee,
        **trained.course(),
        **provenance(),
    }


def _num_at_once(curve: Curve) -> int:
    """Points trained at the same time: one thread each, where clients are not spread over devices already."""
    return 2 if curve.parallel and jax.device_count() == 1 else 1


def _name_of_row(row: dict[str, Any]) -> str:
    guarantee = row["privacy"]
    if guarantee is None:
        return Point(None, float("inf"), row["seed"]).name
    return Point(guarantee["noise"], guarantee["budget"], row["seed"]).name
