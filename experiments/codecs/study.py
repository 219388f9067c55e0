"""The ways to say updates, one after the other, resumable, and what they leave behind."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from experiments import grid
from experiments.codecs.settings import Codecs
from experiments.combinations.account import Account, charge_label_counts, note_look, open_account, spent
from experiments.combinations.federation import Hospitals, build_model, hospitals, make_plan, make_recipe
from experiments.combinations.provenance import provenance
from experiments.combinations.study import config_of
from experiments.combinations.training import Job, train
from experiments.display import Show
from experiments.ways import WAYS
from fedrobust import privacy, reporting, trees


def run(codecs: Codecs, console: Console) -> Path:
    """Trains what is missing, then writes the table and the figure.

    Args:
        codecs: the settings.
        console: where progress and the table are shown.

    Returns:
        The folder that holds `rows.jsonl`, `ledger.jsonl` of its private rows, `table.md`, `table.tex` and
        `accuracy_against_uplink.png`.

    Raises:
        ValueError: bad settings or data, or a folder that holds rows of another configuration. Nothing is written.
    """
    out = Path(codecs.out or f"results/codecs-{Path(codecs.dataset).stem}-{codecs.scale}")
    config = config_of(codecs.study())
    grid.require_same(out, config)
    sites = {seed: hospitals(codecs.study(), seed) for seed in codecs.seeds}
    cases = {}
    for seed in codecs.seeds:
        for name in codecs.ways:
            plan = plan_of(codecs, name, sites[seed])  # one that cannot be made is an error before anything is written
            case = functools.partial(make_row, codecs, config, name, seed, plan, sites[seed], out)
            cases[name_of(name, seed)] = case
    has_rows = grid.fill(out, config, cases, _name_of_row, console, fields=reporting.UPLINK_FIELDS)
    if has_rows:
        report(out, console)
    return out


def report(out: Path, console: Console) -> None:
    """Shows the table of a folder's rows and writes it, with the figure, beside them."""
    rows = reporting.read(out / "rows.jsonl")
    grid.write_table(out, "table", reporting.uplink_table(rows), console)
    reporting.accuracy_against_uplink(rows, out / "accuracy_against_uplink.png")
    console.print(f"\nrows.jsonl, table.md, table.tex and accuracy_against_uplink.png: {out}")


def plan_of(codecs: Codecs, name: str, site: Hospitals) -> privacy.Plan | None:
    """The plan of every silo for a way; None without privacy."""
    return make_plan(codecs.study(), site) if WAYS[name].private else None


def make_row(
    codecs: Codecs,
    config: dict[str, Any],
    name: str,
    seed: int,
    plan: privacy.Plan | None,
    site: Hospitals,
    out: Path,
    progress: Show,
) -> dict[str, Any]:
    """Trains and measures one way with one seed.

    Args:
        codecs: the settings.
        config: what goes into the row and its hash.
        name: of the way.
        seed: of everything random.
        plan: of every silo; None without privacy.
        site: the data.
        out: checkpoints go below `work`, looks at private data into `ledger.jsonl`.
        progress: makes the progress callback of its one phase.

    Returns:
        A complete row, see `reporting.UPLINK_FIELDS`. Killed at any time and called again, it goes on from the last
        checkpoint.
    """
    study, way, splits = codecs.study(), WAYS[name], site.splits
    account = None if plan is None else _opened(codecs, config, name_of(name, seed), plan, site, out)
    recipe = dataclasses.replace(make_recipe(study, seed, site, plan=plan, at=False), way=way)
    model = build_model(study, splits.train.image.shape[1:], splits.train.num_classes)
    folder = out / "work" / name_of(name, seed)
    job = Job(recipe, site, seed, recipe.num_rounds, codecs.sparsity > 0, (), "mean", folder, account)
    trained = train(job, model, progress("training"))
    full = jax.eval_shape(model.init, jax.random.key(0), splits.val.image[:1])
    uplink, downlink = trained.sent.tolist()
    guarantee = None if account is None or plan is None else dataclasses.asdict(plan) | {"epsilon": spent(account)}
    return {
        "experiment": study.experiment,
        "way": {"name": name, **dataclasses.asdict(way)},
        "seed": seed,
        "config": config,
        "config_hash": reporting.config_hash(config),
        **trained.measured(splits),
        "bytes": {"dense": 4 * trees.size(full), "uplink": uplink, "downlink": downlink},
        "privacy": guarantee,
        **trained.course(),
        **provenance(),
    }


def name_of(way: str, seed: int) -> str:
    """What the work on a way with a seed is called."""
    return f"{way}-seed{seed}"


def _name_of_row(row: dict[str, Any]) -> str:
    return name_of(row["way"]["name"], row["seed"])


def _opened(
    codecs: Codecs, config: dict[str, Any], training: str, plan: privacy.Plan, site: Hospitals, out: Path
) -> Account:
    """The account of a private way, with what precedes its training charged to it."""
    account = open_account(codecs.study(), reporting.config_hash(config), training, plan, site, out)
    note_look(account, "tuning")  # presets were chosen on a validation split
    charge_label_counts(account)
    return account
