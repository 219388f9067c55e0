"""Rows of one folder made by several: each once, none lost, whoever is killed."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from experiments import grid, parallel
from experiments.files import claimed
from fedrobust import jsonl

FIELDS = {"name": (), "by": (), "history": ("round",)}
ROOT = Path(__file__).parents[2]
NAMES = tuple("abcdefgh")


def fill(out, make, names=NAMES, **settings):
    cases = {name: (lambda show, name=name: make(name, show)) for name in names}
    with (out.parent / "console.txt").open("a") as file:
        return grid.fill(out, {"x": 1}, cases, lambda row: row["name"], Console(file=file), fields=FIELDS, **settings)


def row(name):
    return {"name": name, "by": os.getpid(), "history": {"round": []}}


def rows(out):
    return [row["name"] for row in jsonl.read(out / "rows.jsonl")]


def test_rows_are_made_in_order_and_only_once(tmp_path):
    out = tmp_path / "out"
    made = []
    fill(out, lambda name, show: made.append(name) or row(name), names="ba")
    fill(out, lambda name, show: made.append(name) or row(name), names="abc")
    assert rows(out) == made == ["b", "a", "c"]
    assert {path.name for path in out.iterdir()} == {"rows.jsonl", "config.json"}
    assert json.loads((out / "config.json").read_text()) == {"x": 1}


PROCESS = """
import os, sys, time
from pathlib import Path
from rich.console import Console
from experiments import grid

out, names, seconds, num_threads = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])

def make(name, show):
    (out / "work" / name / "checkpoint").write_text("half")
    time.sleep(seconds)
    return {"name": name, "by": os.getpid(), "history": {"round": []}}

Path(f"{out}-ready-{num_threads}").touch()
while not Path(f"{out}-go").exists():
    time.sleep(0.01)
cases = {name: (lambda show, name=name: make(name, show)) for name in names}
fields = {"name": (), "by": (), "history": ("round",)}
grid.fill(out, {"x": 1}, cases, lambda row: row["name"], Console(), fields=fields, num_threads=num_threads)
"""


def start(out, names, seconds, num_threads):
    """A process that makes rows, each in so many seconds, once there is a file `OUT-go`."""
    arguments = [str(out), names, str(seconds), str(num_threads)]
    process = subprocess.Popen([sys.executable, "-c", PROCESS, *arguments], stdout=subprocess.DEVNULL, cwd=ROOT)
    wait_for(Path(f"{out}-ready-{num_threads}").exists)
    return process


def test_processes_and_threads_share_the_rows_of_a_folder(tmp_path):
    out = tmp_path / "out"
    others = [start(out, "".join(NAMES), 0.2, num_threads) for num_threads in (1, 2)]
    Path(f"{out}-go").touch()
    assert [other.wait(60) for other in others] == [0, 0]
    found = jsonl.read(out / "rows.jsonl")
    assert sorted(row["name"] for row in found) == list(NAMES)
    assert len({row["by"] for row in found}) == 2
    fill(out, lambda name, show: pytest.fail("made again"))
    assert not (out / "work").exists()


def test_the_row_of_a_killed_process_is_taken_over_with_its_work_and_that_of_a_live_one_is_left_alone(tmp_path):
    out = tmp_path / "out"
    Path(f"{out}-go").touch()
    other = start(out, "a", 600, 1)
    wait_for((out / "work" / "a" / "checkpoint").exists)
    assert fill(out, lambda name, show: pytest.fail("made twice"), names="a") is False  # there is no row to show yet
    assert fill(out, lambda name, show: row(name), names="ab") is True
    assert rows(out) == ["b"]
    assert "another process is at them: a" in (tmp_path / "console.txt").read_text()
    other.kill()
    other.wait(10)

    def resumed(name, show):
        assert (out / "work" / name / "checkpoint").read_text() == "half"
        return row(name)

    fill(out, resumed, names="ab")
    assert rows(out) == ["b", "a"]
    assert not (out / "work").exists()


def wait_for(ask):
    """Until it is so."""
    for _ in range(1200):
        if ask():
            return
        time.sleep(0.05)
    pytest.fail("never came")


def test_a_row_that_fails_ends_those_beside_it_and_loses_none_before_it(tmp_path):
    out = tmp_path / "out"

    def make(name, show):
        if name == "c":
            time.sleep(0.2)
            raise RuntimeError("diverged")
        if name == "d":
            for done in range(600):
                show("training")(done, 600, {})
                time.sleep(0.05)
            pytest.fail("went on")
        return row(name)

    with pytest.raises(RuntimeError, match="diverged"):
        fill(out, make, num_threads=2)
    assert {"a", "b"} <= set(rows(out)) <= set(NAMES) - {"c", "d"}
    assert {"c", "d"} <= {path.name for path in (out / "work").iterdir()}  # what they had is kept


def test_a_folder_is_claimed_by_one_and_free_again_afterwards(tmp_path):
    with claimed(tmp_path / "x") as first, claimed(tmp_path / "x") as second, claimed(tmp_path / "y") as another:
        assert (first, second, another) == (True, False, True)
    with claimed(tmp_path / "x") as again:
        assert again
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file cannot be claimed: it is a file"), claimed(tmp_path / "file"):
        pass


def test_a_folder_that_is_removed_while_others_wait_for_it_is_made_again(tmp_path):
    def claim_and_remove(check):
        had = 0
        for _ in range(300):
            with claimed(tmp_path / "work" / "x") as mine:
                if mine:
                    had += 1
                    with contextlib.suppress(FileNotFoundError):
                        shutil.rmtree(tmp_path / "work" / "x")
            with contextlib.suppress(OSError):
                (tmp_path / "work").rmdir()
        return had

    assert sum(parallel.run([claim_and_remove] * 4, num_threads=4)) > 0  # and nobody stumbled


def test_a_process_that_begins_in_the_same_moment_is_no_stranger(tmp_path):
    (tmp_path / "config.json.7.tmp").write_text("{")
    grid.require_same(tmp_path, {"x": 1})
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="must be an empty folder"):
        grid.require_same(tmp_path, {"x": 1})
