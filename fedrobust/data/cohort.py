"""Who takes part in a round, and with which batches: pure functions of (seed, round).

How batches of private trainings are drawn is for their privacy plan to say, whose `sampler` comes in as an argument.
Every draw has its own generator, seeded by (seed, purpose, round, client), so the batches of a client do not depend
on who else takes part. Shapes are fixed before the first round: one compilation serves them all.
"""

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from fedrobust import check
from fedrobust.types import Batch, Cohort, Dataset, Sampler

_CLIENTS, _SHUFFLE, _BATCHES = range(3)


@dataclass(frozen=True)
class CohortSettings:
    """How clients and examples are sampled. Nothing here has a default that decides privacy.

    Attributes:
        num_steps: S >= 1, the batches of one client in one round.
        client_sampling: "all"; "fixed": `num_clients` of them without replacement; "sampler": as the client sampler
            draws.
        batch_sampling: "shuffle": each client goes through its own examples in shuffled epochs, `batch_size` at a
            time, at most one epoch per round (further batches are empty); "sampler": each step's batch is drawn by
            the client's sampler.
        num_clients: for "fixed", in [1, number of clients].
        batch_size: for "shuffle", >= 1.
        weighting: "equal": every weight is 1; "examples": a client's number of examples over the largest client's.
    """

    num_steps: int
    client_sampling: Literal["all", "fixed", "sampler"]
    batch_sampling: Literal["shuffle", "sampler"]
    num_clients: int | None = None
    batch_size: int | None = None
    weighting: Literal["equal", "examples"] = "examples"


def make_cohorts(
    dataset: Dataset,
    parts: Sequence[np.ndarray],
    settings: CohortSettings,
    *,
    seed: int | None,
    batch_sampler: Sampler | Sequence[Sampler] | None = None,
    client_sampler: Sampler | None = None,
    malicious: Collection[int] = (),
) -> Callable[[int], Cohort]:
    """Builds `round -> Cohort`.

    Args:
        dataset: the examples of all clients.
        parts: for each client the indices of its examples; a client's id is its place here.
        settings: see `CohortSettings`.
        seed: >= 0. None takes one from the operating system, for deployment: who is sampled is then nobody's to know,
            the batches cannot be made again, and a run that is resumed is another run to a ledger.
        batch_sampler: for "sampler": of every client, or one for each.
        client_sampler: for "sampler".
        malicious: the ids of the clients that an attack controls.

    Returns:
        A pure function from the round, >= 0, to a `Cohort` of NumPy arrays, of the same shapes in every round. Present
        clients come first, in order of id; in a batch real examples come first. Absent clients have weight 0, an id
        that no client has (so that `.at[id].set` skips them), and padding is zero.

    Raises:
        ValueError: a setting is out of range, missing for the sampling chosen, or given for one that is not; a
            sampler for another number of examples or clients; an empty part; an index or an id that does not exist; an
            index that is held twice, whose record would count twice against its guarantee.
    """
    num_examples = [len(part) for part in parts]
    one = batch_sampler is None or isinstance(batch_sampler, Sampler)
    samplers: list[Any] = [batch_sampler] * len(parts) if one else list(cast(Sequence[Sampler], batch_sampler))
    _check(settings, num_examples, samplers, client_sampler)
    seed = secrets.randbits(128) if seed is None else seed
    check.at_least("seed", seed, 0)
    num_clients = settings.num_clients or (len(parts) if client_sampler is None else client_sampler.capacity)
    batch_size = settings.batch_size or max(sampler.capacity for sampler in samplers)
    parts = [np.asarray(part) for part in parts]
    for index in (min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)):
        check.require(0 <= index < len(dataset.label), "parts", index, f"indices in [0, {len(dataset.label)})")
    held, times = np.unique(np.concatenate(parts), return_counts=True)
    if times.max() > 1:
        raise ValueError(
            f"parts hold index {held[times.argmax()]} {times.max()} times: each record is of one client, once"
        )
    for client in malicious:
        check.require(client in range(len(parts)), "malicious", client, f"client ids below {len(parts)}")
    share = np.ones(len(parts)) if settings.weighting == "equal" else np.array(num_examples) / max(num_examples)
    is_malicious = np.isin(np.arange(len(parts)), list(malicious))

    def cohort(round: int) -> Cohort:
        present = _draw_clients(client_sampler, num_clients, len(parts), [seed, _CLIENTS, round])
        index = np.zeros((num_clients, settings.num_steps, batch_size), np.int64)
        mask = np.zeros(index.shape, bool)
        for row, client in enumerate(present):
            batches = _draw_batches(settings, samplers[client], len(parts[client]), seed, round, int(client))
            for step, drawn in enumerate(batches):
                index[row, step, : len(drawn)] = parts[client][drawn]
                mask[row, step, : len(drawn)] = True
        absent = num_clients - len(present)
        # `Any`, because the shared tuples are declared for the device and filled here on the host.
        image: Any = np.where(mask[..., None, None, None], dataset.image[index], np.float32(0))
        label: Any = np.where(mask, dataset.label[index], 0).astype(np.int32)
        real: Any = mask
        ids: Any = np.concatenate([present, len(parts) + np.arange(absent)]).astype(np.int32)
        weight: Any = np.pad(share[present], (0, absent)).astype(np.float32)
        controlled: Any = np.pad(is_malicious[present], (0, absent))
        return Cohort(ids, weight, controlled, Batch(image, label, real))

    return cohort


