"""The rows of a study, made one after the other until none is missing.

Several processes may be given the same command: each takes rows that nobody else is at, and one that was killed leaves
its row, with its checkpoints, to whoever comes next.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import parallel
from experiments.display import Display, Progress, Show
from experiments.files import claimed, write_text
from experiments.parallel import Check
from fedrobust import reporting

Row = dict[str, Any]


def require_same(out: Path, config: Mapping[str, Any]) -> None:
    """Refuses a folder whose rows came from other settings.

    Raises:
        ValueError: one line that names the settings.
    """
    path = out / "config.json"
    if not path.exists():
        if out.exists() and any(other.suffix != ".tmp" for other in out.iterdir()):  # another process begins as well
            raise ValueError(f"--out is {out}: must be an empty folder, a new one, or one of this study")
        return
    other = json.loads(path.read_text())
    differing = sorted(k for k in config.keys() | other.keys() if config.get(k) != other.get(k))
    if differing:
        raise ValueError(f"--out is {out}: it holds rows with another {', '.join(differing)}; must be another folder")


def fill(
    out: Path,
    config: Mapping[str, Any],
    cases: Mapping[str, Callable[[Show], Row]],
    name_of: Callable[[Row], str],
    console: Console,
    *,
    fields: Mapping[str, tuple[str, ...]] = reporting.FIELDS,
    num_threads: int = 1,
) -> bool:
    """Makes the rows that a folder lacks.

    Args:
        out: the folder, made if it is not there; ask `require_same` before. Rows go into `rows.jsonl`, `config` into
            `config.json`; what a case needs until its row is safe belongs into `work/NAME`, which is removed then.
        config: the settings that all rows share, in plain JSON values.
        cases: name -> what makes its row.
        name_of: the name of a finished row.
        console: where progress is shown.
        fields: what a row must have.
        num_threads: how many rows this process makes at the same time, >= 1.

    Returns:
        Whether the folder holds a row now; others may still be another process's.

    Raises:
        Exception: what a case raises; rows finished before are kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    elsewhere: list[str] = []
    with Display(console, len(cases)) as display:

        def make(name: str, check: Check) -> None:
            work = out / "work" / name
            with claimed(work) as mine:
                if not mine:
                    elsewhere.append(name)
                    return
                if name not in map(name_of, reporting.read(out / "rows.jsonl")):
                    row = cases[name](stopping(check, display.row(name)))
                    reporting.append(out / "rows.jsonl", row, fields=fields)
                with contextlib.suppress(FileNotFoundError):  # whoever made the row a moment ago did so too
                    shutil.rmtree(work)  # only now that the row is safe
            display.done(name)

        tasks = [lambda check, name=name: make(name, check) for name in cases]
        parallel.run(tasks, num_threads=num_threads)
    with contextlib.suppress(OSError):  # it may hold the checkpoints of rows that were not asked for this time
        (out / "work").rmdir()
    if elsewhere:
        console.print(f"not in the table yet, another process is at them: {', '.join(elsewhere)}")
    return len(reporting.read(out / "rows.jsonl")) > 0


def write_table(out: Path, name: str, table: reporting.Table, console: Console) -> None:
    """Shows a table and writes it as `NAME.md` and `NAME.tex`."""
    console.print(reporting.screen(table))
    write_text(out / f"{name}.md", reporting.markdown(table))
    write_text(out / f"{name}.tex", reporting.latex(table))


def stopping(check: Check, show: Show) -> Show:
    """Progress that ends what another task's failure has made useless."""

    def phase(title: str) -> Progress:
        report = show(title)

        def report_or_stop(done: int, total: int, figures: dict[str, float]) -> None:
            check()
            report(done, total, figures)

        return report_or_stop

    return phase
