"""Seeded privacy bugs: each is caught by its law, and the right trainer breaks none, whatever the seed."""

import functools

import pytest
from dp_accounting.pld import privacy_loss_distribution

from tests.privacy.zoo import account_bugs, account_laws, bugs, laws, patching

LAWS = {law.__name__: law for law in (*laws.LAWS, *account_laws.LAWS)}
SEEDS = range(20)
BUGS = (*bugs.BUGS, *account_bugs.BUGS)
FIRST = {bug.law: bug for bug in reversed(BUGS)}


@pytest.fixture(scope="module", autouse=True)
def _remembered():
    """Every trainer asks the accountant for the same privacy losses, and no bug is in those."""
    with pytest.MonkeyPatch.context() as patch:
        remembered = functools.lru_cache(privacy_loss_distribution.from_gaussian_mechanism)
        patch.setattr(privacy_loss_distribution, "from_gaussian_mechanism", remembered)
        yield


@pytest.fixture(scope="module")
def right():
    return patching.trainer()


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_right_trainer_obeys_the_law_for_every_seed(law, right):
    for seed in SEEDS:
        law(right, seed)


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, marks=[] if bug is FIRST[bug.law] else pytest.mark.slow, id=bug.name) for bug in BUGS],
)
def test_the_bug_is_caught(bug):
    with patching.patched(bug) as trainer, pytest.raises(AssertionError):
        LAWS[bug.law](trainer, 0)


def test_there_are_enough_bugs_and_every_law_catches_one():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 25
    assert {bug.law for bug in BUGS} >= LAWS.keys() - {"an_auditor_finds_no_more_than_is_claimed"}
