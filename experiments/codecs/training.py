"""Training one model whose updates are said in codes, and counting what is sent."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.codecs.settings import Way
from experiments.combinations.account import Account, charged
from experiments.combinations.federation import Hospitals, Recipe, client_update, cohorts, server_optimizer
from experiments.combinations.training import BATCH_SIZE, HISTORY_POINTS, Job, Progress, calibrated
from fedrobust import defenses, evaluation, federated, keys, threads, trees
from fedrobust.types import Dataset, Federated, Model, Params


class Coded(NamedTuple):
    """A model trained through codes.

    Attributes:
        params: the parameters it was left with.
        uplink: bytes that a client sent in a round, mean over rounds and clients.
        downlink: bytes that a client was sent in a round, mean over rounds.
        dense: bytes of the parameters as float32.
        history: [n, 3] float64: round, training loss, accuracy on val.
        seconds: wall time spent in rounds, over all runs it took.
    """

    params: Params
    uplink: float
    downlink: float
    dense: int
    history: np.ndarray
    seconds: float


class _Saved(NamedTuple):
    """What a checkpoint holds."""

    state: Any
    history: np.ndarray  # [num_rounds, 3], NaN where nobody asked
    sent: np.ndarray  # [num_rounds, 2], bytes up and down
    seconds: np.ndarray  # []


def train(
    recipe: Recipe,
    way: Way,
    site: Hospitals,
    seed: int,
    model: Model,
    account: Account | None,
    folder: Path,
    progress: Progress,
) -> Coded:
    """Trains a model, going on from its last checkpoint if there is one.

    Args:
        recipe: how.
        way: how updates are said.
        site: on what.
        seed: of everything random.
        model: the architecture; pass one object for all seeds, so that they share compiled rounds.
        account: what looks at private data are charged to; None without privacy.
        folder: where its checkpoints go.
        progress: told of every round.
    """
    image_shape, total = site.splits.train.image.shape[1:], recipe.num_rounds
    params = model.init(keys.stream(keys.root(seed), "init"), jnp.zeros((1, *image_shape)))
    algorithm = federation(recipe, way, model, image_shape)
    empty = np.full((total, 3), np.nan), np.full((total, 2), np.nan), np.zeros(())
    start = _Saved(algorithm.init(params), *empty)
    found = federated.latest(folder, start)
    saved = start if found is None else found[1]
    draw = charged(account, total, cohorts(recipe, site, seed, ()))
    key, every = keys.stream(keys.root(seed), "train"), -(-total // HISTORY_POINTS)
    state, history, sent = saved.state, saved.history.copy(), saved.sent.copy()
    began = last_saved = time.perf_counter()
    for done, state, info in federated.rounds(algorithm, saved.state, draw, key, total):
        sent[done - 1] = _sent(way, info.sent, trees.size(params))
        figures = {}
        if done % every == 0 or done == total:
            figures = _figures(model, state, info, site.splits.val)
            history[done - 1] = (done, *figures.values())
        progress(done, total, figures)
        now = time.perf_counter()
        if done == total or now - last_saved >= recipe.study.checkpoint_every:
            federated.save(folder, done, _Saved(state, history, sent, np.asarray(saved.seconds + (now - began))))
            last_saved = now
    job = Job(recipe, site, seed, total, False, (), "mean", folder, account)
    params = calibrated(job, model.apply, state.average) if site.splits.val.num_classes == 2 else state.average
    seconds = float(saved.seconds) + time.perf_counter() - began
    history = history[~np.isnan(history[:, 0])]
    up, down = sent.mean(axis=0)
    return Coded(params, float(up), float(down), 4 * trees.size(params), history, seconds)


def _sent(way: Way, sent: federated.Sent, num_params: int) -> tuple[float, float]:
    """Bytes from a client, mean over those present, and to a client."""
    uplink = np.asarray(sent.uplink)
    return uplink[uplink > 0].mean() / 8, float(sent.downlink) / 8 if way.both else 4.0 * num_params


def _figures(model: Model, state: Any, info: federated.RoundInfo, val: Dataset) -> dict[str, float]:
    logits = evaluation.predict(model.apply, state.average, val.image, BATCH_SIZE)
    accuracy = float(np.mean(evaluation.predicted_class(logits) == val.label))
    return {"loss": float(np.mean(info.client.loss[:, -1])), "val accuracy": accuracy}


@threads.cached(maxsize=32)
def federation(recipe: Recipe, way: Way, model: Model, image_shape: tuple[int, int, int]) -> Federated:
    """The federated algorithm of a recipe, its updates in codes."""
    like = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    codec = way.build(like)
    return federated.fedavg(
        lambda round: client_update(recipe, model.apply, round),
        defenses.mean(),
        server_optimizer(recipe),
        federated.map_clients,
        average_decay=(recipe.study.dp if recipe.dp else recipe.study.train).average_decay,
        codec=codec,
        num_clients=recipe.study.clients,
        downlink=codec if way.both else None,
    )