def _draw_clients(sampler: Sampler | None, num_clients: int, total: int, stream: list[int]) -> np.ndarray:
    """The sorted ids of the clients of one round."""
    rng = np.random.default_rng(stream)
    if sampler is not None:
        return sampler.draw(rng, total)
    return np.sort(rng.choice(total, num_clients, replace=False))


def _draw_batches(
    settings: CohortSettings, sampler: Sampler | None, num: int, seed: int, round: int, client: int
) -> list[np.ndarray]:
    """For each step the places, within the client's own examples, of its batch."""
    if sampler is not None:
        rng = np.random.default_rng([seed, _BATCHES, round, client])
        return [sampler.draw(rng, num) for _ in range(settings.num_steps)]
    # The batches of all epochs form one stream; a round takes the next ones, but never more than an epoch holds.
    assert settings.batch_size is not None
    per_epoch = -(-num // settings.batch_size)
    taken = min(settings.num_steps, per_epoch)
    batches = []
    for place in range(round * taken, (round + 1) * taken):
        epoch, slot = divmod(place, per_epoch)
        order = np.random.default_rng([seed, _SHUFFLE, epoch, client]).permutation(num)
        batches.append(order[slot * settings.batch_size : (slot + 1) * settings.batch_size])
    return batches


def _check(
    settings: CohortSettings,
    num_examples: Sequence[int],
    batch_samplers: Sequence[Sampler | None],
    client_sampler: Sampler | None,
) -> None:
    check.at_least("num_steps", settings.num_steps, 1)
    check.one_of("client_sampling", settings.client_sampling, ("all", "fixed", "sampler"))
    check.one_of("batch_sampling", settings.batch_sampling, ("shuffle", "sampler"))
    check.one_of("weighting", settings.weighting, ("equal", "examples"))
    total = len(num_examples)
    check.require(total > 0 and min(num_examples) > 0, "num_examples", list(num_examples), "at least 1 for each client")
    check.require(len(batch_samplers) == total, "batch_sampler", len(batch_samplers), f"one, or {total}")
    for name, value, sampling, chosen in (
        ("num_clients", settings.num_clients, settings.client_sampling, "fixed"),
        ("client_sampler", client_sampler, settings.client_sampling, "sampler"),
        ("batch_size", settings.batch_size, settings.batch_sampling, "shuffle"),
        *(("batch_sampler", sampler, settings.batch_sampling, "sampler") for sampler in batch_samplers),
    ):
        wanted = "given" if sampling == chosen else "None"
        check.require((value is None) == (sampling != chosen), name, value, f"{wanted} for sampling {sampling!r}")
        if isinstance(value, int):
            check.at_least(name, value, 1)
            check.require(name == "batch_size" or value <= total, name, value, f"<= the number of clients, {total}")
    _check_sizes("client_sampler", client_sampler, total)
    for sampler, num in zip(batch_samplers, num_examples, strict=True):
        _check_sizes("batch_sampler", sampler, num)


def _check_sizes(name: str, sampler: Sampler | None, num: int) -> None:
    """A sampler was made, and accounted for, for certain sizes of what it draws from."""
    if sampler is not None:
        low, high = sampler.sizes[0], sampler.sizes[-1]
        check.require(num in sampler.sizes, f"{name}, drawing from", num, f"in [{low}, {high}], what it was made for")
