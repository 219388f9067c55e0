"""The ledger never says less than was spent: after refusals, restarts, and on whatever terms."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrobust.privacy import Event, ledger
from fedrobust.privacy.accounting import accountant_for
from fedrobust.privacy.ledger import Budget, Entry, charge, federation_spent, read, spent, summary, to_text
from tests.privacy.ledger_entries import AMPLE, COUNTS, DELTA, STEP, entry, epsilon


def test_within_a_scope_everything_composes_over_mechanisms_and_runs(path):
    charge(path, AMPLE, [entry(num=5), entry(mechanism="label counts", event=COUNTS)])
    assert spent(path, "silo 0", DELTA) == epsilon((STEP, 5), (COUNTS, 1))
    charge(path, AMPLE, [entry(num=5, run="run b")])
    assert spent(path, "silo 0", DELTA) == epsilon((STEP, 10), (COUNTS, 1)) > epsilon((STEP, 5), (COUNTS, 1))
    assert read(path)[0] == entry(num=5)
    assert spent(path, "silo 1", DELTA) == 0


def test_over_disjoint_silos_the_largest_counts(path):
    charge(path, AMPLE, [entry(num=5), entry(scope="silo 1", num=9), entry(scope="silo 2", mechanism="mask scores")])
    assert federation_spent(path, ["silo 0", "silo 1", "silo 2"], DELTA) == epsilon((STEP, 9))
    assert federation_spent(path, ["silo 0", "silo 2"], DELTA) == epsilon((STEP, 5))
    client = Entry("federation", "client", "add_or_remove_one", "update", "run a", 0, 3, STEP)
    charge(path, AMPLE, [client])
    charge(path, AMPLE, [entry(scope="silo 3", relation="zero_out")])
    for scopes in (["silo 0", "federation"], ["federation"], ["silo 0", "silo 3"], []):
        with pytest.raises(ValueError, match=r"^scopes is "):
            federation_spent(path, scopes, DELTA)


def test_a_round_with_both_levels_is_two_accounts(path):
    """Each silo noises its records' gradients, the server the clipped updates: two guarantees, two scopes."""
    server = Event("gaussian", 1.5)
    for r in range(3):
        silos = [entry(r, scope=f"silo {k}") for k in range(2)]
        charge(path, AMPLE, [*silos, Entry("federation", "client", "replace_one", "update", "run a", r, 1, server)])
    assert federation_spent(path, ["silo 0", "silo 1"], DELTA) == epsilon((STEP, 3))
    assert spent(path, "federation", DELTA) == epsilon((server, 3), relation="replace_one")


def test_a_charge_beyond_the_budget_is_refused_before_it_is_written(path):
    budget = Budget(epsilon((STEP, 7)) * 1.0001, DELTA)
    charge(path, budget, [entry(0, 6)])
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"^scope 'silo 0' would spend epsilon .* delta 0\.0001: .* is left$"
    ) as caught:
        charge(path, budget, [entry(6, 2)])
    assert "\n" not in str(caught.value)
    assert f"of {budget.epsilon:g}, of which {budget.epsilon - epsilon((STEP, 6)):.4g} is left" in str(caught.value)
    with pytest.raises(ValueError, match=r"^scope 'silo 0'"):  # all or none
        charge(path, budget, [entry(scope="silo 1"), entry(6, 2)])
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"^scope 'silo 0'"):  # by however little
        charge(path, Budget(epsilon((STEP, 7)) * 0.9999, DELTA), [entry(6, 1)])
    charge(path, budget, [entry(6, 1)])
    assert spent(path, "silo 0", DELTA) <= budget.epsilon


def test_the_same_steps_of_the_same_run_cost_once_and_of_another_run_again(path):
    charge(path, AMPLE, [entry(0, 4)])
    before = path.read_bytes()
    for first, num in ((0, 4), (1, 2), (3, 1)):
        charge(path, AMPLE, [entry(first, num)])
    assert path.read_bytes() == before
    charge(path, AMPLE, [entry(2, 5)])
    assert [(found.first_step, found.num_steps) for found in read(path)] == [(0, 4), (4, 3)]
    charge(path, AMPLE, [entry(3, 4, run="run b")])  # goes on from a checkpoint under another name
    assert spent(path, "silo 0", DELTA) == epsilon((STEP, 11))
    with pytest.raises(ValueError, match=r"^first_step of 'gradient' of run 'run b'"):
        charge(path, AMPLE, [entry(1, 6, run="run b")])  # what lies before its first step was never charged to it


