"""Lines of JSON on disk: never half there, never lost once written."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

try:
    import fcntl
except ImportError:  # no file locks on Windows
    fcntl = None  # type: ignore[assignment]


def append(path: Path | str, records: Sequence[Mapping[str, Any]]) -> None:
    """Adds lines to a file so that they survive the process being killed at any moment after the call returns.

    A line torn by an earlier kill is removed first.

    Args:
        path: the file; it and its folder are made where missing.
        records: NumPy values become plain ones, numbers that are not finite become None.
    """
    update(path, lambda _: records, parsed=False)


def update(path: Path | str, new: Callable[[list[Any]], Sequence[Mapping[str, Any]]], *, parsed: bool = True) -> None:
    """Adds to a file what follows from what it holds, with no other writer in between.

    One writer at a time, over threads and processes, where the system has file locks (not on Windows: there callers
    must see to it).

    Args:
        path: as for `append`.
        new: from all complete lines to the lines to add; whatever it raises, nothing is written.
        parsed: False gives it none of them, and does not read them.

    Raises:
        ValueError: a complete line that is not JSON.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file, _locked(file):
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        records = new(_parse(path, content[:whole]) if parsed else [])
        lines = "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records)
        if not lines:
            return
        file.truncate(whole)
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)  # every time: who made the file may have added nothing, or been killed before this line


def read(path: Path | str) -> list[Any]:
    """All complete lines of a file, in the order they were added; none where there is no file.

    Raises:
        ValueError: a complete line that is not JSON, by its number.
    """
    path = Path(path)
    if not path.exists():
        return []
    complete, end, _ = path.read_bytes().rpartition(b"\n")  # what follows the last line end was torn by a kill
    return _parse(path, complete + end)


def plain(value: Any) -> Any:
    """The same value in what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(path: Path, content: bytes) -> list[Any]:
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from None
    return records


@contextlib.contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """Keeps every other writer of the file out; the lock ends with the process, however it ends."""
    if fcntl is None:
        yield
        return
    fcntl.flock(file.fileno(), fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name as lasting as its content."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
