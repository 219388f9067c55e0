"""One row of the study: train a combination, poison it, compress it, attack it, weigh it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import parallel
from experiments.combinations.account import Account, charge_label_counts, note_look, open_account, spent
from experiments.combinations.federation import RULES, Hospitals, build_model, make_plan, make_recipe
from experiments.combinations.provenance import provenance
from experiments.combinations.serving import Final, as_served, finish, runnable
from experiments.combinations.settings import Attack as AttackSettings
from experiments.combinations.settings import Study
from experiments.combinations.training import BATCH_SIZE, Job, Trained, train
from experiments.display import Show
from experiments.grid import stopping
from experiments.parallel import Check
from fedrobust import attacks, compression, evaluation, keys, privacy, reporting, trees
from fedrobust.types import Dataset, Key, Model, Run, Search

LATENCY_BATCH = 64
NUM_SLOTS = {"cpu": 16}
"""Images per call of the model under attack, 64 elsewhere. ResNet-9 of width 16 on 28 x 28, one x86 core, microseconds
per image, 16 at a time: 410 forward, 917 for a gradient; 64 at a time: 432, 999 (jax 0.10.2, 2026-11-29)."""


def make_row(
    study: Study,
    config: dict[str, Any],
    combination: reporting.Combination,
    seed: int,
    site: Hospitals,
    out: Path,
    progress: Show,
) -> reporting.Row:
    """Trains and measures one combination with one seed.

    Args:
        study: the settings.
        config: what goes into the row and its hash.
        combination: what takes part.
        seed: of everything random.
        site: the data.
        out: checkpoints go below `work`, the model's file below `models`, looks at private data into `ledger.jsonl`.
        progress: makes the progress callback of a phase from its name.

    Returns:
        A complete row. Killed at any point and called again, it goes on from the last checkpoint.
    """
    name = name_of(combination, seed)
    plan = make_plan(study, site) if combination.dp else None
    phases = _phases(study)
    accounts = {} if plan is None else _accounts(study, config, name, list(phases), plan, site, out)
    recipe = make_recipe(study, seed, site, plan=plan, at=combination.at)
    train_split, test = site.splits.train, site.splits.test
    model = build_model(study, train_split.image.shape[1:], train_split.num_classes)
    work, path = out / "work" / name, out / "models" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)

    def job(phase: str) -> Callable[[Check], Trained]:
        share, malicious, rule = phases[phase]
        folder = work / phase.replace(" ", "_").replace(",", "")
        num_rounds = math.ceil(share * recipe.num_rounds)
        what = Job(recipe, site, seed, num_rounds, combination.mc, malicious, rule, folder, accounts.get(phase))
        return lambda check: train(what, model, stopping(check, progress)(phase))

    jobs = [job(phase) for phase in phases]
    at_once = study.parallel and jax.device_count() == 1
    trained, *poisoned = parallel.run(jobs, num_threads=len(jobs) if at_once else 1)
    evaluated = progress("evaluation")
    evaluated(0, 1, {})
    guarantee = None
    if plan is not None:  # what was spent, in the ledger's words; the plan only foresaw it
        guarantee = dataclasses.asdict(plan) | {"epsilon": spent(accounts["training"]), "noise": study.dp.noise}
    _note_ranges(study, combination, accounts)
    served = as_served(trained, study.mc, site.splits.val.image[:BATCH_SIZE])
    final = finish(model, trained, served, path, guarantee, test.image[:BATCH_SIZE])
    clean = evaluation.metrics(evaluation.predict(final.apply, final.params, test.image, BATCH_SIZE), test.label)
    robust, checks = robustness(study.attack, final, test, keys.stream(keys.root(seed), "evaluate"))
    row = {
        "experiment": study.experiment,
        "combination": combination._asdict(),
        "seed": seed,
        "config": config,
        "config_hash": reporting.config_hash(config),
        "clean": clean._asdict(),
        "robust": robust,
        "checks": checks,
        "poisoned": _poisoned(study, site, poisoned),
        "size": _size(model, final, test.image.shape[1:], work),
        "masked_minus_shrunk": trained.shrink_difference,
        "privacy": guarantee,
        **trained.course(),
        **provenance(),
    }
    evaluated(1, 1, {})
    return row


def name_of(combination: reporting.Combination, seed: int) -> str:
    """What a row's work and its model's file are called."""
    return f"{combination.name}-seed{seed}"


def name_of_row(row: reporting.Row) -> str:
    """The same of a finished row."""
    return name_of(reporting.Combination(**row["combination"]), row["seed"])


def _phases(study: Study) -> dict[str, tuple[float, tuple[int, ...], str]]:
    """The trainings of a row by name: share of the rounds, ids of dishonest clients, which aggregator."""
    phases: dict[str, tuple[float, tuple[int, ...], str]] = {"training": (1.0, (), "mean")}
    if study.malicious:
        for rule, title in zip(RULES, ("mean", study.poison.rule.replace("_", " ")), strict=True):
            phases[f"poisoned, {title}"] = study.poison.rounds_share, study.malicious, rule
    return phases


def _accounts(
    study: Study,
    config: dict[str, Any],
    row: str,
    phases: Sequence[str],
    plan: privacy.Plan,
    site: Hospitals,
    out: Path,
) -> dict[str, Account]:
    """An account for each training of a private row, with what precedes the training charged to it."""
    config_hash = reporting.config_hash(config)
    accounts = {phase: open_account(study, config_hash, f"{row}, {phase}", plan, site, out) for phase in phases}
    for account in accounts.values():
        note_look(account, "tuning")  # presets were chosen on a validation split
        charge_label_counts(account)
    return accounts


def _note_ranges(study: Study, combination: reporting.Combination, accounts: dict[str, Account]) -> None:
    """Before the ranges of a row's models are measured on the validation split."""
    if combination.mc and study.mc.activations == "int8":
        for account in accounts.values():
            note_look(account, "activation ranges")