def test_a_run_whose_earlier_steps_are_missing_is_refused(path):
    """As after a restart that found its checkpoint but not its ledger."""
    with pytest.raises(ValueError, match=r"^first_step of 'gradient' .* is 5: must be in \[0, 0\]"):
        charge(path, AMPLE, [entry(5, 5)])
    charge(path, AMPLE, [entry(0, 5)])
    with pytest.raises(ValueError, match=r"^first_step .* is 6: must be in \[0, 5\]"):
        charge(path, AMPLE, [entry(6, 1)])


def test_steps_cannot_be_charged_again_on_better_terms(path):
    charge(path, AMPLE, [entry(0, 4)])
    dear = STEP._replace(noise_multiplier=0.5)
    with pytest.raises(ValueError, match=r"^event of 'gradient' of run 'run a' is "):
        charge(path, AMPLE, [entry(2, 4, event=dear)])
    charge(path, AMPLE, [entry(4, 2, event=dear)])  # later steps may be others
    assert spent(path, "silo 0", DELTA) == epsilon((STEP, 4), (dear, 2))
    for first, num, event in ((0, 4, STEP), (3, 1, STEP), (4, 2, dear)):  # done again after a restart
        charge(path, AMPLE, [entry(first, num, event=event)])
    for first, num, event in ((3, 2, STEP), (3, 2, dear), (4, 1, STEP)):
        with pytest.raises(ValueError, match=r"^event of 'gradient' of run 'run a' is "):
            charge(path, AMPLE, [entry(first, num, event=event)])
    assert spent(path, "silo 0", DELTA) == epsilon((STEP, 4), (dear, 2))
    with pytest.raises(ValueError, match=r"^relation of scope 'silo 0' is 'zero_out'"):
        charge(path, AMPLE, [entry(relation="zero_out", run="run c")])


def test_a_look_without_privacy_is_on_record_and_in_no_sum(path):
    charge(path, AMPLE, [entry(num=2), entry(mechanism="tuning", event=None, num=3)])
    assert spent(path, "silo 0", DELTA) == epsilon((STEP, 2))
    (line,) = summary(path, DELTA)
    assert (line.mechanisms, line.looks) == ((("gradient", 2),), (("tuning", 3),))
    assert (line.unit, line.relation, line.epsilon) == ("record", "add_or_remove_one", epsilon((STEP, 2)))
    text = to_text([line])
    for told in ("silo 0", "record", "add_or_remove_one", "gradient x 2", "looks without privacy: tuning x 3"):
        assert told in text
    assert [json.loads(line)["private"] for line in path.read_text().splitlines()] == [True, False]


def test_a_text_never_tells_less_than_was_spent():
    line = ledger.Line("silo 0", "record", "zero_out", 0.0, DELTA, (), ())
    for spent_, told in ((8.0, "8"), (8.0001, "8.001"), (0.99999, "1"), (0.0, "0"), (1e-7, "1e-07"), (1e999, "inf")):
        assert f"epsilon {told}, delta 0.0001" in to_text([line._replace(epsilon=spent_)])
    both = to_text([line, line._replace(scope="silo 1")]).splitlines()
    assert [told.partition(":")[0] for told in both] == ["silo 0", "silo 1"]


def test_a_look_without_privacy_needs_no_budget(path):
    charge(path, AMPLE, [entry(num=2)])
    used_up = Budget(0.5 * epsilon((STEP, 2)), DELTA)
    charge(path, used_up, [entry(mechanism="tuning", event=None)])
    assert summary(path, DELTA)[0].looks == (("tuning", 1),)
    with pytest.raises(ValueError, match=r"of which 0 is left$"):
        charge(path, used_up, [entry(2, 1)])


def test_batches_of_a_fixed_size_and_all_beside_them_are_composed_by_renyi_divergences(path):
    fixed = Event("gaussian", 4.0, "fixed_size", 0.1)
    charge(path, AMPLE, [entry(num=3, event=fixed, relation="replace_one")])
    assert spent(path, "silo 0", DELTA) == epsilon((fixed, 3), relation="replace_one", accountant="rdp")
    assert accountant_for([fixed, COUNTS]) == "rdp" != accountant_for([STEP, COUNTS])


