"""Source text of the library or of the trainer with one passage replaced, imported in place of the right one."""

import contextlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).parent


class Bug(NamedTuple):
    """A mistake that has been made in private training.

    Attributes:
        name: what is wrong.
        law: the law that it breaks.
        module: "trainer", or a module of the library.
        old: a passage that stands in its source exactly once.
        new: what stands there instead.
    """

    name: str
    law: str
    module: str
    old: str
    new: str


class _Patching(importlib.machinery.SourceFileLoader):
    """Loads a module's source with one passage replaced."""

    bug: Bug

    def get_data(self, path: str) -> bytes:
        return replaced(super().get_data(path).decode(), self.bug).encode() if path.endswith(".py") else b""

    def get_code(self, fullname: str) -> object:  # never the cached byte code
        path = self.get_filename(fullname)
        return compile(self.get_data(path), path, "exec")


class _Finder:
    def __init__(self, bug: Bug) -> None:
        self.bug = bug

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name != self.bug.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader = _Patching(name, spec.origin)
        loader.bug = self.bug
        return importlib.util.spec_from_file_location(name, spec.origin, loader=loader)


def replaced(source: str, bug: Bug) -> str:
    """The source with the bug in it.

    Raises:
        LookupError: the passage is not there exactly once: the code has moved on and the bug must follow.
    """
    if source.count(bug.old) != 1:
        raise LookupError(f"{bug.name}: {source.count(bug.old)} times in {bug.module}: {bug.old}")
    return source.replace(bug.old, bug.new)


def trainer(bug: Bug | None = None) -> ModuleType:
    """The trainer as a new module, with the bug if it is one of the trainer's."""
    path = HERE / "trainer.py"
    source = path.read_text()
    if bug is not None and bug.module == "trainer":
        source = replaced(source, bug)
    module = ModuleType("trainer")
    exec(compile(source, str(path), "exec"), vars(module))
    return module


@contextlib.contextmanager
def patched(bug: Bug) -> Iterator[ModuleType]:
    """The trainer on a library that has the bug; afterwards everybody else sees the right library again."""
    if bug.module == "trainer":
        yield trainer(bug)
        return
    right = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "fedrobust"}
    for name in right:
        del sys.modules[name]
    finder = _Finder(bug)
    sys.meta_path.insert(0, finder)
    try:
        yield trainer()
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "fedrobust"]:
            del sys.modules[name]
        sys.modules.update(right)
