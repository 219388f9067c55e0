"""Files that are there whole or not at all, what tells them apart, and folders that one process has to itself."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no file locks on Windows
    fcntl = None  # type: ignore[assignment]


def write_text(path: Path, text: str) -> None:
    """Writes to a temporary name in the same folder, then renames."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def digest(path: Path) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether nobody else, thread or process, has the folder; if so nobody gets it while the context lasts.

    The folder is made where missing, and may be removed by whoever has it. A claim ends with its process, however that
    ends. Where the system has no file locks everybody gets it.
    """
    handle = _opened(folder)
    try:
        yield handle is None or _locked(handle)
    finally:
        if handle is not None:
            os.close(handle)


def _opened(folder: Path) -> int | None:
    for _ in range(1000):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # whoever had it removes it at this very moment
            folder.mkdir(parents=True, exist_ok=True)
            return None if fcntl is None else os.open(folder, os.O_RDONLY)
    raise OSError(f"{folder} cannot be claimed: it is a file, or somebody keeps removing it")


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
