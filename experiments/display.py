"""The live progress of a study."""

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import (
    Progress as Bars,
)

Progress = Callable[[int, int, dict[str, float]], None]
"""`(done, in all, figures)`, called after every round."""
Show = Callable[[str], Progress]
"""From the name of a phase of a row to its progress."""


class Display:
    """A bar for the rows of a study and one for every phase under way; phases may report from several threads."""

    def __init__(self, console: Console, num_rows: int) -> None:
        self._progress = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._rows = self._progress.add_task("rows", total=num_rows, figures="")
        self._phases: dict[str, list[TaskID]] = {}

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def row(self, name: str) -> Show:
        """The progress of one row."""

        def phase(title: str) -> Progress:
            task = self._progress.add_task(f"{name}: {title}", total=None, figures="")
            self._phases.setdefault(name, []).append(task)

            def report(done: int, total: int, figures: dict[str, float]) -> None:
                if figures:
                    text = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
                    self._progress.update(task, figures=text)
                self._progress.update(task, completed=done, total=total)

            return report

        return phase

    def done(self, name: str) -> None:
        """A row is there."""
        for task in self._phases.pop(name, ()):
            self._progress.remove_task(task)
        self._progress.advance(self._rows)
