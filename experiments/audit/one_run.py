"""One federated training with canaries, and what its server makes of every update it sees."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.audit.settings import Audit
from experiments.combinations import pruning
from experiments.combinations.federation import (
    Apply,
    Hospitals,
    Recipe,
    build_model,
    client_update,
    cohorts,
    example_loss,
    make_plan,
    make_recipe,
    server_optimizer,
)
from fedrobust import defenses, federated, keys, privacy, threads
from fedrobust.federated import FederatedState
from fedrobust.reporting import Combination
from fedrobust.types import Aggregator, Federated, Key, Params

# Purposes of host generators, beyond those of the study.
_CANARIES, _COINS = 111, 112

Progress = Callable[[int, int, dict[str, float]], None]


class Canaries(NamedTuple):
    """Images with a wrong label, all of them, in the data or not. Attributes: image, label, owner (client): [m]."""

    image: Any
    label: Any
    owner: Any


class Watched(NamedTuple):
    """A training that was watched.

    Attributes:
        recipe: how it was trained.
        apply: the model it ended with.
        params: its parameters.
        score: [m] larger where the server believes that the canary was in.
        included: [m] bool, the coins.
    """

    recipe: Recipe
    apply: Apply
    params: Params
    score: np.ndarray
    included: np.ndarray


def place_canaries(settings: Audit, seed: int, site: Hospitals) -> tuple[Hospitals, Canaries, np.ndarray]:
    """Mislabels random training images and leaves out those whose coin says so.

    Returns:
        The data to train on, the canaries, and their coins [m].
    """
    train = site.splits.train
    owner = np.empty(len(train.label), np.int64)
    for client, part in enumerate(site.parts):
        owner[part] = client
    rng = np.random.default_rng([seed, _CANARIES])
    index = rng.choice(len(train.label), min(settings.canaries, len(train.label) // 2), replace=False)
    label = train.label.copy()
    label[index] = (label[index] + rng.integers(1, train.num_classes, len(index))) % train.num_classes
    included = np.random.default_rng([seed, _COINS]).random(len(index)) < 0.5
    parts = [part[~np.isin(part, index[~included])] for part in site.parts]
    splits = site.splits._replace(train=train._replace(label=label))
    return Hospitals(splits, parts), Canaries(train.image[index], label[index], owner[index]), included


def train(settings: Audit, combination: Combination, seed: int, site: Hospitals, progress: Progress) -> Watched:
    """Trains with canaries as the study trains, pruning included, and scores every canary in every round.

    The server knows each round's model and each silo's noised update, which is what the silo's epsilon is about. A
    canary's score is the sum over rounds of <-(its silo's update - mean of the others'), its clipped gradient>.
    """
    site, canaries, included = place_canaries(settings, seed, site)
    recipe = make_recipe(settings, seed, site, plan=make_plan(settings, site), at=combination.at)
    train = site.splits.train
    model = build_model(settings, train.image.shape[1:], train.num_classes)
    params = model.init(keys.stream(keys.root(seed), "init"), jnp.zeros((1, *train.image.shape[1:])))
    score = np.zeros(len(included))
    draw, key = cohorts(recipe, site, seed, ()), keys.stream(keys.root(seed), "train")

    def stage(apply: Apply, state: FederatedState | None, num_rounds: int, between: Callable | None) -> FederatedState:
        algorithm = _algorithm(recipe, apply)
        state = algorithm.init(params) if state is None else state
        scores = _scorer(recipe, apply)
        for done, new, info in federated.rounds(algorithm, state, draw, key, num_rounds, between=between):
            score[:] += np.asarray(scores(state.params, jnp.asarray(done - 1), info.aggregation, canaries), np.float64)
            state = new
            progress(done, recipe.num_rounds, {})
        return state

    if not combination.mc:
        state = stage(model.apply, None, recipe.num_rounds, None)
        return Watched(recipe, model.apply, state.params, score, included)
    channels = pruning.channels(model, train.image.shape[1:])
    prune, _, end = pruning.schedule(settings.mc, channels, recipe.num_rounds)
    dense = stage(model.apply, None, end, prune)
    apply, small, _ = pruning.shrink(model, channels, dense, site.splits.val.image[:256])
    return Watched(recipe, apply, stage(apply, small, recipe.num_rounds, None).params, score, included)


@threads.cached(maxsize=8)  # one object for all rows that share it: what is compiled for it is shared
def _algorithm(recipe: Recipe, apply: Apply) -> Federated:
    """The study's federation with plain averaging, which also tells the updates that it averaged."""
    mean = defenses.mean()

    def tell(key: Key, state: tuple, updates: Params, weight: jax.Array) -> tuple[Params, tuple, Params]:
        update, state, _ = mean.apply(key, state, updates, weight)
        return update, state, updates

    backend = None if recipe.study.client_map == "auto" else recipe.study.client_map
    return federated.fedavg(
        lambda round: client_update(recipe, apply, round),
        Aggregator(mean.init, tell),
        server_optimizer(recipe),
        functools.partial(federated.map_clients, backend=backend),
    )


@threads.cached(maxsize=8)
def _scorer(recipe: Recipe, apply: Apply) -> Callable:
    """`(params, round, updates[K,...], canaries) -> score[m]` of one round."""
    clip_norm, num_clients = recipe.study.dp.clip_norm, recipe.study.clients

    @jax.jit
    def scores(params: Params, round: jax.Array, updates: Params, canaries: Canaries) -> jax.Array:
        loss = example_loss(recipe, apply, round)

        def one(canary: tuple[jax.Array, jax.Array]) -> jax.Array:
            image, label = canary
            # Adversarial samples draw: a fixed key, because the attacker does not know the silo's.
            gradient = jax.grad(lambda p: loss(jax.random.key(0), p, image[None], label[None])[0])(params)
            clipped, _ = privacy.clip(gradient, clip_norm)
            each = jax.tree.map(lambda u, g: jnp.tensordot(u, g, g.ndim, precision="highest"), updates, clipped)
            return sum(jax.tree.leaves(each), jnp.zeros(num_clients))

        inner = jax.lax.map(one, (canaries.image, canaries.label), batch_size=recipe.study.dp.microbatch_size)
        own = jnp.take_along_axis(inner, canaries.owner[:, None], axis=1)[:, 0]
        return (inner.sum(axis=1) - own) / max(num_clients - 1, 1) - own

    return scores


def bound(settings: Audit, watched: Watched) -> float:
    """The lower bound on the epsilon of the whole training."""
    num = len(watched.score)
    guesses = sorted({max(2, num // share // 2 * 2) for share in (1, 2, 4, 8)})
    if not np.isfinite(watched.score).all():
        return 0.0  # a diverged model tells nothing
    return privacy.epsilon_one_run(
        watched.score,
        watched.included,
        delta=settings.dp.delta,
        confidence=settings.confidence,
        num_guesses=guesses,
    )