def robustness(settings: AttackSettings, final: Final, test: Dataset, key: Key) -> tuple[dict[str, Any], list[Any]]:
    """Accuracies under attack and their checks; no accuracy for a model whose logits are not finite."""
    apply, params = final.apply, final.params
    eps, whole = max(settings.eps), settings.gate_examples > 0
    num = settings.gate_examples if whole else len(test.label)
    some = test._replace(image=test.image[:num], label=test.label[:num])
    probes = _probes(settings.num_steps) if whole else None
    extra = _ways_around(final, some) if whole else {}
    gate = functools.partial(
        evaluation.gate, apply, params, some, probes, key, BATCH_SIZE, norm="linf", eps=eps, extra=extra
    )
    if not np.isfinite(evaluation.predict(apply, params, test.image, BATCH_SIZE)).all():
        return {}, gate()
    cascade = settings.suite == "auto_attack"
    threats = _threats(settings, test.num_classes)
    found = evaluation.evaluate(apply, params, test, threats, key, BATCH_SIZE, cascade=cascade)
    standing = ~found.broken["linf", eps][:num]
    return found.robust, [*found.checks, *gate(standing=standing)]


def _num_slots() -> int:
    return NUM_SLOTS.get(jax.default_backend(), 64)


@functools.lru_cache(maxsize=4)  # what a compiled attack is remembered by
def _probes(num_steps: int) -> dict[str, Callable[[jax.Array], Run]]:
    return attacks.probes(norm="linf", num_steps=num_steps, num_slots=_num_slots(), num_devices=None)


def _ways_around(final: Final, test: Dataset) -> dict[str, Callable[[jax.Array], Run]]:
    """Attacks past the rounding of a model that computes on integers."""
    if final.twin is None:
        return {}
    return attacks.routes(
        lambda x: final.apply(final.params, x), jnp.asarray(test.image[:BATCH_SIZE]), dequantized=final.twin,
        norm="linf", num_steps=40, num_queries=300, num_slots=_num_slots(), num_devices=None,
    )  # fmt: skip


