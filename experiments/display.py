"""The live progress of a study."""

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Display:
    """A bar for the rows of a study and one for the rounds of the phase under way."""

    def __init__(self, console: Console, num_rows: int, num_done: int) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._rows = self._progress.add_task("rows", total=num_rows, completed=num_done, figures="")
        self._phase = self._progress.add_task("", total=1, figures="", visible=False)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def row(self, name: str) -> Callable[[str], Callable[[int, int, dict[str, float]], None]]:
        """For one row: a function from the name of a phase to what that phase calls after every round."""

        def phase(title: str) -> Callable[[int, int, dict[str, float]], None]:
            self._progress.reset(self._phase, description=f"{name}: {title}", figures="", visible=True)

            def report(done: int, total: int, figures: dict[str, float]) -> None:
                if figures:
                    text = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
                    self._progress.update(self._phase, figures=text)
                self._progress.update(self._phase, completed=done, total=total)

            return report

        return phase

    def advance(self) -> None:
        """One more row is done."""
        self._progress.advance(self._rows)
