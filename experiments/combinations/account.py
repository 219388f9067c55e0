"""What the study writes into its ledger, and when.

Each training is a deployment of its own that never took place beside the others: the rows of a study, and a row's
trainings with dishonest clients, ask what the same hospitals would have released under other rules (they even share
the seeds of their noise). So a scope names a training and a silo, and its epsilon is that of this training alone. Who
deploys two of them on the same records pays for both, and must give them different seeds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from experiments.combinations.federation import Hospitals
from experiments.combinations.provenance import provenance
from experiments.combinations.settings import Study
from fedrobust import privacy, reporting
from fedrobust.privacy import ledger
from fedrobust.types import Cohort

NUM_BLOCKS = 8
"""Charges per training: each composes privacy losses, 0.2 s; a kill wastes an eighth of a training at most."""


class Account(NamedTuple):
    """The silos of one private training, before their ledger.

    Attributes:
        path: the ledger.
        training: names the training within the study.
        run: stands for everything the released bits depend on.
        plan: of every silo.
        budget: of every silo.
        num_silos: how many there are.
    """

    path: Path
    training: str
    run: str
    plan: privacy.Plan
    budget: ledger.Budget
    num_silos: int

    @property
    def scopes(self) -> list[str]:
        """One per silo."""
        return [f"{self.training}, silo {silo}" for silo in range(self.num_silos)]


def open_account(
    study: Study, config_hash: str, training: str, plan: privacy.Plan, site: Hospitals, out: Path
) -> Account:
    """The account of a training.

    Args:
        study: the settings.
        config_hash: of those that say what a row is.
        training: its name, the row's included.
        plan: of every silo.
        site: the records.
        out: the folder of the study.
    """
    # The rest of what bits depend on; with another of these a resumed training pays again from where it stood.
    machine = {**provenance(), "num_devices": jax.device_count()}
    made_with = reporting.config_hash({**machine, "client_map": study.client_map})
    run = f"settings {config_hash}, records {site.digest}, made with {made_with}"
    budget = ledger.Budget(study.dp.epsilon, study.dp.delta)
    return Account(out / "ledger.jsonl", training, run, plan, budget, study.clients)


def charge_label_counts(account: Account) -> None:
    """Before the silos count their labels."""
    event = account.plan.histogram_event
    if event is not None:
        _charge(account, "label counts", 0, 1, event)


def charged(account: Account | None, num_rounds: int, draw: Callable[[int], Cohort]) -> Callable[[int], Cohort]:
    """`draw`, which looks at the records of a round, after the round has been charged.

    Args:
        account: None without privacy.
        num_rounds: of the training, at most those of its plan.
        draw: pure function of the round.
    """
    if account is None:
        return draw
    found, size = account, -(-num_rounds // NUM_BLOCKS)
    last = -1

    def charge_then_draw(round: int) -> Cohort:
        nonlocal last
        block = round // size
        if block != last:  # the first time after a restart in the midst of a block too: it costs nothing twice
            first = block * size
            _charge(found, "gradient", first, min(size, num_rounds - first), found.plan.event)
            last = block
        return draw(round)

    return charge_then_draw


def note_look(account: Account | None, mechanism: str) -> None:
    """Before something is chosen on the validation split, which the study does not protect."""
    if account is not None:
        plan = account.plan
        scope = f"{account.training}, validation split"
        entry = ledger.Entry(scope, plan.unit, plan.relation, mechanism, account.run, 0, 1, None)
        ledger.charge(account.path, account.budget, [entry])


def spent(account: Account) -> float:
    """Epsilon of the federation, by its ledger: the largest of its silos."""
    return ledger.federation_spent(account.path, account.scopes, account.plan.delta)


def _charge(account: Account, mechanism: str, first: int, num_steps: int, event: privacy.Event) -> None:
    plan = account.plan
    entries = [
        ledger.Entry(scope, plan.unit, plan.relation, mechanism, account.run, first, num_steps, event)
        for scope in account.scopes
    ]
    ledger.charge(account.path, account.budget, entries)