@functools.lru_cache(maxsize=4)  # likewise
def _threats(settings: AttackSettings, num_classes: int) -> tuple[evaluation.Threat, ...]:
    """FGSM and PGD, or AutoAttack's members, at every radius."""

    def threat(family: str, num_steps: int, search: Callable[[jax.Array], Search]) -> evaluation.Threat:
        num_tries = search(jnp.asarray(1.0)).num_tries
        attack = lambda eps: attacks.run(search(eps), num_slots=_num_slots(), num_devices=None)  # noqa: E731
        return evaluation.Threat(family, "linf", settings.eps, num_steps, num_tries, attack)

    def pgd(eps: jax.Array, num_steps: int, step_size: jax.Array, num_restarts: int) -> Search:
        return attacks.momentum_pgd(
            norm="linf", eps=eps, step_size=step_size, num_steps=num_steps, momentum=0.0,
            random_start=num_steps > 1, num_restarts=num_restarts,
        )  # fmt: skip

    def member(number: int) -> Callable[[jax.Array], Search]:
        return lambda eps: suite(eps).members[number].search

    def suite(eps: jax.Array | float) -> attacks.AutoAttack:
        return attacks.auto_attack(version="standard", norm="linf", eps=eps, num_classes=num_classes)

    if settings.suite == "auto_attack":
        return tuple(threat(found.name, found.num_steps, member(i)) for i, found in enumerate(suite(1.0).members))
    steps, restarts = settings.num_steps, settings.num_restarts
    return (
        threat("fgsm", 1, lambda eps: pgd(eps, 1, eps, 1)),
        threat("pgd", steps, lambda eps: pgd(eps, steps, eps * settings.relative_step, restarts)),
    )


def _poisoned(study: Study, site: Hospitals, trained: Sequence[Trained]) -> dict[str, Any] | None:
    """Accuracy on test after training with dishonest clients, averaged plainly and by the robust rule."""
    if not trained:
        return None
    entry: dict[str, Any] = {
        "attack": "sign_flip",
        "malicious_share": len(study.malicious) / study.clients,
        "rounds_share": study.poison.rounds_share,
    }
    test = site.splits.test
    for name, model in zip(("mean", study.poison.rule), trained, strict=True):
        apply, params = runnable(as_served(model, study.mc, site.splits.val.image[:BATCH_SIZE]))
        logits = evaluation.predict(apply, params, test.image, BATCH_SIZE)
        found = evaluation.metrics(logits, test.label)
        entry[name] = {"accuracy": found.accuracy, "balanced_accuracy": found.balanced_accuracy}
    return entry


def _size(model: Model, final: Final, image_shape: tuple[int, int, int], folder: Path) -> dict[str, float]:
    """What the model costs, and over the dense float32 one, both measured in the same run."""
    example = jnp.zeros((1, *image_shape))
    dense = model.init(jax.random.key(0), example)
    path = folder / "dense.safetensors"
    models = (final.apply, final.params, final.bytes), (model.apply, dense, compression.save(path, dense, guarantee={}))
    measured = evaluation.costs(*models, image_shape=image_shape, batch_sizes=(1, LATENCY_BATCH))
    if isinstance(final.params, compression.Quantized):  # scales and zero points are none
        measured[0] = measured[0]._replace(parameters=trees.size(final.params.value))
    this, other = map(_figures, measured)
    return this | {f"{name}_ratio": this[name] / other[name] for name in this}


def _figures(cost: evaluation.Cost) -> dict[str, float]:
    """A model's cost by the names that rows have; time and memory without a 1 in the name are of `LATENCY_BATCH`."""
    single, batch = cost.latency[1], cost.latency[LATENCY_BATCH]
    return {
        "parameters": cost.parameters,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "peak_bytes": cost.peak_bytes[LATENCY_BATCH],
        "latency_ms": batch.median_ms,
        "latency_p95_ms": batch.p95_ms,
        "latency_1_ms": single.median_ms,
        "latency_1_p95_ms": single.p95_ms,
    }
