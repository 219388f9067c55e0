"""Who takes part in a round, and with which batches: pure functions of (seed, round).

Every draw has its own generator, seeded by (seed, purpose, round, client), so the batches of a client do not depend
on who else takes part. Shapes are fixed before the first round: one compilation serves them all.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fedrobust import check
from fedrobust.types import Batch, Cohort, Dataset

TAIL = 1e-12
"""Bound on the probability that a Poisson draw does not fit. Not 1e-9: delta pays (1 + e^epsilon) times it per draw,
which at epsilon 8 and 1 000 draws is 3e-3 for 1e-9 and 3e-6 for 1e-12, and the capacity grows by a tenth only."""

_CLIENTS, _SHUFFLE, _POISSON = range(3)


@dataclass(frozen=True)
class CohortSettings:
    """How clients and examples are sampled. Nothing here has a default that decides privacy.

    Attributes:
        num_steps: S >= 1, the batches of one client in one round.
        client_sampling: "all"; "fixed": `num_clients` of them without replacement; "poisson": each one independently
            with probability `client_rate`.
        batch_sampling: "shuffle": each client goes through its own examples in shuffled epochs, `batch_size` at a
            time, at most one epoch per round (further batches are empty); "poisson": at each step every example of
            the client is in the batch independently with probability `batch_rate`.
        num_clients: for "fixed", in [1, number of clients].
        client_rate: for "poisson", in (0, 1].
        batch_size: for "shuffle", >= 1.
        batch_rate: for "poisson", in (0, 1].
        weighting: "equal": every weight is 1; "examples": a client's number of examples over the largest client's.
    """

    num_steps: int
    client_sampling: Literal["all", "fixed", "poisson"]
    batch_sampling: Literal["shuffle", "poisson"]
    num_clients: int | None = None
    client_rate: float | None = None
    batch_size: int | None = None
    batch_rate: float | None = None
    weighting: Literal["equal", "examples"] = "examples"


class CohortShape(NamedTuple):
    """The fixed sizes of every cohort, and what fixing them costs.

    Where a Poisson draw exceeds its capacity, the surplus is left out. The batches then differ from true Poisson
    sampling with probability `batch_tail` each: R rounds of S batches turn (epsilon, delta) into
    (epsilon, delta + (1 + e^epsilon) * R * S * batch_tail), and likewise `client_tail` per round at the client level.

    Attributes:
        num_clients: K, the rows of a cohort, present and absent.
        num_steps: S.
        batch_size: B, real and padded examples.
        client_tail: the probability that a round draws more than K clients.
        batch_tail: the largest probability, over clients, that a batch draws more than B examples.
    """

    num_clients: int
    num_steps: int
    batch_size: int
    client_tail: float
    batch_tail: float


def cohort_shape(settings: CohortSettings, num_examples: Sequence[int]) -> CohortShape:
    """The shape of every cohort under these settings.

    Args:
        settings: see `CohortSettings`.
        num_examples: of each client, > 0.

    Returns:
        The shape. Poisson capacities are the smallest with a tail probability of at most `TAIL`; B is then rounded up
        to a multiple of 8.

    Raises:
        ValueError: a setting is out of range, missing for the sampling chosen, or given for one that is not.
    """
    _check(settings, num_examples)
    num_clients, client_tail = settings.num_clients or len(num_examples), 0.0
    if settings.client_rate is not None:
        num_clients, client_tail = _capacity(len(num_examples), settings.client_rate, 1)
    batch_size, batch_tail = settings.batch_size or 0, 0.0
    if settings.batch_rate is not None:
        batch_size, batch_tail = _capacity(max(num_examples), settings.batch_rate, 8)
    return CohortShape(num_clients, settings.num_steps, batch_size, client_tail, batch_tail)


def make_cohorts(
    dataset: Dataset,
    parts: Sequence[np.ndarray],
    settings: CohortSettings,
    *,
    seed: int,
    malicious: Collection[int] = (),
) -> Callable[[int], Cohort]:
    """Builds `round -> Cohort`.

    Args:
        dataset: the examples of all clients.
        parts: for each client the indices of its examples; a client's id is its place here.
        settings: see `CohortSettings`.
        seed: >= 0.
        malicious: the ids of the clients that an attack controls.

    Returns:
        A pure function from the round, >= 0, to a `Cohort` of NumPy arrays, of the same shapes in every round. Present
        clients come first, in order of id; in a batch real examples come first. Absent clients have weight 0, an id
        that no client has (so that `.at[id].set` skips them), and padding is zero.

    Raises:
        ValueError: as `cohort_shape`; an empty part; an index or an id that does not exist.
    """
    num_examples = [len(part) for part in parts]
    shape = cohort_shape(settings, num_examples)
    check.at_least("seed", seed, 0)
    parts = [np.asarray(part) for part in parts]
    for index in (min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)):
        check.require(0 <= index < len(dataset.label), "parts", index, f"indices in [0, {len(dataset.label)})")
    for client in malicious:
        check.require(client in range(len(parts)), "malicious", client, f"client ids below {len(parts)}")
    share = np.ones(len(parts)) if settings.weighting == "equal" else np.array(num_examples) / max(num_examples)
    is_malicious = np.isin(np.arange(len(parts)), list(malicious))

    def cohort(round: int) -> Cohort:
        present = _draw_clients(settings, shape, len(parts), seed, round)
        index = np.zeros((shape.num_clients, shape.num_steps, shape.batch_size), np.int64)
        mask = np.zeros(index.shape, bool)
        for row, client in enumerate(present):
            for step, drawn in enumerate(_draw_batches(settings, shape, len(parts[client]), seed, round, int(client))):
                index[row, step, : len(drawn)] = parts[client][drawn]
                mask[row, step, : len(drawn)] = True
        absent = shape.num_clients - len(present)
        # `Any`, because the shared tuples are declared for the device and filled here on the host.
        image: Any = np.where(mask[..., None, None, None], dataset.image[index], np.float32(0))
        label: Any = np.where(mask, dataset.label[index], 0).astype(np.int32)
        real: Any = mask
        ids: Any = np.concatenate([present, len(parts) + np.arange(absent)]).astype(np.int32)
        weight: Any = np.pad(share[present], (0, absent)).astype(np.float32)
        controlled: Any = np.pad(is_malicious[present], (0, absent))
        return Cohort(ids, weight, controlled, Batch(image, label, real))

    return cohort


def _draw_clients(settings: CohortSettings, shape: CohortShape, total: int, seed: int, round: int) -> np.ndarray:
    """The sorted ids of the clients of one round."""
    rng = np.random.default_rng([seed, _CLIENTS, round])
    if settings.client_rate is not None:
        return np.flatnonzero(rng.random(total) < settings.client_rate)[: shape.num_clients]
    return np.sort(rng.choice(total, shape.num_clients, replace=False))


def _draw_batches(
    settings: CohortSettings, shape: CohortShape, num: int, seed: int, round: int, client: int
) -> list[np.ndarray]:
    """For each step the places, within the client's own examples, of its batch."""
    if settings.batch_rate is not None:
        rng = np.random.default_rng([seed, _POISSON, round, client])
        drawn = rng.random((shape.num_steps, num)) < settings.batch_rate
        return [np.flatnonzero(row)[: shape.batch_size] for row in drawn]
    # The batches of all epochs form one stream; a round takes the next ones, but never more than an epoch holds.
    per_epoch = -(-num // shape.batch_size)
    taken = min(shape.num_steps, per_epoch)
    batches = []
    for place in range(round * taken, (round + 1) * taken):
        epoch, slot = divmod(place, per_epoch)
        order = np.random.default_rng([seed, _SHUFFLE, epoch, client]).permutation(num)
        batches.append(order[slot * shape.batch_size : (slot + 1) * shape.batch_size])
    return batches


def _capacity(num: int, rate: float, multiple: int) -> tuple[int, float]:
    """The smallest multiple that Binomial(num, rate) exceeds with probability `TAIL` at most, and that probability."""
    from scipy.stats import binom  # takes half a second to import

    capacity = -(-max(1, int(binom.isf(TAIL, num, rate))) // multiple) * multiple
    return capacity, float(binom.sf(capacity, num, rate))


def _check(settings: CohortSettings, num_examples: Sequence[int]) -> None:
    check.at_least("num_steps", settings.num_steps, 1)
    check.one_of("client_sampling", settings.client_sampling, ("all", "fixed", "poisson"))
    check.one_of("batch_sampling", settings.batch_sampling, ("shuffle", "poisson"))
    check.one_of("weighting", settings.weighting, ("equal", "examples"))
    total = len(num_examples)
    check.require(total > 0 and min(num_examples) > 0, "num_examples", list(num_examples), "at least 1 for each client")
    for name, sampling, chosen in (
        ("num_clients", settings.client_sampling, "fixed"),
        ("client_rate", settings.client_sampling, "poisson"),
        ("batch_size", settings.batch_sampling, "shuffle"),
        ("batch_rate", settings.batch_sampling, "poisson"),
    ):
        value = getattr(settings, name)
        if sampling != chosen:
            check.require(value is None, name, value, f"None unless the sampling is {chosen!r}")
            continue
        check.require(value is not None, name, value, f"given when the sampling is {chosen!r}")
        if chosen == "poisson":
            check.fraction(name, value, zero=False)
        else:
            check.at_least(name, value, 1)
            check.require(name == "batch_size" or value <= total, name, value, f"<= the number of clients, {total}")
