"""Every look at private data, written down before it happens; what was spent survives whatever comes after.

The file is JSON lines, one `Entry` each, only ever added to. A scope is a group of people whose privacy is one account:
the records of one silo, or the clients of a federation. Within a scope everything composes, over runs and mechanisms;
over disjoint silos the maximum counts. Where a round protects both levels, each silo noising its records' gradients and
the server the clipped updates, it is charged to both: the silos' scopes and the federation's, two guarantees told side
by side and never added, since they hide different things.

A caller charges, then looks. So a kill may leave a look charged that never happened (at most one block of steps), and
never the reverse. Done again after a restart, the same steps of the same run release the same bits and cost nothing
more; that needs the same data, seed, keys and code, which the run's name must stand for. Noise from system entropy
releases other bits: it needs a new run name at every start.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedrobust import check, intervals, jsonl
from fedrobust.privacy import accounting
from fedrobust.privacy.accounting import Event
from fedrobust.privacy.clipping import RELATIONS
from fedrobust.privacy.plan import UNITS


class Entry(NamedTuple):
    """One block of looks at the data of one scope.

    Attributes:
        scope: whose data: a silo's name, or a federation's.
        unit: "record" or "client"; one per scope.
        relation: one of `RELATIONS`; one per scope.
        mechanism: what is released: "gradient", "label counts", "mask scores", "calibration data", "tuning", ...
        run: names what, done again, releases the same bits.
        first_step: of the block, >= 0. A mechanism's steps in a scope are charged in order, from 0, without gaps; a
            new run may go on where another was left, or before, and pays for each of its own steps.
        num_steps: >= 1.
        event: what one step costs; None for a look without privacy.
    """

    scope: str
    unit: str
    relation: str
    mechanism: str
    run: str
    first_step: int
    num_steps: int
    event: Event | None

    @property
    def private(self) -> bool:
        """Whether the look is covered by the guarantee. One that is not is on record, and in no sum."""
        return self.event is not None


class Budget(NamedTuple):
    """What a scope may spend. Attributes: epsilon > 0; delta in (0, 1)."""

    epsilon: float
    delta: float


class Line(NamedTuple):
    """A scope's account. Attributes: what `summary` tells of it; `looks` are (mechanism, steps) without privacy."""

    scope: str
    unit: str
    relation: str
    epsilon: float
    delta: float
    mechanisms: tuple[tuple[str, int], ...]
    looks: tuple[tuple[str, int], ...]


def charge(path: Path | str, budget: Budget, entries: Sequence[Entry]) -> None:
    """Writes down what is about to be looked at, or refuses. Call it BEFORE looking, and look only if it returns.

    Steps that the ledger already holds cost nothing more and are not written again.

    Args:
        path: the ledger; made where missing.
        budget: of each scope that the entries name.
        entries: charged all or none.

    Raises:
        ValueError: a scope's budget would be exceeded; steps of a run that begin after the last one charged (the
            ledger of an earlier part of it is missing); other terms than those steps were charged at, or than the
            scope's; a bad entry; a damaged ledger. Nothing is written then.

    Guarantees:
        When it returns, the charge is on disk. One writer at a time, over threads and processes (see `jsonl.update`).
    """
    check.positive("budget.epsilon", budget.epsilon)
    check.fraction("budget.delta", budget.delta, zero=False, one=False)
    for entry in entries:
        _check(entry)

    def new(records: list[Any]) -> list[dict[str, Any]]:
        book = _book(path, records)
        num_held = len(book.entries)
        for entry in entries:
            _add(book, _not_yet_charged(book, entry))
        held, added = book.entries[:num_held], book.entries[num_held:]
        for scope in dict.fromkeys(entry.scope for entry in added if entry.private):
            _require_within(budget, scope, held, added)
        return [_record(entry) for entry in added]

    jsonl.update(path, new)


def read(path: Path | str) -> list[Entry]:
    """All entries, in the order they were charged; none where there is no file.

    Raises:
        ValueError: a line that is not JSON or no entry, or steps out of order: the sum would not be known.
    """
    return _book(path, jsonl.read(path)).entries