def test_two_runs_of_shuffled_epochs_do_not_share_one(path):
    """Batches of a fourth: one step of each run, and a record may be in both."""
    shuffled = Event("gaussian", 4.0, "shuffle", 0.25)
    for run in ("run a", "run b"):
        charge(path, AMPLE, [entry(0, 1, shuffled, run=run, relation="zero_out")])
    plain = epsilon((Event("gaussian", 4.0), 2), relation="zero_out")
    assert spent(path, "silo 0", DELTA) == pytest.approx(plain, rel=1e-6)
    for step in (1, 2, 3):  # the rest of the epoch: other records' turn
        charge(path, AMPLE, [entry(step, 1, shuffled, relation="zero_out")])
    assert spent(path, "silo 0", DELTA) == pytest.approx(plain, rel=1e-6)
    charge(path, AMPLE, [entry(4, 1, shuffled, relation="zero_out")])
    assert spent(path, "silo 0", DELTA) == pytest.approx(epsilon((Event("gaussian", 4.0), 3)), rel=1e-6)
    # Two steps, but the last of one epoch and the first of the next: a record may be in both.
    charge(path, AMPLE, [entry(3, 2, shuffled, run="run c", relation="zero_out")])
    assert spent(path, "silo 0", DELTA) == pytest.approx(epsilon((Event("gaussian", 4.0), 5)), rel=1e-6)


def test_shuffled_steps_on_both_sides_of_other_steps_do_not_share_an_epoch(path):
    """Epochs of four steps, the third and fourth with next to no cost: a record of step 0 may come again in step 4."""
    dear, cheap = Event("gaussian", 4.0, "shuffle", 0.25), Event("gaussian", 1e6, "shuffle", 0.25)
    for first, event in ((0, dear), (2, cheap), (4, dear)):
        charge(path, AMPLE, [entry(first, 2, event, relation="zero_out")])
    assert spent(path, "silo 0", DELTA) >= epsilon((Event("gaussian", 4.0), 2), relation="zero_out")


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(["x", "y"]), st.integers(0, 6), st.integers(1, 4)),
        max_size=12,
    )
)
def test_whatever_was_looked_at_is_in_the_ledger_once_and_for_each_run(tmp_path_factory, looks):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    seen = set()
    for run, mechanism, first, num in looks:
        try:
            charge(
                path, AMPLE, [entry(first, num, COUNTS._replace(noise_multiplier=1e9), run=run, mechanism=mechanism)]
            )
        except ValueError:
            continue
        seen |= {(run, mechanism, step) for step in range(first, first + num)}
    steps = [(found.run, found.mechanism, found.first_step + i) for found in read(path) for i in range(found.num_steps)]
    assert sorted(steps) == sorted(seen)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (entry(scope=""), "scope"),
        (entry(mechanism=""), "mechanism"),
        (entry(run=""), "run"),
        (entry()._replace(unit="patient"), "unit"),
        (entry(relation="swap"), "relation"),
        (entry(first=-1), "first_step"),
        (entry(num=0), "num_steps"),
        (entry(event=STEP._replace(kind="uniform")), "kind"),
        (entry(event=STEP._replace(sampling="cyclic")), "sampling"),
        (entry(event=COUNTS._replace(sampling="poisson")), "sampling"),
        (entry(event=STEP._replace(sampling_rate=0.0)), "sampling_rate"),
        (entry(event=Event("gaussian", 1.0, "none", 0.1)), "sampling_rate"),
        (entry(event=STEP._replace(truncation_probability=1.0)), "truncation_probability"),
    ],
)
def test_a_bad_entry_is_named(path, bad, named):
    with pytest.raises(ValueError, match=f"^{named} is "):
        charge(path, AMPLE, [bad])
    for budget in (Budget(0.0, DELTA), Budget(1.0, 0.0), Budget(float("nan"), DELTA)):
        with pytest.raises(ValueError, match=r"^budget\."):
            charge(path, budget, [entry()])
    assert not path.exists()
