"""The ledger's file holds whatever was spent: torn, damaged, killed at any moment, charged by many at once."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedrobust.privacy import ledger
from fedrobust.privacy.ledger import Budget, charge, read, spent, summary
from tests.privacy.ledger_entries import AMPLE, DELTA, STEP, entry, epsilon

ROOT = Path(__file__).parents[2]


def test_a_torn_line_was_never_a_charge(path):
    charge(path, AMPLE, [entry(0, 3)])
    whole = path.read_bytes()
    charge(path, AMPLE, [entry(3, 2)])
    path.write_bytes(path.read_bytes()[:-1])
    assert [found.num_steps for found in read(path)] == [3]
    charge(path, AMPLE, [entry(3, 2)])
    assert path.read_bytes().startswith(whole)
    assert spent(path, "silo 0", DELTA) == epsilon((STEP, 5))


def test_a_charge_returns_when_file_and_folder_are_on_disk(path, monkeypatch):
    """Also where the file was made by a charge that was refused, or that was killed before it came to the folder."""
    synced, fsync = {}, os.fsync

    def watched(descriptor):
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", watched)
    with pytest.raises(ValueError, match=r"would spend"):
        charge(path, Budget(1e-3, DELTA), [entry(0, 1)])
    for step in range(2):
        synced.clear()
        charge(path, AMPLE, [entry(step, 1)])
        assert synced[path.stat().st_ino] == path.stat().st_size > 0
        assert path.parent.stat().st_ino in synced


def test_reading_compares_each_line_with_a_few_others(path, monkeypatch):
    """So its time is in proportion to the number of lines: a minute for 10 000 otherwise."""
    num, ends, end = 300, [], ledger._end
    path.parent.mkdir()
    path.write_text("".join(json.dumps(ledger._record(entry(step, 1))) + "\n" for step in range(num)))
    monkeypatch.setattr(ledger, "_end", lambda entry: ends.append(entry) or end(entry))
    assert len(read(path)) == num
    assert len(ends) <= 10 * num


def damaged(**changes):
    record = json.loads(json.dumps(ledger._record(entry(3, 2))))
    event = record["event"] | changes.pop("event", {}) if changes.get("event", {}) is not None else None
    return json.dumps(record | {"event": event} | changes)


DAMAGE = [
    "{broken",
    "[]",
    "null",
    "",
    json.dumps({"scope": "silo 0"}),
    damaged(comment="mine"),
    damaged(event={"kind": "none"}),
    damaged(event={"noise_multiplier": -1.0}),
    damaged(event={"noise_multiplier": None}),
    damaged(event={"noise_multiplier": "4"}),
    damaged(event={"colour": "red"}),
    damaged(private=False),
    damaged(event=None),
    damaged(num_steps=0),
    damaged(num_steps=1.5),
    damaged(first_step=2),
    damaged(first_step=0),
    damaged(first_step=4),
    damaged(first_step=-1),
    damaged(unit="client"),
    damaged(relation="zero_out"),
    damaged(scope=""),
    damaged(scope=5),
    damaged(run=None),
]


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_line_is_one_clear_error_and_never_a_smaller_sum(path, line):
    charge(path, AMPLE, [entry(0, 3)])
    before = path.read_bytes() + line.encode() + b"\n"
    path.write_bytes(before)
    for use in (
        lambda: read(path),
        lambda: spent(path, "silo 0", DELTA),
        lambda: spent(path, "silo 9", DELTA),
        lambda: summary(path, DELTA),
        lambda: charge(path, AMPLE, [entry(3, 2)]),
    ):
        with pytest.raises(ValueError, match=r"^line 2 of .*ledger\.jsonl ") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_threads_that_charge_at_once_lose_nothing_and_share_one_budget(path):
    """Ten runs want two steps each; the budget holds eight."""
    budget, refused = Budget(epsilon((STEP, 8)) * 1.0001, DELTA), []

    def work(name):
        for step in (0, 1):
            try:
                charge(path, budget, [entry(step, run=name)])
            except ValueError:
                refused.append(name)
                return

    workers = [threading.Thread(target=work, args=(f"run {i}",)) for i in range(10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sum(found.num_steps for found in read(path)) == 8
    assert len(refused) >= 6
    assert spent(path, "silo 0", DELTA) <= budget.epsilon


WORKER = """
import sys
from fedrobust.privacy import Event
from fedrobust.privacy.ledger import Budget, Entry, charge
path, run = sys.argv[1:]
event = Event("laplace", 1e6)
for step in range(10**6):
    charge(path, Budget(1.0, 1e-4), [Entry("silo", "record", "zero_out", "gradient", run, step, 1, event)])
    print(step, flush=True)  # the look
"""


def test_a_ledger_killed_at_any_moment_holds_every_step_that_was_looked_at(path):
    looked = {}
    for kill, run in itertools.product(range(2), ("a", "b")):
        name = f"{run}{kill}"
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), name], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(3):
            worker.stdout.readline()
        time.sleep(0.02 * kill + (0.007 if run == "b" else 0))
        worker.send_signal(signal.SIGKILL)
        looked[name] = 3 + len(worker.stdout.read().splitlines())
        worker.wait()
        worker.stdout.close()
    for name, seen in looked.items():
        written = sum(found.num_steps for found in read(path) if found.run == name)
        assert seen <= written <= seen + 1