def spent(path: Path | str, scope: str, delta: float) -> float:
    """Epsilon at `delta` of everything a scope was charged, 0 for one that never was.

    Raises:
        ValueError: as `read`.
    """
    return _epsilon(_of(read(path), scope), delta)


def federation_spent(path: Path | str, scopes: Sequence[str], delta: float) -> float:
    """Epsilon at `delta` of a federation whose scopes are disjoint silos: the largest of theirs.

    A scope of client level is none of them: it is another unit's account, told beside this one.

    Raises:
        ValueError: no scope, scopes of other units than "record" or of different relations; as `read`.
    """
    check.require(len(scopes) > 0, "scopes", list(scopes), "at least one")
    entries = read(path)
    terms = sorted({(entry.unit, entry.relation) for entry in entries if entry.scope in scopes})
    check.require(len(terms) <= 1 and all(unit == "record" for unit, _ in terms), "scopes", terms, "records, one kind")
    return max(_epsilon(_of(entries, scope), delta) for scope in scopes)


def summary(path: Path | str, delta: float) -> list[Line]:
    """The account of every scope, in the order they first appear.

    Raises:
        ValueError: as `read`.
    """
    entries = read(path)
    lines = []
    for scope in dict.fromkeys(entry.scope for entry in entries):
        own = _of(entries, scope)
        steps: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        for entry in own:
            steps[entry.private][entry.mechanism] += entry.num_steps
        looks, mechanisms = (tuple(counted.items()) for counted in steps)
        lines.append(Line(scope, own[0].unit, own[0].relation, _epsilon(own, delta), delta, mechanisms, looks))
    return lines


def to_text(lines: Sequence[Line]) -> str:
    """A summary for people, one scope per line; epsilon in four digits, rounded up."""

    def listed(counted: Sequence[tuple[str, int]]) -> str:
        return ", ".join(f"{mechanism} x {steps}" for mechanism, steps in counted) or "none"

    return "\n".join(
        f"{line.scope}: epsilon {intervals.upper_text(line.epsilon, 4)}, "
        f"delta {line.delta:g} ({line.unit}, {line.relation}): "
        f"{listed(line.mechanisms)}; looks without privacy: {listed(line.looks)}"
        for line in lines
    )


def _of(entries: Sequence[Entry], scope: str) -> list[Entry]:
    return [entry for entry in entries if entry.scope == scope]


def _epsilon(entries: Sequence[Entry], delta: float, grid: float = accounting.GRID) -> float:
    """Epsilon of one scope's entries."""
    check.fraction("delta", delta, zero=False, one=False)
    steps: Counter[tuple[tuple[str, str, str], Event]] = Counter()
    for entry in entries:
        if entry.event is not None:
            place = _key(entry), entry.event  # each run apart: two runs of shuffled epochs do not share one
            if entry.event.sampling == "shuffle":
                steps[place] = entry.first_step  # all since its epochs began: where others came between, one may end
            steps[place] += entry.num_steps
    if not steps:
        return 0.0
    releases = [(event, count) for (_, event), count in steps.items()]
    accountant = accounting.accountant_for([event for event, _ in releases])
    return accounting.total_epsilon(
        releases, relation=entries[0].relation, delta=delta, accountant=accountant, grid=grid
    )


def _require_within(budget: Budget, scope: str, held: Sequence[Entry], added: Sequence[Entry]) -> None:
    every = _of([*held, *added], scope)
    if _epsilon(every, budget.delta, 10 * accounting.GRID) <= budget.epsilon:  # larger than the fine one, and faster
        return
    would_be = _epsilon(every, budget.delta)
    if not would_be <= budget.epsilon:
        so_far = _epsilon(_of(held, scope), budget.delta)
        raise ValueError(
            f"scope {scope!r} would spend epsilon {would_be:.4g} at delta {budget.delta:g}: must be within its budget "
            f"of {budget.epsilon:g}, of which {max(0.0, budget.epsilon - so_far):.4g} is left"
        )


