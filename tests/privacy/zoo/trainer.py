"""The right trainer: a small private federation put together as the README does it.

The laws look at it from outside, through the names of this module; the bugs are patches to it and to the library.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedrobust import attacks, data, defenses, federated, keys, losses, privacy
from fedrobust.types import Aggregator, Batch, Dataset

NUM_SILOS, NUM_RECORDS, NUM_CLASSES, HIDDEN = 4, 40, 3, 600
SAMPLING_RATE, LOCAL_STEPS, NUM_ROUNDS = 0.25, 2, 6
CLIP_NORM, EPSILON, DELTA, HISTOGRAM_EPSILON = 6.0, 6.0, 1e-3, 0.5
CLIENT_CLIP_NORM, NUM_CLIENTS, COUNT_NOISE = 0.8, 8, 0.7


def apply(params: Any, image: jax.Array) -> jax.Array:
    """Two dense layers."""
    x = image.reshape(len(image), -1)
    x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def init(seed: int) -> Any:
    """Parameters of a size at which some gradients are longer than the clip norm and some are not."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(scale=shape[0] ** -0.5, size=shape).astype(np.float32)  # noqa: E731
    hidden = {"kernel": draw(4, HIDDEN), "bias": draw(HIDDEN)}
    return {"hidden": hidden, "head": {"kernel": draw(HIDDEN, NUM_CLASSES), "bias": np.zeros(NUM_CLASSES, np.float32)}}


def attack(key: jax.Array, logits_fn: Any, image: jax.Array, label: jax.Array) -> jax.Array:
    """FGSM, inside the loss."""
    return attacks.fgsm(norm="linf", eps=0.1)(key, logits_fn, image, label)


def views(key: jax.Array, image: jax.Array) -> jax.Array:
    """Two views of every record: as it is, and mirrored."""
    del key
    return jnp.stack([image, image[:, :, ::-1]], axis=1)


@functools.cache
def make_loss() -> Any:
    """Cross-entropy of adversarial samples of two views."""
    loss = defenses.adversarial_loss(losses.cross_entropy(apply), apply, attack, clean_share=0.3)
    return losses.mean_over_views(loss, views)


def rows(records: Dataset) -> Dataset:
    """What batches are drawn from: one row for one record."""
    return records


def records(seed: int) -> Dataset:
    """All silos' records; the top left pixel tells them apart."""
    rng = np.random.default_rng(seed)
    total = NUM_SILOS * NUM_RECORDS
    image = rng.uniform(size=(total, 2, 2, 1)).astype(np.float32)
    image[:, 0, 0, 0] = np.arange(total) / total
    return Dataset(image, rng.integers(0, NUM_CLASSES, total).astype(np.int32), NUM_CLASSES)


def parts() -> list[np.ndarray]:
    """Each silo's places in `records`."""
    return np.split(np.arange(NUM_SILOS * NUM_RECORDS), NUM_SILOS)


@functools.cache
def plan() -> privacy.Plan:
    """Every silo's budget, over all steps of all rounds."""
    return privacy.make_plan(
        unit="record",
        relation="add_or_remove_one",
        sampling="poisson",
        epsilon=EPSILON,
        delta=DELTA,
        sampling_rate=SAMPLING_RATE,
        num_steps=NUM_ROUNDS * LOCAL_STEPS,
        num_units=NUM_RECORDS,
        histogram_epsilon=HISTOGRAM_EPSILON,
    )


@functools.cache
def clipped() -> privacy.ClippedGrad:
    """The clipped sum of a batch."""
    return privacy.clipped_grad(make_loss(), clip_norm=CLIP_NORM)


@functools.cache
def clipped_by(method: str, microbatch_size: int | None, groups: Any = None) -> privacy.ClippedGrad:
    """The same sum, computed or grouped in another way."""
    return privacy.clipped_grad(
        make_loss(), clip_norm=CLIP_NORM, method=method, microbatch_size=microbatch_size, groups=groups
    )


@functools.cache
def share_of_grad() -> Any:
    """One step's gradient with a silo's share of the noise."""
    return privacy.private_grad(clipped(), plan(), num_records=NUM_RECORDS, num_shares=NUM_SILOS)


