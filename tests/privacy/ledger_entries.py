"""Entries of a ledger and what they cost."""

from fedrobust.privacy import Event, total_epsilon
from fedrobust.privacy.ledger import Budget, Entry

DELTA = 1e-4
STEP = Event("gaussian", 4.0, "poisson", 0.3)
COUNTS = Event("laplace", 10.0)
AMPLE = Budget(100.0, DELTA)


def entry(first=0, num=1, event=STEP, scope="silo 0", mechanism="gradient", run="run a", relation="add_or_remove_one"):
    return Entry(scope, "record", relation, mechanism, run, first, num, event)


def epsilon(*releases, relation="add_or_remove_one", accountant="pld"):
    return total_epsilon(releases, relation=relation, delta=DELTA, accountant=accountant)