class _Book(NamedTuple):
    """Entries in order; the first of each scope; those of each run; how far each mechanism's steps reach in a scope.

    So that reading takes a time proportional to the number of lines.
    """

    entries: list[Entry]
    scopes: dict[str, Entry]
    runs: dict[tuple[str, str, str], list[Entry]]
    reach: dict[tuple[str, str], int]


def _add(book: _Book, entry: Entry | None) -> None:
    if entry is not None:
        book.entries.append(entry)
        book.scopes.setdefault(entry.scope, entry)
        book.runs.setdefault(_key(entry), []).append(entry)
        place = entry.scope, entry.mechanism
        book.reach[place] = max(book.reach.get(place, 0), _end(entry))


def _not_yet_charged(book: _Book, entry: Entry) -> Entry | None:
    """The steps of an entry that the ledger does not hold yet; None where it holds all."""
    first = book.scopes.get(entry.scope, entry)
    for name in ("unit", "relation"):
        value, allowed = getattr(entry, name), getattr(first, name)
        check.require(value == allowed, f"{name} of scope {entry.scope!r}", value, f"{allowed!r}, as before")
    own = book.runs.get(_key(entry), [])
    end = _end(own[-1]) if own else entry.first_step
    low = own[0].first_step if own else 0
    high = end if own else book.reach.get((entry.scope, entry.mechanism), 0)
    name = f"first_step of {entry.mechanism!r} of run {entry.run!r} in scope {entry.scope!r}"
    check.require(low <= entry.first_step <= high, name, entry.first_step, f"in [{low}, {high}] after what was charged")
    for other in itertools.takewhile(lambda other: _end(other) > entry.first_step, reversed(own)):
        if other.first_step < _end(entry) and other.event != entry.event:
            raise ValueError(f"event of {entry.mechanism!r} of run {entry.run!r} is {entry.event}: was {other.event}")
    left = _end(entry) - end
    return entry._replace(first_step=end, num_steps=left) if left > 0 else None


def _key(entry: Entry) -> tuple[str, str, str]:
    return entry.scope, entry.run, entry.mechanism


def _end(entry: Entry) -> int:
    """The first step after an entry's."""
    return entry.first_step + entry.num_steps


def _check(entry: Entry) -> None:
    for name in ("scope", "mechanism", "run"):
        value = getattr(entry, name)
        check.require(isinstance(value, str) and value != "", name, value, "a name")
    check.one_of("unit", entry.unit, UNITS)
    check.one_of("relation", entry.relation, RELATIONS)
    check.at_least("first_step", entry.first_step, 0)
    check.at_least("num_steps", entry.num_steps, 1)
    if entry.event is not None:
        accounting.check_event(entry.event)


def _record(entry: Entry) -> dict[str, Any]:
    event = None if entry.event is None else entry.event._asdict()
    return entry._asdict() | {"event": event, "private": entry.private}


def _book(path: Path | str, records: Sequence[Any]) -> _Book:
    """What a file's lines say; a line that does not fit ends it, for a sum without it would be too small."""
    book = _Book([], {}, {}, {})
    for number, record in enumerate(records, start=1):
        try:
            entry = _entry(record)
            if _not_yet_charged(book, entry) != entry:
                raise ValueError("its steps stand before")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"line {number} of {path} does not fit into a ledger: {error}") from None
        _add(book, entry)
    return book


def _entry(record: Any) -> Entry:
    if not isinstance(record, dict) or set(record) != {*Entry._fields, "private"}:
        raise ValueError("other fields than an entry's")
    private, event = record["private"], record["event"]
    if event is not None:
        if not isinstance(event, dict) or set(event) != set(Event._fields):
            raise ValueError("other fields than an event's")
        event = Event(**event)
    entry = Entry(**{name: record[name] for name in Entry._fields} | {"event": event})
    _check(entry)
    if private is not entry.private:
        raise ValueError("private says otherwise than the event")
    return entry
