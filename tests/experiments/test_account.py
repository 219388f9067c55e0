"""A training is charged before it looks, through kills, and its row says what its ledger says."""

import dataclasses

import numpy as np
import pytest

from experiments.combinations.account import charge_label_counts, charged, note_look, open_account, spent
from experiments.combinations.federation import Hospitals
from experiments.run import parse
from fedrobust import data, privacy
from fedrobust.privacy import ledger
from fedrobust.types import Dataset

STUDY = parse(["quickstart", "--dp.epsilon", "8", "--dp.delta", "1e-4"])
PLAN = privacy.make_plan(
    unit="record",
    relation="add_or_remove_one",
    sampling="poisson",
    noise_multiplier=4.0,
    delta=1e-4,
    sampling_rate=0.1,
    num_steps=20,
    histogram_epsilon=0.2,
    num_units=300,
)


class Killed(BaseException):
    """Not an `Exception`, as a kill."""


SITE = Hospitals(data.load("digits"), [np.arange(i, 300, 5) for i in range(5)])


def opened(folder, study=STUDY, plan=PLAN, site=SITE, config_hash="0123456789ab", training="dp-seed0, training"):
    return open_account(study, config_hash, training, plan, site, folder)


def rounds(account, first, num_rounds, looked, kill_at=None):
    """A training: draws the rounds from a checkpoint on, until it is killed."""

    def draw(round):
        if round == kill_at:
            raise Killed
        looked.append(round)
        return round

    draw = charged(account, num_rounds, draw)
    for round in range(first, num_rounds):
        draw(round)


@pytest.mark.parametrize("kills", [(), (0,), (1,), (2,), (3,), (7, 12), (5, 5, 6, 19)])
def test_a_killed_training_is_charged_for_every_round_it_looked_at_and_once(tmp_path, kills):
    account, start, looked = opened(tmp_path), 0, []
    charge_label_counts(account)
    for kill_at in kills:
        with pytest.raises(Killed):
            rounds(account, start, 20, looked, kill_at)
        entries = [e for e in ledger.read(account.path) if e.scope == account.scopes[2] and e.mechanism == "gradient"]
        steps = sum(entry.num_steps for entry in entries)
        assert max(looked, default=-1) < steps <= max(looked, default=-1) + 1 + 3  # 8 blocks: 3 rounds each
        assert spent(account) >= privacy.epsilon_spent(PLAN, num_steps=len(set(looked)))
        start = max(0, kill_at - 2)  # an older checkpoint
    charge_label_counts(account)
    rounds(account, start, 20, looked)
    assert set(looked) == set(range(20))
    assert spent(account) == PLAN.epsilon


def test_the_round_is_on_disk_before_it_is_looked_at(tmp_path):
    account = opened(tmp_path)

    def draw(round):
        held = [entry for entry in ledger.read(account.path) if entry.scope == account.scopes[0]]
        assert sum(entry.num_steps for entry in held) > round
        return round

    draw = charged(account, 20, draw)
    assert [draw(round) for round in range(20)] == list(range(20))


def test_a_training_beyond_its_budget_stops_before_the_round_that_would_exceed_it(tmp_path):
    small = dataclasses.replace(STUDY, dp=dataclasses.replace(STUDY.dp, epsilon=PLAN.epsilon * 0.8))
    account, looked = opened(tmp_path, small), []
    charge_label_counts(account)
    with pytest.raises(ValueError, match=r"^scope 'dp-seed0, training, silo 0' would spend epsilon"):
        rounds(account, 0, 20, looked)
    assert 0 < len(looked) < 20
    assert spent(account) == privacy.epsilon_spent(PLAN, num_steps=len(looked)) <= small.dp.epsilon


def test_a_training_that_lost_its_ledger_does_not_go_on(tmp_path):
    account, looked = opened(tmp_path), []
    with pytest.raises(Killed):
        rounds(account, 0, 20, looked, kill_at=12)
    account.path.unlink()
    with pytest.raises(ValueError, match=r"^first_step of 'gradient'"):
        rounds(account, 11, 20, looked)
    assert looked == list(range(12))


def test_a_resumed_training_with_other_numbers_pays_again(tmp_path, monkeypatch):
    account, looked = opened(tmp_path), []
    with pytest.raises(Killed):
        rounds(account, 0, 20, looked, kill_at=9)

    def num_charged():
        return sum(e.num_steps for e in ledger.read(account.path) if e.scope == account.scopes[0])

    assert num_charged() == 12  # blocks of 3: the one that begins at 9 was charged when it came to the break
    with monkeypatch.context() as patch:
        patch.setattr("experiments.combinations.provenance.version", lambda package: "99.0")
        rounds(opened(tmp_path), 9, 20, looked)
    assert num_charged() == 12 + 11
    rounds(opened(tmp_path, dataclasses.replace(STUDY, client_map="vmap")), 10, 20, looked)
    with monkeypatch.context() as patch:
        patch.setattr("jax.device_count", lambda: 99)
        rounds(opened(tmp_path), 10, 20, looked)
    assert num_charged() == 12 + 11 + 11 + 11
    image, label, num_classes = SITE.splits.train
    changed = image.copy()
    changed[7, 3, 3] += 1e-3
    for record in ((changed, label), (image, np.roll(label, 1))):
        train = Dataset(*record, num_classes)
        rounds(opened(tmp_path, site=SITE._replace(splits=SITE.splits._replace(train=train))), 10, 20, looked)
    rounds(opened(tmp_path, site=SITE._replace(parts=SITE.parts[::-1])), 10, 20, looked)
    assert num_charged() == 12 + 11 + 11 + 11 + 3 * 11
    rounds(opened(tmp_path), 9, 20, looked)
    assert num_charged() == 12 + 11 + 11 + 11 + 3 * 11 + 8  # the first part of this very run is paid for
    rounds(opened(tmp_path, config_hash="ba9876543210"), 18, 20, looked)
    assert num_charged() == 12 + 11 + 11 + 11 + 3 * 11 + 8 + 2


def test_each_training_of_a_row_has_an_account_of_its_own(tmp_path):
    for training in ("dp-seed0, training", "dp-seed0, poisoned"):
        account = opened(tmp_path, training=training)
        charge_label_counts(account)
        assert spent(account) == privacy.epsilon_spent(PLAN, num_steps=0)
    assert len(ledger.summary(account.path, 1e-4)) == 10


def test_what_is_chosen_on_the_validation_split_is_on_record_and_in_no_sum(tmp_path):
    account = opened(tmp_path)
    note_look(account, "tuning")
    note_look(account, "calibration data")
    note_look(account, "tuning")
    (line,) = ledger.summary(account.path, 1e-4)
    assert line.looks == (("tuning", 1), ("calibration data", 1))
    assert line.epsilon == 0
    assert line.scope not in account.scopes
    note_look(None, "tuning")
