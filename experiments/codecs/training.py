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
from fedrobust.types import Federated, Model, Params


class Coded(NamedTuple):
    """A model trained through codes.

    Attributes:
        params: the parameters it was left with.
        uplink: bytes that a client sent in a round, mean over rounds and clients.
        downlink: bytes that a client was sent in a round, mean over rounds.
        dense: bytes of the parameters as float32.
        history: [n, 3] float64: round, training loss, accuracy on val.
        seconds: wall time spent in rounds.
    """

    params: Params
    uplink: float
    downlink: float
    dense: int
    history: np.ndarray
    seconds: float


def train(
    recipe: Recipe, way: Way, site: Hospitals, seed: int, model: Model, account: Account | None, progress: Progress
) -> Coded:
    """Trains a model from its first round to its last.

    Args:
        recipe: how.
        way: how updates are said.
        site: on what.
        seed: of everything random.
        model: the architecture; pass one object for all seeds, so that they share compiled rounds.
        account: what looks at private data are charged to; None without privacy.
        progress: told of every round.
    """
    key = keys.stream(keys.root(seed), "train")
    image_shape = site.splits.train.image.shape[1:]
    params = model.init(keys.stream(keys.root(seed), "init"), jnp.zeros((1, *image_shape)))
    algorithm = federation(recipe, way, model, image_shape)
    draw = charged(account, recipe.num_rounds, cohorts(recipe, site, seed, ()))
    every, history, sent = -(-recipe.num_rounds // HISTORY_POINTS), [], []
    val, start = site.splits.val, time.perf_counter()
    state: Any = None
    for done, state, info in federated.rounds(algorithm, algorithm.init(params), draw, key, recipe.num_rounds):
        uplink = np.sum(info.sent.uplink) / np.sum(np.asarray(info.sent.uplink) > 0)
        sent.append((uplink / 8, info.sent.downlink / 8 if way.both else 4 * trees.size(params)))
        figures = {}
        if done % every == 0 or done == recipe.num_rounds:
            logits = evaluation.predict(model.apply, state.average, val.image, BATCH_SIZE)
            accuracy = float(np.mean(evaluation.predicted_class(logits) == val.label))
            figures = {"loss": float(np.mean(info.client.loss[:, -1])), "val accuracy": accuracy}
            history.append((done, *figures.values()))
        progress(done, recipe.num_rounds, figures)
    seconds = time.perf_counter() - start
    job = Job(recipe, site, seed, recipe.num_rounds, False, (), "mean", Path(), account)
    params = calibrated(job, model.apply, state.average) if val.num_classes == 2 else state.average
    up, down = np.mean(sent, axis=0)
    return Coded(params, float(up), float(down), 4 * trees.size(params), np.asarray(history), seconds)


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