@functools.cache
def grad() -> Any:
    """One step's released gradient."""
    return privacy.private_grad(clipped(), plan(), num_records=NUM_RECORDS)


def cohorts(seed: int) -> Any:
    """The batches of every round: every silo in every round, sampled as planned."""
    settings = data.CohortSettings(
        num_steps=LOCAL_STEPS, client_sampling="all", batch_sampling="sampler", weighting="equal"
    )
    return data.make_cohorts(rows(records(0)), parts(), settings, seed=seed, batch_sampler=plan().sampler)


def showing(rule: Aggregator) -> Aggregator:
    """The same rule, which also shows what every silo sent."""

    def shown(key: jax.Array, state: Any, updates: Any, weight: jax.Array) -> tuple[Any, Any, Any]:
        update, state, _ = rule.apply(key, state, updates, weight)
        return update, state, updates

    return Aggregator(rule.init, shown)


@functools.cache
def federation() -> Any:
    """Local steps with private gradients, averaged; the server takes the update as it is."""
    update = federated.local_update(grad(), optax.sgd(1.0), skip_empty=False)
    return federated.fedavg(lambda _: update, showing(defenses.mean()), optax.sgd(1.0), federated.map_clients)


def label_weight(seed: int, counts: np.ndarray) -> np.ndarray:
    """Class weights from noised label counts, [NUM_CLASSES]."""
    return privacy.private_class_weight(np.random.default_rng(seed), counts, histogram_epsilon=HISTOGRAM_EPSILON)


@functools.cache
def client_plan() -> privacy.Plan:
    """One whole client is the unit."""
    return privacy.make_plan(
        unit="client",
        relation="add_or_remove_one",
        sampling="poisson",
        epsilon=EPSILON,
        delta=DELTA,
        sampling_rate=0.5,
        num_steps=NUM_ROUNDS,
    )


@functools.cache
def client_mean() -> Aggregator:
    """Client-level DP-FedAvg."""
    return privacy.private_mean(client_plan(), clip_norm=CLIENT_CLIP_NORM, num_clients=NUM_CLIENTS)


def run(seed: int, cohort: Any) -> Any:
    """What every silo sent in every round of the training on given cohorts, [R, K, ...]."""
    fed = federation()
    found = list(federated.rounds(fed, fed.init(init(0)), cohort, keys.root(seed), NUM_ROUNDS))
    assert len(found) == NUM_ROUNDS
    return jax.tree.map(lambda *rounds: np.stack(rounds), *(info.aggregation for _, _, info in found))


def empty(cohort: Any) -> Any:
    """The same cohorts with nobody in their batches."""

    def emptied(round: int) -> Any:
        found = cohort(round)
        return found._replace(batch=found.batch._replace(mask=np.zeros_like(found.batch.mask)))

    return emptied


def batch(dataset: Dataset) -> Batch:
    """All rows of a data set as one batch."""
    return Batch(dataset.image, dataset.label, np.ones(len(dataset.label), bool))


@functools.cache
def grad_of_a_random_sum() -> Any:
    """The released gradient where what is summed is itself normal, drawn from the loss's key."""

    def draw(key: jax.Array, params: Any, batch: Batch, weight: Any) -> tuple[Any, None]:
        del batch, weight
        return privacy.add_gaussian(key, jax.tree.map(jnp.zeros_like, params), 1.0), None

    return privacy.private_grad(privacy.ClippedGrad(draw, CLIP_NORM), plan(), num_records=NUM_RECORDS)


def plan_with(**changes: Any) -> privacy.Plan:
    """The costs of the plan's noise with something changed."""
    settings = {
        "unit": "record",
        "relation": "add_or_remove_one",
        "sampling": "poisson",
        "delta": DELTA,
        "sampling_rate": SAMPLING_RATE,
        "num_steps": NUM_ROUNDS * LOCAL_STEPS,
        "noise_multiplier": 1.0,
    }
    return privacy.make_plan(**settings | changes)


def require_isolated(params: Any, dataset: Dataset) -> None:
    """Refuses a loss in which records see each other."""
    privacy.require_isolated(make_loss(), keys.root(0), params, dataset.image, dataset.label)
